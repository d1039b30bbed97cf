"""A model and its tokenizer without the tokens that the texts never use: the same logits, fewer rows."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    GenerationConfig,
    MarianMTModel,
    PreTrainedModel,
    WhisperForAudioClassification,
)

from hf_efficient import AttentionConfig, ConfigError, DataError, UnsupportedModelError, convert_attention
from hf_efficient import prune_vocabulary as prune
from hf_efficient.data.bundled import bundled_dataset, bundled_model
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.cut.tokenizer import complete
from hf_efficient.pruning.cut.trimming import named_tokens, trim_embeddings
from hf_efficient.pruning.cut.vocabulary import count_tokens, used_tokens

from ...families import CASES, VOCABULARY, make_config, make_inputs, make_model
from ...helpers import assert_close
from ..tiny_tokenizers import TEXTS, tokenizer_of

WITH_WORDS = [name for name in CASES if name not in ("vit", "deit", "dinov2", "clip_vision_model")]
GENERATING = [name for name in WITH_WORDS if CASES[name].auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
KEPT = (0, 1, 2, *range(5, VOCABULARY, 3))

# The tokenizer of each family, as its checkpoints have it.
TOKENIZERS = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "xlm-roberta", "distilbert": "bert"}
TOKENIZERS |= {"electra": "bert", "modernbert": "byte-level", "clip": "clip", "clip_text_model": "clip"}
TOKENIZERS |= {"llama": "llama", "mistral": "byte-fallback", "qwen3": "specials-last", "gemma3_text": "byte-fallback"}
TOKENIZERS |= {"gpt2": "gpt2", "t5": "t5", "bart": "roberta", "marian": "unigram", "whisper": "whisper"}


def renumber(inputs: dict, kept: tuple[int, ...]) -> dict:
    """The inputs with the new ids."""
    number = {old: new for new, old in enumerate(kept)}
    return {
        name: value.clone().apply_(lambda old: number[old]) if name.endswith("input_ids") else value
        for name, value in inputs.items()
    }


def kept_inputs(name: str) -> dict:
    """Inputs of the family with kept tokens only."""
    kept = torch.tensor(KEPT)
    return {
        key: kept[torch.where(value > 2, value % (len(KEPT) - 3) + 3, value)] if key.endswith("input_ids") else value
        for key, value in make_inputs(name).items()
    }


def first_output(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def rows_of(model: PreTrainedModel) -> int:
    """As the config says."""
    return getattr(model.config, "text_config", model.config).vocab_size


def size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.cover
@pytest.mark.parametrize("efficient", [False, True], ids=["stock", "efficient"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("name", WITH_WORDS)
def test_the_kept_tokens_have_their_old_logits(name, tied, efficient, tmp_path):
    model = make_model(name, CASES[name].tied if tied else None)
    if efficient:
        model = convert_attention(model, AttentionConfig(kind="local", window=2)).eval()
    inputs = kept_inputs(name)
    small = trim_embeddings(model, KEPT)
    expected, new = first_output(model, inputs), first_output(small, renumber(inputs, KEPT))
    if expected.shape[-1] == VOCABULARY:
        expected = expected[..., KEPT]
    assert_close(new, expected, 1e-5, name)
    assert type(small) is type(model) and is_portable(small) is not efficient
    assert size(small) < size(model)
    assert rows_of(small) == len(KEPT)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert_close(first_output(loaded.eval(), renumber(inputs, KEPT)), new, 0.0)


@pytest.mark.parametrize("name", WITH_WORDS)
def test_tied_stays_tied_and_apart_stays_apart(name):
    if CASES[name].tied is None:
        pytest.skip("no head with output embeddings")
    for tie in (True, False):
        model = make_model(name, CASES[name].tied, tie_word_embeddings=tie)
        small = trim_embeddings(model, KEPT)
        assert is_tied(small) == is_tied(model) == (tie or name == "t5")  # transformers 5 always ties T5
        before, outside = model.get_output_embeddings().weight, small.get_output_embeddings().weight
        assert torch.equal(outside, before[list(KEPT)])
        bias = small.get_output_embeddings().bias
        assert bias is None or torch.equal(bias, model.get_output_embeddings().bias[list(KEPT)])


@pytest.mark.parametrize("name", WITH_WORDS)
def test_texts_give_the_same_logits_through_the_new_pair(name, tmp_path):
    tokenizer = tokenizer_of(TOKENIZERS[name])
    model = with_vocabulary(name, tokenizer)
    before, settings = copy.deepcopy(model.state_dict()), model.config.to_dict()
    small, cut = prune(model, tokenizer, iter(TEXTS[:3]))
    kept = complete(tokenizer, {*used_tokens(tokenizer, TEXTS[:3]), *named_tokens(model)})
    assert 0 < len(kept) < len(tokenizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == settings
    for folder_model, folder_tokenizer in ((small, cut), saved_and_loaded(small, cut, tmp_path)):
        assert len(folder_tokenizer) <= len(kept)
        for text in TEXTS[:3]:
            old, new = tokenizer(text, return_tensors="pt"), folder_tokenizer(text, return_tensors="pt")
            assert not torch.equal(old.input_ids, new.input_ids)
            expected, actual = answer(model, name, old.input_ids), answer(folder_model, name, new.input_ids)
            if expected.shape[-1] == rows_of(model):
                expected = expected[..., kept]
            assert_close(actual, expected, 1e-5, f"{name}: {text}")


def with_vocabulary(name: str, tokenizer) -> PreTrainedModel:
    """A model with a row for each token and a few more, and the special tokens of the tokenizer."""
    rows = {"vocab_size": 64 * (len(tokenizer) // 64 + 1)}
    rows |= {"max_position_embeddings": 128} if name != "t5" else {}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    ids = {kind: index for kind, index in ids.items() if index is not None}
    if name == "clip":
        text = make_config("clip").text_config.to_dict() | rows | ids
        return make_model(name, text_config=text)
    positions = {"gpt2": {"n_positions": 128}, "whisper": {"max_target_positions": 128}}.get(name, {})
    return make_model(name, CASES[name].tied, **rows | ids | positions)


def answer(model: PreTrainedModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    if name == "clip":
        with torch.no_grad():
            return model.get_text_features(input_ids=ids)[0]
    if name == "whisper":
        return first_output(model, {"input_features": torch.randn(1, 8, 24), "decoder_input_ids": ids})
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name in ("t5", "bart", "marian") else {})
    return first_output(model, inputs)


def saved_and_loaded(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_goes_on_as_before(name):
    """Where no banned or dropped token would have won."""
    model = make_model(name, CASES[name].tied)
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in KEPT]
    model.generation_config.eos_token_id = [1, 8]
    inputs = {key: value for key, value in kept_inputs(name).items() if not key.startswith("decoder")}
    small = trim_embeddings(model, KEPT)
    assert small.generation_config.suppress_tokens is None
    assert small.generation_config.eos_token_id == [1, KEPT.index(8)]
    old = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = small.generate(**renumber(inputs, KEPT), max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.tensor(KEPT)[new], old)


def test_all_that_names_a_token_is_renumbered():
    model = make_model("whisper", pad_token_id=8, suppress_tokens=[5, 6], begin_suppress_tokens=[6])
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 11], forced_decoder_ids=[[1, 14], [2, None]], suppress_tokens=[5, 6, 8],
        bad_words_ids=[[5, 8], [6]], sequence_bias=[[[5], 1.0], [[6], 2.0]], lang_to_id={"<|en|>": 17},
        no_timestamps_token_id=47, pad_token_id=None,
    )  # fmt: skip
    assert {0, 1, 2, 8, 11, 14, 17, 47, 48, 49} == set(named_tokens(model)) | {0}
    kept = (0, 1, 2, 5, 8, 11, 14, 17, 47, 48, 49)
    small = trim_embeddings(model, kept)
    made = small.generation_config
    assert small.config.pad_token_id == kept.index(8) == small.get_input_embeddings().padding_idx
    assert small.config.suppress_tokens == [3] and small.config.begin_suppress_tokens is None
    assert made.eos_token_id == [1, 5] and made.forced_decoder_ids == [[1, 6], [2, None]]
    assert made.suppress_tokens == [3, 4] and made.bad_words_ids == [[3, 4]] and made.sequence_bias == [[[3], 1.0]]
    assert made.lang_to_id == {"<|en|>": 7} and made.no_timestamps_token_id == 8 and made.pad_token_id is None
    assert model.generation_config.eos_token_id == [1, 11]


def test_a_number_that_is_no_token_stays():
    model = make_model("llama", pad_token_id=-1)
    assert trim_embeddings(model, KEPT).config.pad_token_id == -1


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_positions_that_are_counted_from_the_padding_token(name):
    """Its id becomes smaller, and with it every position."""
    model = make_model(name, pad_token_id=8)
    ids = torch.tensor([[1, 5, 11, 14, 8, 8], [1, 17, 20, 23, 26, 2]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(8).long()}
    small = trim_embeddings(model, KEPT)
    assert small.config.pad_token_id == 4
    assert small.config.max_position_embeddings == model.config.max_position_embeddings - 4
    new = first_output(small, renumber(inputs, KEPT))
    assert_close(new, first_output(model, inputs), 1e-5)


def test_clip_reads_its_answer_at_the_same_place():
    ids = torch.tensor([[0, 5, 8, 47, 20, 20], [0, 47, 5, 8, 11, 14]])
    for end in (2, 47):  # 2 is how old checkpoints say: at the highest id
        model = make_model("clip_text_model", eos_token_id=end)
        small = trim_embeddings(model, KEPT)
        assert small.config.eos_token_id == (2 if end == 2 else KEPT.index(47))
        new = small(**renumber({"input_ids": ids}, KEPT)).pooler_output
        assert_close(new, model(input_ids=ids).pooler_output, 1e-5)
    with pytest.raises(ConfigError, match=r"must not get the id 2.*Keep one more token before 47"):
        trim_embeddings(make_model("clip_text_model", eos_token_id=47, bos_token_id=0), (0, 1, 47))


def test_marian_with_embeddings_of_its_own_on_each_side():
    apart = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    model = make_model("marian", MarianMTModel, **apart)
    model.final_logits_bias.normal_()
    inputs = kept_inputs("marian")
    small = trim_embeddings(model, KEPT)
    assert small.config.decoder_vocab_size == small.config.vocab_size == len(KEPT)
    assert torch.equal(small.final_logits_bias, model.final_logits_bias[:, KEPT])
    assert_close(first_output(small, renumber(inputs, KEPT)), first_output(model, inputs)[..., KEPT], 1e-5)
    with pytest.raises(UnsupportedModelError, match=r"reads 50 tokens and writes 60 others"):
        trim_embeddings(make_model("marian", MarianMTModel, decoder_vocab_size=60, **apart), KEPT)


def test_precision_training_and_what_is_frozen_stay():
    model = make_model("bert", BertForMaskedLM).double().train()
    model.get_input_embeddings().weight.requires_grad = False
    small = trim_embeddings(model, KEPT)
    assert small.training and small.dtype == torch.float64
    assert not small.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        small.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0


def test_tokens_to_keep_stay():
    tokenizer = tokenizer_of("bert")
    model = with_vocabulary("bert", tokenizer)
    wanted = tokenizer.convert_tokens_to_ids("shells")
    small, cut = prune(model, tokenizer, TEXTS[:1], keep=[wanted])
    assert "shells" in cut.get_vocab() and "shells" not in prune(model, tokenizer, TEXTS[:1])[1].get_vocab()
    row = small.get_input_embeddings().weight[cut.convert_tokens_to_ids("shells")]
    assert torch.equal(row, model.get_input_embeddings().weight[wanted])


def test_the_bundled_model_on_the_bundled_news():
    """30,522 tokens, of which 300 articles need about a third: equal to the last bit."""
    folder = bundled_model("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = bundled_dataset("bbc-news")["text"][:300]
    small, cut = prune(model, tokenizer, (text for text in texts))
    assert len(tokenizer) == 30522 and len(cut) == small.config.vocab_size < 15_000
    assert size(model) - size(small) == (30522 - len(cut)) * model.config.hidden_size
    options = {"return_tensors": "pt", "truncation": True, "max_length": 64, "padding": True}
    for start in range(0, 16, 8):
        old, new = tokenizer(texts[start : start + 8], **options), cut(texts[start : start + 8], **options)
        assert_close(first_output(small, new), first_output(model, old), 0.0)
    assert [cut.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("one text", DataError, "`texts` is one string"),
        ([], DataError, "`texts` is empty"),
        (["good", 3], DataError, "Text 1 is a int"),
    ],
)
def test_texts_that_are_refused(texts, error, message):
    tokenizer = tokenizer_of("bert")
    with pytest.raises(error, match=message):
        prune(with_vocabulary("bert", tokenizer), tokenizer, texts)


def test_models_and_tokenizers_that_are_refused():
    tokenizer = tokenizer_of("bert")
    small = make_model("bert")
    with pytest.raises(ConfigError, match=r"has the id \d+, but the model has 50 embeddings"):
        prune(small, tokenizer, TEXTS)
    with pytest.raises(ConfigError, match="keep names 9999"):
        prune(with_vocabulary("bert", tokenizer), tokenizer, TEXTS, keep=[9999])
    for name in ("vit", "deit", "dinov2", "clip_vision_model"):
        with pytest.raises(UnsupportedModelError, match="read no text"):
            prune(make_model(name), tokenizer, TEXTS)
    deaf = make_model("whisper", WhisperForAudioClassification, vocab_size=300)
    with pytest.raises(UnsupportedModelError, match="has no embeddings of tokens"):
        prune(deaf, tokenizer, TEXTS)
    with pytest.raises(UnsupportedModelError, match="A transformers model is needed, got NoneType"):
        prune(None, tokenizer, TEXTS)
    with pytest.raises(ConfigError, match=r"such as 0 \(pad_token_id\)"):
        trim_embeddings(small, range(1, 20))
    with pytest.raises(ConfigError, match="kept names 50; the model has the token ids 0 to 49"):
        trim_embeddings(small, [0, 1, 2, 50])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "unigram"])
def test_the_most_frequent_tokens_stay(kind):
    tokenizer = tokenizer_of(kind)
    config = make_config("bert", vocab_size=len(tokenizer), pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    counts, always = count_tokens(tokenizer, TEXTS), complete(tokenizer, named_tokens(model))
    room = len(always) + 8
    small, short = prune(model, tokenizer, TEXTS, max_tokens=room)
    assert len(always) < small.config.vocab_size == len(small.get_input_embeddings().weight) <= room
    left = set(short.get_vocab()) - set(tokenizer.convert_ids_to_tokens(list(always)))
    gone = {tokenizer.convert_ids_to_tokens(index): count for index, count in counts.items()}
    rarest = min(gone[token] for token in left if token in gone)
    assert left and all(count <= rarest for token, count in gone.items() if token not in short.get_vocab())
    again, _ = prune(model, tokenizer, TEXTS, max_tokens=10**6)
    assert again.config.vocab_size == prune(model, tokenizer, TEXTS)[0].config.vocab_size > small.config.vocab_size
    assert all(token != short.unk_token for token in short.tokenize(TEXTS[0]) if short.unk_token not in TEXTS[0])
    with pytest.raises(ConfigError, match=f"max_tokens is 3, but {len(always)} tokens must stay"):
        prune(model, tokenizer, TEXTS, max_tokens=3)
    with pytest.raises(ConfigError, match="max_tokens must be an integer"):
        prune(model, tokenizer, TEXTS, max_tokens=0.5)
