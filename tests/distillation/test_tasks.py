"""Tasks beside classification and generation, the losses made for them, and what both models may share."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertForQuestionAnswering,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5Model,
)

from hf_efficient.distillation.student import build_student
from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.models.pooling import POOLINGS, pool
from hf_efficient.training.batch import Batch, head_of

from .tiny import VOCABULARY, bert, collate, examples, llama, make_pair
from .training import make_trainer, trained, weights

# ---- spans ----------------------------------------------------------------------------------------------------------


def test_spans_are_two_questions_over_the_real_tokens(tmp_path):
    """Against the loss written out text by text, without padding; answers outside the text do not count."""
    student, teacher = make_pair("span")
    rows = examples("span")
    trainer = make_trainer("span", tmp_path, pair=(student, teacher), losses={"ce": 1.0, "kd": 1.0}, temperature=3.0)
    got = trainer.compute_loss(student, collate(rows))
    hard, soft = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        own, other = student(input_ids=ids), teacher(input_ids=ids)
        for name in ("start", "end"):
            mine, theirs = own[f"{name}_logits"], other[f"{name}_logits"]
            if row[f"{name}_positions"] < ids.shape[1]:
                hard.append(F.cross_entropy(mine, torch.tensor([row[f"{name}_positions"]])))
            logs = [(logits / 3.0).log_softmax(-1) for logits in (mine, theirs)]
            soft.append(9.0 * F.kl_div(logs[0], logs[1], log_target=True, reduction="sum"))
    assert len(hard) < len(soft) == 32
    assert got.item() == pytest.approx((sum(hard) / len(hard) + sum(soft) / 32).item(), rel=1e-12)


def test_the_metric_of_spans_gets_both_logits(tmp_path):
    trainer = make_trainer("span", tmp_path)
    seen = {}
    trainer.compute_metrics = lambda prediction: seen.update(vars(prediction)) or {}
    trainer.evaluate()
    starts, ends = seen["predictions"]
    assert starts.shape == ends.shape and starts.shape[0] == 11
    assert len(seen["label_ids"]) == 2


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling(side):
    states = torch.arange(24, dtype=torch.float64).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]]).bool()
    states[~mask] = torch.nan
    rows = [states[0], states[1][mask[1]]]
    expected = {"mean": [row.mean(0) for row in rows], "cls": [row[0] for row in rows], "last": [r[-1] for r in rows]}
    weights = [torch.arange(1, len(row) + 1)[:, None] for row in rows]
    expected["weighted_mean"] = [(row * each).sum(0) / each.sum() for row, each in zip(rows, weights, strict=True)]
    assert expected.keys() == set(POOLINGS)
    for kind, vectors in expected.items():
        assert torch.equal(pool(states, mask, kind), torch.stack(vectors))
    assert torch.equal(pool(states[:1], torch.tensor([True]), "mean"), states[:1].mean(1))  # images
    assert torch.equal(pool(states, torch.zeros_like(mask), "mean"), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="pooling"):
        pool(states, mask, "max")


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_embedding_loss_is_that_of_pooled_vectors(kind, tmp_path):
    _, teacher = make_pair("embedding")
    student = make_pair("embedding", seed=1)[1]
    rows = examples("embedding")
    losses = {"embedding": 1.0}
    trainer = make_trainer("embedding", tmp_path, pair=(student, teacher), losses=losses, embedding_loss=kind)
    own, other = (
        torch.stack([model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0) for row in rows])
        for model in (student, teacher)
    )
    distances = {"cosine": 1 - F.cosine_similarity(own, other), "mse": (own - other).square().mean(1)}
    got = trainer.compute_loss(student, collate(rows))
    assert got.item() == pytest.approx(distances[kind].mean().item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_first_numbers_of_embeddings_are_taught_too(kind, tmp_path):
    """The mean over the whole vectors and each length; trained so, the first numbers come nearer to the teacher's."""
    rows = examples("embedding")

    def vectors(model):
        return torch.stack(
            [model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0) for row in rows]
        )

    def distance(own, other):
        return (1 - F.cosine_similarity(own, other) if kind == "cosine" else (own - other).square().mean(1)).mean()

    def make(**more):
        pair = [make_pair("embedding", seed=seed)[1] for seed in (1, 0)]
        settings = {"losses": {"embedding": 1.0}, "embedding_loss": kind, "max_steps": 30, "learning_rate": 0.03}
        return make_trainer("embedding", tmp_path, pair=pair, **settings | more), pair[1]

    trainer, teacher = make(matryoshka_dims=[3, 1])
    goal, own = vectors(teacher).detach(), vectors(trainer.model).detach()
    parts = [distance(own[:, :end], goal[:, :end]).item() for end in (None, 3, 1)]
    assert trainer.compute_loss(trainer.model, collate(rows)).item() == pytest.approx(sum(parts) / 3, rel=1e-12)
    plain, _ = make()
    for each in (trainer, plain):
        each.train()
    ours, theirs = (distance(vectors(each.model)[:, :3], goal[:, :3]).item() for each in (trainer, plain))
    assert ours < theirs < parts[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": {"hidden": 1.0}}, "belongs to the loss `embedding`"),
        ({"matryoshka_dims": [64]}, "has 64, and vectors are"),
        ({"matryoshka_dims": []}, "a list of different lengths"),
        ({"matryoshka_dims": [2, 2]}, "a list of different lengths"),
    ],
)
def test_lengths_that_cannot_be_taught(settings, words, tmp_path):
    teacher, student = (make_pair("embedding", seed=seed)[1] for seed in (0, 1))
    settings = {"losses": {"embedding": 1.0}, "matryoshka_dims": [2]} | settings
    with pytest.raises(ConfigError, match=words):
        make_trainer("embedding", tmp_path, pair=(student, teacher), **settings)
    with pytest.raises(ConfigError, match="a student of width"):  # narrower
        make_trainer("embedding", tmp_path, losses={"embedding": 1.0}, matryoshka_dims=[2])


def test_a_narrower_student_learns_embeddings_through_a_projection(tmp_path):
    """Without labels; the projection is gone when training ends, and came back from a checkpoint's side file."""
    settings = {"losses": {"embedding": 1.0}, "max_steps": 30, "learning_rate": 0.3}
    trainer = make_trainer("embedding", tmp_path, **settings)
    assert list(trainer.projections) == ["embedding"]
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss_embedding"] < 0.8 * before["eval_loss_embedding"]
    assert "eval_teacher_agreement" not in before
    assert not any("projection" in name for name, _ in trainer.model.named_parameters())
    trainer.compute_metrics = lambda prediction: {}
    trainer.evaluate()  # no logits to gather


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"pooling": "mean"}, {"pooling": "cls"}),
        ({"pooling": "mean"}, {"pooling": "last"}),
        ({"embedding_loss": "cosine"}, {"embedding_loss": "mse"}),
    ],
)
def test_every_setting_of_embeddings_matters(first, second, tmp_path):
    one, two = (trained("embedding", tmp_path, losses={"embedding": 1.0}, **own) for own in (first, second))
    assert (one - two).norm() > 1e-6 * one.norm()


def test_losses_that_a_head_or_its_absence_rules_out(tmp_path):
    with pytest.raises(ConfigError, match="`ce` and `kd`, but these models have no head"):
        make_trainer("embedding", tmp_path, losses={"ce": 1.0, "kd": 1.0})
    with pytest.raises(ConfigError, match="load both with AutoModel"):
        make_trainer("bert", tmp_path, losses={"ce": 1.0, "embedding": 1.0})
    for model in (
        T5Model(T5Config(vocab_size=9, d_model=4, d_kv=2, num_heads=2, num_layers=1, d_ff=4)),
        CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9},
                vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
            )
        ),
    ):
        with pytest.raises(UnsupportedModelError, match="T5EncoderModel"):
            head_of(model)


# ---- attention_output, causality ------------------------------------------------------------------------------------


def test_attention_outputs_are_what_the_modules_give(tmp_path):
    """Against hooks of the test, on texts of one length."""
    _, teacher = make_pair("bert")
    student = make_pair("bert", seed=1)[1]
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    settings = {"losses": {"attention_output": 1.0}, "layer_map": [[2, 3]]}
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher), **settings)
    given = []
    layers = student.bert.encoder.layer[1], teacher.bert.encoder.layer[2]
    for layer in layers:
        layer.attention.self.register_forward_hook(lambda module, args, output: given.append(output[0]))
    got = trainer.compute_loss(student, {"input_ids": ids, "labels": torch.zeros(4, dtype=torch.long)})
    theirs, mine = given  # the teacher runs first
    assert got.item() == pytest.approx((mine - theirs).square().mean().item(), rel=1e-12)


def test_a_classifier_made_of_a_decoder_is_compared_causally():
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels = 3
    assert head_of(LlamaForSequenceClassification(config)).is_causal
    assert head_of(llama()).is_causal
    assert not head_of(bert()).is_causal


# ---- temperature, vocabularies, another family, one encoder ---------------------------------------------------------


def test_the_temperature_goes_in_equal_steps(tmp_path):
    settings = {"losses": {"kd": 1.0}, "max_steps": 4, "learning_rate": 0.0, "temperature_squared": False}
    fixed = {}
    for temperature in (8.0, 6.0, 4.0, 2.0):
        trainer = make_trainer("bert", tmp_path, temperature=temperature, **settings | {"max_steps": 1})
        trainer.train()
        fixed[temperature] = trainer.state.log_history[0]["loss_kd"]
    scheduled = make_trainer("bert", tmp_path, temperature=8.0, temperature_final=0.0 + 1e-9, **settings)
    scheduled.train()
    got = [entry["loss_kd"] for entry in scheduled.state.log_history if "loss_kd" in entry]
    assert got == pytest.approx([fixed[t] for t in (8.0, 6.0, 4.0, 2.0)], rel=1e-6)
    with pytest.raises(ConfigError, match="temperature_final"):
        make_trainer("bert", tmp_path, temperature_final=0.0)


def test_padded_vocabularies_are_compared_where_both_have_entries(tmp_path):
    student, teacher = make_pair("llama")
    teacher.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    same = copy.deepcopy(teacher)
    same.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    with pytest.raises(UnsupportedModelError, match="truncate_vocabulary=True"):
        make_trainer("llama", tmp_path, pair=(student, teacher))
    settings = {"losses": {"ce": 1.0, "kd": 1.0}}
    padded = make_trainer("llama", tmp_path, pair=(student, teacher), truncate_vocabulary=True, **settings)
    plain = make_trainer("llama", tmp_path, pair=(student, same), **settings)
    batch = collate(examples("llama"))
    ours, expected = (trainer.compute_loss(student, dict(batch)) for trainer in (padded, plain))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    keys = ("eval_loss_kd", "eval_teacher_agreement")
    got, wanted = padded.evaluate(), plain.evaluate()
    assert [got[key] for key in keys] == pytest.approx([wanted[key] for key in keys], rel=1e-12)


def test_a_student_of_another_family(tmp_path):
    """BERT teaches DistilBERT everything: logits, states, attentions and relations."""
    _, teacher = make_pair("bert")
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3, max_position_embeddings=32
    )
    student = DistilBertForSequenceClassification(config).double()
    names = ("ce", "kd", "hidden", "attention", "relation", "attention_output")
    settings = {"max_steps": 10, "learning_rate": 0.05}
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher), losses=dict.fromkeys(names, 1.0), **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in names[1:]:
        assert after[f"eval_loss_{name}"] < before[f"eval_loss_{name}"], name


def test_one_encoder_for_both(tmp_path, monkeypatch):
    """The same step as with two, but for the encoder, which stays; and it runs once."""
    _, teacher = make_pair("t5")
    pairs = [(build_student(teacher, layers={"decoder": 2}), teacher) for _ in range(2)]
    encoder_before = weights(pairs[0][0].encoder)
    settings = {"losses": {"ce": 1.0, "kd": 1.0}}
    apart = make_trainer("t5", tmp_path, pair=pairs[1], **settings)
    pairs[1][0].encoder.requires_grad_(False)
    calls = []
    shared = make_trainer("t5", tmp_path, pair=pairs[0], share_encoder=True, **settings)
    pairs[0][0].encoder.register_forward_hook(lambda *call: calls.append(call))
    for trainer in (apart, shared):
        trainer.train()
    assert not calls
    assert torch.allclose(weights(shared.model), weights(apart.model), rtol=1e-12, atol=1e-14)
    assert torch.equal(weights(pairs[0][0].encoder), encoder_before)
    assert not torch.equal(
        weights(shared.model.decoder.block), weights(build_student(teacher, {"decoder": 2}).decoder.block)
    )


def test_an_encoder_that_cannot_be_shared(tmp_path):
    student, teacher = make_pair("t5")
    with pytest.raises(ConfigError, match="build_student"):
        make_trainer("t5", tmp_path, pair=(student, teacher), share_encoder=True)
    cut = build_student(teacher, layers={"decoder": 2})
    with pytest.raises(ConfigError, match="`hidden`"):
        make_trainer("t5", tmp_path, pair=(cut, teacher), share_encoder=True, losses={"hidden": 1.0})
    with pytest.raises(ConfigError, match="encoder-decoders"):
        make_trainer("bert", tmp_path, share_encoder=True)


def test_token_labels_must_agree(tmp_path):
    from transformers import BertForTokenClassification

    student, teacher = (bert(head=BertForTokenClassification, num_labels=n) for n in (3, 4))
    with pytest.raises(UnsupportedModelError, match=r"3 labels .* 4 "):
        make_trainer("token", tmp_path, pair=(student, teacher))


def test_a_span_batch_without_answers_can_still_teach():
    task = head_of(bert(head=BertForQuestionAnswering, num_labels=2))
    batch = Batch({"input_ids": torch.zeros(3, 4, dtype=torch.long)}, task)
    assert batch.labels is None
    assert batch.soft_mask().sum() == 6
    assert head_of(bert(head=BertModel)).kind == "embeddings"


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_single_scores_are_compared_as_told(kind, problem, tmp_path):
    """Whatever the labels are: by squared error, or as chances, which at a high temperature is an eighth of that."""
    student, teacher = (bert(num_labels=1, problem_type=problem, initializer_range=0.9) for _ in range(2))
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([[0.0], [1.0]])}
    settings = {"losses": {"kd": 1.0}, "score_loss": kind, "temperature": 100.0}
    trainer = make_trainer("bert", tmp_path, pair=(student.eval(), teacher.eval()), **settings)
    with torch.no_grad():
        found = trainer.compute_loss(student, dict(batch)).item()
        own, other = (model(input_ids=batch["input_ids"]).logits for model in (student, teacher))
    squared = (own - other).square().mean().item()
    assert squared > 1e-3
    assert found == pytest.approx(squared) if kind == "mse" else found == pytest.approx(squared / 8, rel=2e-2)
