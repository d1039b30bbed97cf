"""The losses between attentions: against naive twins, and what is noted of a model against its own projections."""

import copy

import pytest
import torch
from transformers import AttentionInterface

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.distillation.losses.relations import Projected, attention_loss, relation_loss
from hf_efficient.distillation.recorded import recording, self_attentions
from hf_efficient.errors import ConfigError

from .. import naive
from ..tiny import CASES, bert, make_pair
from ..training import make_trainer, weights

B, T = 2, 5
MASKS = {
    "right": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    "left": torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool(),
}
BOTH = {"attention": 1.0, "relation": 1.0}


def projected(heads: int, dim: int, *, kv_heads: int | None = None, seed: int = 0) -> Projected:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, n, T, dim) for n in (heads, kv_heads or heads, kv_heads or heads)]
    return Projected(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes), dim**-0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_attention_is_that_of_the_naive_twin(kind, side, causal):
    student, teacher, mask = projected(2, 3), projected(2, 4, seed=1), MASKS[side]
    total, count = attention_loss(student, teacher, mask, causal=causal, kind=kind)
    assert total.item() == pytest.approx(naive.attention(student, teacher, mask, causal, kind), rel=1e-12)
    assert count == mask.sum() and total > 0
    assert attention_loss(teacher, teacher, mask, causal=causal, kind=kind)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relation_is_that_of_the_naive_twin(heads, side, causal):
    """Other numbers of heads, other widths, grouped keys."""
    student, teacher, mask = projected(2, 4), projected(4, 3, kv_heads=4, seed=1), MASKS[side]
    total, count = relation_loss(student, teacher, mask, causal=causal, heads=heads)
    assert total.item() == pytest.approx(naive.relation(student, teacher, mask, causal, heads), rel=1e-12)
    assert count == mask.sum() and total > 0
    assert relation_loss(teacher, teacher, mask, causal=causal)[0].item() == pytest.approx(0, abs=1e-12)


def test_grouped_keys_are_those_of_their_queries():
    grouped, other, mask = projected(4, 4, kv_heads=2), projected(4, 4, seed=1), MASKS["right"]
    spread = Projected(grouped.query, grouped.key.repeat_interleave(2, 1), grouped.value, grouped.scaling)
    assert torch.equal(attention_loss(grouped, other, mask)[0], attention_loss(spread, other, mask)[0])
    total, _ = relation_loss(grouped, other, mask)
    assert total.item() == pytest.approx(naive.relation(grouped, other, mask, False, 4), rel=1e-12)


@pytest.mark.parametrize("loss", [attention_loss, relation_loss])
def test_padding_is_never_read(loss):
    mask = MASKS["right"]
    student, teacher = projected(2, 4), projected(2, 4, seed=1)
    states = [x.clone() for x in (student.query, student.key, student.value)]
    for state in states:
        state[1, :, 3:] = float("nan")
        state.requires_grad_()
    spoilt = Projected(*states, student.scaling)
    total, _ = loss(spoilt, teacher, mask)
    total.backward()
    assert torch.equal(total.detach(), loss(student, teacher, mask)[0])
    for state in states:
        assert state.grad is None or (state.grad[1, :, 3:] == 0).all()


def test_images_count_once():
    student, teacher = projected(2, 4), projected(2, 4, seed=1)
    whole = attention_loss(student, teacher, torch.ones(B, T, dtype=torch.bool))[0]
    total, count = attention_loss(student, teacher, torch.ones(B, dtype=torch.bool))
    assert total.item() == pytest.approx(whole.item() / T, rel=1e-12) and count == B


def test_what_is_refused(tmp_path):
    mask = MASKS["right"]
    with pytest.raises(ConfigError, match="has 2, its teacher layer 4"):
        attention_loss(projected(2, 4), projected(4, 4), mask)
    with pytest.raises(ConfigError, match="Divisors of all: 1, 2, 4, 8"):
        relation_loss(projected(2, 4), projected(4, 4), mask, heads=3)
    with pytest.raises(ConfigError, match="hubrr"):
        attention_loss(projected(2, 4), projected(2, 4), mask, kind="hubrr")
    student, teacher = make_pair("bert")
    teacher.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="set_attn_implementation"):
        make_trainer("bert", tmp_path, pair=(student, teacher), losses=BOTH)
    with pytest.raises(ConfigError, match="no attention"):
        make_trainer("bert", tmp_path, losses=BOTH, layer_map=[[0, 0]])


@pytest.mark.parametrize("name", ["sdpa", "hf_efficient"])
def test_what_is_noted_are_the_projections(name):
    torch.manual_seed(0)
    model = bert().eval()
    if name == "hf_efficient":
        model = convert_attention(model, AttentionConfig("linear")).eval()
    modules = self_attentions(model, ("encoder",))
    projections = []
    query = modules["encoder", 1].query
    handle = query.register_forward_hook(lambda module, inputs, output: projections.append(output))
    before = dict(AttentionInterface._global_mapping)
    ids = torch.tensor([[3, 4, 5]])
    with recording({("encoder", 1): modules["encoder", 1]}) as seen:
        logits = model(input_ids=ids).logits
    handle.remove()
    assert list(seen) == [("encoder", 1)]
    assert torch.equal(seen["encoder", 1].query.transpose(1, 2).flatten(2), projections[0])
    seen.clear()
    assert torch.equal(model(input_ids=ids).logits, logits) and not seen
    assert AttentionInterface._global_mapping == before


@pytest.mark.parametrize("case", CASES)
def test_every_task_learns_from_attentions(case, tmp_path):
    """The loss falls, and a copy of the teacher has nothing to learn."""
    _, teacher = make_pair(case)
    copied = make_trainer(case, tmp_path, pair=(copy.deepcopy(teacher), teacher), losses=BOTH)
    metrics = copied.evaluate()
    assert metrics["eval_loss_attention"] == pytest.approx(0, abs=1e-9)
    assert metrics["eval_loss_relation"] == pytest.approx(0, abs=1e-9)
    trainer = make_trainer(case, tmp_path, losses=BOTH, max_steps=3, learning_rate=0.02)
    before, start = trainer.evaluate(), weights(trainer.model)
    trainer.train()
    after = trainer.evaluate()
    assert not torch.equal(weights(trainer.model), start)
    assert 0 < after["eval_loss"] < before["eval_loss"]


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer("llama", tmp_path, losses=BOTH, gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(weights(trainer.model))
    assert torch.allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("losses", [{"relation": 1.0}, {"attention": 1.0}, {"attention_output": 1.0, "ce": 1.0}])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_gradients_of_what_looks_into_attentions(losses, reentrant, tmp_path):
    trained = []
    for checkpointing in (False, True):
        more = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        trainer = make_trainer(
            "bert", tmp_path, losses=losses, max_steps=1, gradient_checkpointing=checkpointing, **more
        )
        before = weights(trainer.model)
        trainer.train()
        trained.append(weights(trainer.model))
        assert not torch.equal(before, trained[-1])
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-9, atol=1e-12)


def test_a_student_that_checkpoints_reentrantly_by_itself_is_refused(tmp_path):
    student, teacher = make_pair("bert")
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher), losses={"relation": 1.0}, max_steps=1)
    with pytest.raises(ConfigError, match="Reentrant gradient checkpointing"):
        trainer.train()
