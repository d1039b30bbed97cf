"""Removing units gives the function of the dense model with those units cut; removing layers that of a stock model."""

import copy

import pytest
import torch

from hf_efficient import AttentionConfig, convert_attention, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.methods import UNIT_KINDS as KINDS
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.pruning.score.calibration import average_length
from tests.helpers import assert_close

from ..tiny import CASES, batch, batches, config, depths, kept_parts, logits, make, sizes, zero_units

# What to remove and how much of it: heads alone are less than half of a layer.
GRANULARITIES = {"head": ("head", 0.15), "neuron": ("neuron", 0.25), "both": (("head", "neuron"), 0.5)}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.cover
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CASES)
def test_surgery_equals_masking(case, granularity, allocation, dtype):
    dense, inputs = make(case).to(dtype), batch(case)
    removed, ratio = GRANULARITIES[granularity]
    settings = config(ratio=ratio, granularity=removed, allocation=allocation, importance="random")
    small = prune(dense, settings, batches(case))
    masked = copy.deepcopy(dense)
    zero_units(masked, kept_parts(dense, small))
    expected = logits(masked, inputs)
    assert small.dtype == dtype
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert (logits(dense, inputs) - expected).abs().max() > 0.01  # the cut units did something
    assert_close(logits(small, inputs), expected, TOLERANCE[dtype], f"{case} {granularity} {allocation}")


@pytest.mark.parametrize("case", CASES)
def test_unequal_layers_keep_exactly_what_the_plan_says(case):
    """Another set of units in every group, chosen here and not by a score."""
    dense, inputs = make(case).double(), batch(case)
    plan = {g: tuple(range(i % 2, g.units, 2 + i % 3)) for i, g in enumerate(Anatomy.of(dense).groups)}
    small = apply_plan(Anatomy.of(dense), PruningPlan(units={group.name: kept for group, kept in plan.items()}))
    assert kept_parts(dense, small) == plan
    masked = copy.deepcopy(dense)
    zero_units(masked, plan)
    assert_close(logits(small, inputs), logits(masked, inputs), 1e-10)
    shifted = {group: tuple((unit + 1) % group.units for unit in units) for group, units in plan.items()}
    zero_units(masked := copy.deepcopy(dense), shifted)
    assert (logits(small, inputs) - logits(masked, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_the_original_stays_as_it_is(case):
    dense = make(case)
    dense(**batch(case))  # a stock forward notes the kind of labels in its config
    before, settings = {k: v.clone() for k, v in dense.state_dict().items()}, dense.config.to_dict()
    parameter = next(dense.parameters())
    parameter.grad = torch.ones_like(parameter)
    dense.train()
    small = prune(dense, config(ratio=0.4, importance="taylor"), batches(case))
    assert dense.training and small.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert dense.config.to_dict() == settings
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    with torch.no_grad():
        for weight in small.parameters():
            weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def keep_by_hand(model, kept: dict[str, tuple[int, ...]]):
    """A stock model whose ModuleLists are edited in place."""
    edited = copy.deepcopy(model)
    for stack in Anatomy.of(edited).stacks:
        chosen = torch.nn.ModuleList([stack.layers[i] for i in kept[stack.name]])
        for index, layer in enumerate(chosen):
            for module in (module for module in layer.modules() if "layer_idx" in vars(module)):
                module.layer_idx = index  # its place in the cache
        owner, _, name = stack.entry.layers.rpartition(".")
        setattr(edited.base_model.get_submodule(owner), name, chosen)
        setattr(edited.config, stack.entry.num_layers, len(chosen))
    return edited


LAYER_PLANS = {
    "bert": {"encoder": (0, 2)},
    "vit": {"encoder": (1, 2)},
    "llama": {"decoder": (2,)},
    "gpt2": {"decoder": (0, 2)},
    "t5": {"encoder": (0, 2), "decoder": (0,)},
    "gated-t5": {"encoder": (0, 1), "decoder": (0, 1)},
}


@pytest.mark.parametrize("case", CASES)
def test_dropped_layers_equal_an_edited_stock_model(case):
    dense, inputs, kept = make(case), batch(case), LAYER_PLANS[case]
    small = apply_plan(Anatomy.of(dense), PruningPlan(layers=kept))
    expected = logits(keep_by_hand(dense, kept), inputs)
    assert type(small) is type(dense)
    assert depths(small) == {name: len(layers) for name, layers in kept.items()}
    assert torch.equal(logits(small, inputs), expected)
    assert (logits(dense, inputs) - expected).abs().max() > 0.01


@pytest.mark.parametrize("case", ["t5", "gated-t5"])
def test_t5_without_block_0_keeps_the_shared_bias(case):
    dense, inputs = make(case), batch(case)
    small = apply_plan(Anatomy.of(dense), PruningPlan(layers={"encoder": (1, 2), "decoder": (1,)}))
    edited = keep_by_hand(dense, {"encoder": (1, 2), "decoder": (1,)})
    for stack in ("encoder", "decoder"):
        bias = getattr(dense, stack).block[0].layer[0].SelfAttention.relative_attention_bias
        first = getattr(edited, stack).block[0].layer[0].SelfAttention
        first.has_relative_attention_bias, first.relative_attention_bias = True, bias
        ours = getattr(small, stack).block[0].layer[0].SelfAttention.relative_attention_bias
        assert torch.equal(ours.weight, bias.weight)
    assert torch.equal(logits(small, inputs), logits(edited, inputs))
    with torch.no_grad():
        small.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    assert (logits(small, inputs) - logits(edited, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
@pytest.mark.parametrize(("encoder", "decoder"), [(3, 3), (2, 3), (4, 2)])
def test_t5_decoder_is_never_made_deeper_than_the_encoder(encoder, decoder, ratio):
    """`generate` sizes its cache by the encoder. A decoder that is deeper already only loses layers."""
    dense = make("t5", encoder, decoder)
    for stack in ("encoder", "decoder"):  # both ways: the favourite to leave is the one or the other stack
        for parameter in getattr(dense, stack).block.parameters():
            parameter.data.mul_(0.1)
        small = prune(dense, config(ratio=ratio, granularity="layer"))
        found = depths(small)
        assert found["encoder"] + found["decoder"] < encoder + decoder
        assert found["decoder"] <= found["encoder"] or found == {"encoder": encoder, "decoder": found["decoder"]}
        if found["decoder"] <= found["encoder"]:
            generated = small.generate(**{k: v for k, v in batch("t5").items() if k != "labels"}, max_new_tokens=3)
            assert generated.shape[0] == 3


@pytest.mark.parametrize("granularity", [("layer", "neuron"), ("layer", "head"), ("layer", "head", "neuron")])
@pytest.mark.parametrize("case", CASES)
def test_layers_and_units_together(case, granularity):
    dense = make(case, 7, 7) if case.endswith("t5") else make(case, 7)
    small = prune(dense, config(ratio=0.3, granularity=granularity), batches(case))
    length = average_length(batches(case), dense)
    assert 0.6 < total_cost(small, "macs", length) / total_cost(dense, "macs", length) <= 0.7
    assert sum(depths(small).values()) < sum(depths(dense).values())
    for kind, names in KINDS.items():
        narrower = any(
            units < sizes(dense)[key[0], key[1], 0] for key, units in sizes(small).items() if key[1] in names
        )
        assert narrower == (kind in granularity) or len(granularity) == 3
    assert logits(small, batch(case)).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_attention_configs_follow_their_layer(case):
    """Three windows, of which the middle layer leaves: the pruned model has the function of windows 1 and 9."""
    dense = make(case)
    one, two = (AttentionConfig("local", window=size, global_tokens=0) for size in (1, 2))
    windows = {0: one, 1: two, 2: AttentionConfig()}
    stacks = [stack.name for stack in Anatomy.of(dense).stacks]
    chosen = {index: windows[index] for index in windows if index < min(depths(dense).values())}
    converted = convert_attention(dense, chosen)
    kept = {name: tuple(i for i in range(depths(dense)[name]) if i != 1) for name in stacks}
    small = apply_plan(Anatomy.of(converted), PruningPlan(layers=kept))
    entries = small.config.efficient["stacks"]
    for name in stacks:
        expected = [chosen.get(i, AttentionConfig()).to_dict() for i in kept[name]]
        assert entries[name]["attention"] == expected
    by_hand = convert_attention(apply_plan(Anatomy.of(dense), PruningPlan(layers=kept)), {0: windows[0]})
    assert torch.equal(logits(small, batch(case)), logits(by_hand, batch(case)))
    wrong = convert_attention(apply_plan(Anatomy.of(dense), PruningPlan(layers=kept)), {0: two})
    assert not torch.equal(logits(small, batch(case)), logits(wrong, batch(case)))


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_kept_layers_compose(case):
    dense = make(case, 4, 4) if case == "t5" else make(case, 4)
    stacks = list(depths(dense))
    once = apply_plan(Anatomy.of(dense), PruningPlan(layers=dict.fromkeys(stacks, (0, 2, 3))))
    narrow = prune(once, config(ratio=0.3))
    twice = apply_plan(Anatomy.of(narrow), PruningPlan(layers=dict.fromkeys(stacks, (1, 2))))
    assert once.config.efficient["kept_layers"] == {name: [0, 2, 3] for name in stacks}
    assert twice.config.efficient["kept_layers"] == {name: [2, 3] for name in stacks}


@pytest.mark.parametrize("kind", ["local", "linear"])
@pytest.mark.parametrize("case", ["bert", "vit", "llama", "gpt2"])
def test_converted_then_pruned_twice(case, kind):
    """The attention stays converted, and pruning a pruned model cuts what is left of it."""
    settings = AttentionConfig("local", window=2) if kind == "local" else AttentionConfig("linear")
    converted, inputs = convert_attention(make(case).double(), settings), batch(case)
    once = prune(converted, config(ratio=0.3, importance="taylor"), batches(case))
    twice = prune(once, config(ratio=0.3, importance="random"), batches(case))
    for before, after in ((converted, once), (once, twice)):
        masked = copy.deepcopy(before)
        zero_units(masked, kept_parts(before, after))
        assert_close(logits(after, inputs), logits(masked, inputs), 1e-10)
        assert (logits(before, inputs) - logits(masked, inputs)).abs().max() > 1e-3
        assert all(entry["attention"][0]["kind"] == kind for entry in after.config.efficient["stacks"].values())
