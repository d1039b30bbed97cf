"""Static vectors: made as the formula says, fine-tuned, and the same in the libraries that they are saved for."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from hf_efficient.baselines.static import HEAD, Static, StaticReader, make_static, tune
from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.models.loading import load_model, load_processor

from ..pipeline.tiny import make_bert

TEXTS = ["a b c", "a b", "a", "d a e e", "b c", "h a"]
LABELS = [0, 0, 0, 1, 0, 1]


@pytest.fixture
def teacher(tmp_path):
    folder = make_bert(tmp_path / "bert")
    return load_model("AutoModelForSequenceClassification", folder), load_processor(str(folder), images=False)


@pytest.fixture
def static(teacher):
    return make_static(*teacher, TEXTS)


def test_vectors_are_those_of_the_formula(teacher):
    model, tokenizer = teacher
    found = make_static(model, tokenizer, TEXTS, width=16, sif=0.1).vectors
    with torch.no_grad():
        states = [
            model.bert(**tokenizer(token, return_tensors="pt")).last_hidden_state.mean(1) for token in "abcdefgh"
        ]
        marks = list(tokenizer.all_special_tokens)
        states += [
            model.bert(torch.tensor([[2, token, 3]])).last_hidden_state.mean(1)
            for token in tokenizer.convert_tokens_to_ids(marks)
        ]
    ids = tokenizer.convert_tokens_to_ids([*"abcdefgh", *marks])
    rows = torch.cat(states).double()
    tokens = "".join(TEXTS).replace(" ", "")
    share = torch.tensor([tokens.count(token) / len(tokens) for token in "abcdefgh"] + [0] * len(marks))
    # A rotation leaves what vectors have with each other: all but the scale is known.
    centred = (rows - rows.mean(0)) * (0.1 / (0.1 + share))[:, None]
    expected, made = centred @ centred.T, (found[ids] @ found[ids].T).double()
    assert torch.allclose(made / made.norm(), expected / expected.norm(), atol=1e-5)
    plain = (rows - rows.mean(0)) @ (rows - rows.mean(0)).T
    assert not torch.allclose(made / made.norm(), plain / plain.norm(), atol=1e-2)


def test_fewer_numbers_are_the_main_axes(teacher):
    whole = make_static(*teacher, TEXTS, width=16, sif=1e9).vectors
    short = make_static(*teacher, TEXTS, width=4, sif=1e9).vectors
    spread = whole.var(0)
    assert short.shape == (13, 4) and (spread[:-1] >= spread[1:] - 1e-6).all()
    same = torch.nn.functional.cosine_similarity(whole[:, :4], short, dim=0)
    assert torch.allclose(same, torch.ones(4), atol=1e-5)


def test_a_text_is_the_mean_of_its_tokens(static):
    one, two = static.encode(["a", "b"])
    assert torch.allclose(static.encode(["a b"])[0], (one + two) / 2, atol=1e-6)
    assert torch.allclose(static.encode(["b a a b"])[0], (one + two) / 2, atol=1e-6) and not static.encode([""]).any()
    assert static.tokens(["a b"]) == [[5, 6]]
    with pytest.raises(ConfigError, match="no head"):
        static.logits(["a"])


def test_tuning_learns_the_labels_and_leaves_other_tokens(static):
    before = static.vectors.clone()
    texts, labels = TEXTS * 20, LABELS * 20
    assert tune(static, texts, labels, 2, seed=1) > 1
    assert static.logits(TEXTS).argmax(-1).tolist() == LABELS
    used = sorted({token for row in static.tokens(TEXTS) for token in row})
    others = [token for token in range(len(before)) if token not in used]
    assert torch.equal(static.vectors[others], before[others])
    assert (static.vectors[used] != before[used]).any(1).all()
    again = Static(static.tokenizer, before)
    tune(again, texts, labels, 2, seed=1)
    assert torch.equal(again.vectors, static.vectors) and torch.equal(again.weight, static.weight)


@pytest.fixture
def saved(static, tmp_path):
    tune(static, TEXTS * 8, LABELS * 8, 2)
    static.save(tmp_path / "static", ["bad", "good"])
    return tmp_path / "static"


def test_what_is_saved_answers_the_same(static, saved):
    again = Static.load(saved)
    assert torch.equal(again.logits(TEXTS), static.logits(TEXTS))
    assert torch.equal(StaticReader(again)([(text,) for text in TEXTS]).logits, static.logits(TEXTS))
    assert StaticReader(again).weight_bytes == 4 * (13 * 16 + 2 * 16 + 2)
    shutil.rmtree(saved / HEAD)
    assert Static.load(saved).weight is None and torch.equal(Static.load(saved).vectors, static.vectors)
    static.vectors = static.vectors[:5]
    static.save(saved)
    with pytest.raises(CheckpointError, match="fewer vectors than tokens"):
        Static.load(saved)


def test_sentence_transformers_gives_the_same_vectors_and_scores(static, saved):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Dense

    model = library.SentenceTransformer(str(saved), device="cpu")
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(vectors, static.encode(TEXTS), atol=1e-6)
    head = Dense.load(str(saved / HEAD))
    with torch.inference_mode():
        scores = head({"sentence_embedding": vectors})["sentence_embedding"]
    assert torch.allclose(scores, static.logits(TEXTS), atol=1e-5)


def test_model2vec_gives_the_same_vectors(static, saved):
    library = pytest.importorskip("model2vec")
    model = library.StaticModel.from_pretrained(saved)
    assert torch.allclose(torch.from_numpy(model.encode(TEXTS)).float(), static.encode(TEXTS), atol=1e-6)
    assert model.max_length is None and not model.normalize


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="needs a fast tokenizer"):
        make_static(None, SimpleNamespace(is_fast=False), TEXTS)
