"""Which layers leave first: planted idle ones; greedy loss against trying all; block influence against its formula."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hf_efficient import ConfigError, DataError, PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.score.calibration import answer_of
from hf_efficient.pruning.score.layers import block_influence, loss
from tests.families import CASES, make_inputs, make_model

from ..tiny import batches, depths, make


@torch.no_grad()
def make_idle(model, index: int) -> None:
    """A layer whose attention and FFN write nothing: in a pre-norm network it hands on what it gets."""
    for stack in Anatomy.of(model).stacks:
        for module in stack.layers[index].modules():
            for name in ("o_proj", "down_proj", "o", "wo", "fc2"):
                part = getattr(module, name, None)
                if part is not None:
                    part.weight.zero_()
                    if part.bias is not None:
                        part.bias.zero_()


@pytest.mark.parametrize("score", [loss, block_influence])
@pytest.mark.parametrize(("case", "idle"), [("llama", 0), ("llama", 1), ("vit", 2), ("t5", 1)])
def test_an_idle_layer_is_the_first_to_leave(case, idle, score):
    model = make(case)
    make_idle(model, idle)
    scores = score(Anatomy.of(model), batches(case))
    for stack in Anatomy.of(model).stacks:
        own = {layer: value for (name, layer), value in scores.items() if name == stack.name}
        assert min(own, key=own.__getitem__) == idle and len(own) == len(stack.layers)


@pytest.mark.parametrize("case", ["llama", "vit"])
def test_the_first_to_leave_is_the_one_without_which_the_answer_changes_least(case):
    """Against surgery: each layer really removed, the KL divergence written out."""
    model, data = make(case), batches(case)
    [stack] = Anatomy.of(model).stacks
    changes = {}
    with torch.no_grad():
        for gone in range(len(stack.layers)):
            kept = tuple(i for i in range(len(stack.layers)) if i != gone)
            small = apply_plan(Anatomy.of(model), PruningPlan(layers={stack.name: kept}))
            changes[gone] = 0.0
            for batch in data:
                p, q = answer_of(model, batch).log_softmax(-1), answer_of(small, batch).log_softmax(-1)
                apart = (p.exp() * (p - q)).sum(-1)
                if apart.ndim == 2:
                    mask = batch["attention_mask"]
                    apart = (apart * mask).sum() / mask.sum() * len(apart)
                changes[gone] += float(apart.sum())
    order = {layer: rank for (_, layer), rank in loss(Anatomy.of(model), data).items()}
    assert sorted(order.values()) == list(range(len(stack.layers)))
    assert min(order, key=order.get) == min(changes, key=changes.get)


def test_block_influence_is_its_formula():
    model, (batch, *_) = make("bert"), batches("bert")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    for layer, (before, after) in enumerate(pairwise(states)):
        expected = 1 - F.cosine_similarity(before[mask], after[mask], dim=-1).mean()
        assert block_influence(Anatomy.of(model), [batch])["encoder", layer] == pytest.approx(
            float(expected), abs=1e-5
        )


@pytest.mark.cover
@pytest.mark.parametrize("importance", ["loss", "block_influence", "fisher", "activation", "random"])
@pytest.mark.parametrize("name", CASES)
def test_every_family_loses_layers_by_every_importance(name, importance):
    dense, inputs = make_model(name), [make_inputs(name) for _ in range(6)]
    settings = PruningConfig(ratio=0.3, granularity="layer", importance=importance, reconstruct=False)
    small = prune(dense, settings, inputs)
    assert sum(depths(small).values()) < sum(depths(dense).values())
    assert min(depths(small).values()) >= 1


def test_importances_of_layers_and_of_what_is_in_them():
    alone, both = PruningConfig(granularity="layer"), PruningConfig(granularity=("layer", "head"))
    assert (alone.importance, alone.layer_importance) == ("loss", "loss")
    assert (both.importance, both.layer_importance) == ("fisher", "loss")
    assert PruningConfig(granularity="layer", importance="random").layer_importance == "random"
    with pytest.raises(ConfigError, match="layer_importance='loss'"):
        PruningConfig(importance="loss")
    with pytest.raises(DataError, match="'loss' needs calibration"):
        prune(make("bert"), PruningConfig(granularity="layer"))
