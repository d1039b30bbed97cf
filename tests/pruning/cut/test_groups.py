"""What one layer of each family holds and costs, counted by hand and by torch's flop counter."""

import pytest
import torch

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import Slice, expand
from hf_efficient.pruning.price.costs import total_cost, unit_cost

from ..tiny import CASES, HEADS, HIDDEN, NEURONS, WIDTH, make, measured_macs, vit

LENGTH = 16
ROW = HIDDEN * WIDTH  # weights of one head in one projection

# case -> (stack, kind) -> (layers of each group, units, parameters of a unit, MACs of a unit for one token)
BY_HAND = {
    "bert": {
        ("encoder", "heads"): (1, HEADS, 4 * ROW + 3 * WIDTH, 4 * ROW + 2 * LENGTH * WIDTH),
        ("encoder", "neurons"): (1, NEURONS, 2 * HIDDEN + 1, 2 * HIDDEN),
    },
    "vit": {
        ("encoder", "heads"): (1, HEADS, 4 * ROW + 3 * WIDTH, 4 * ROW + 2 * LENGTH * WIDTH),
        ("encoder", "neurons"): (1, NEURONS, 2 * HIDDEN + 1, 2 * HIDDEN),
    },
    "llama": {  # a unit: 1 key, 1 value, 2 query heads and the columns that read them
        ("decoder", "heads"): (1, 2, 6 * ROW, 6 * ROW + 2 * 2 * LENGTH * WIDTH),
        ("decoder", "neurons"): (1, NEURONS, 3 * HIDDEN, 3 * HIDDEN),
    },
    "gpt2": {
        ("decoder", "heads"): (1, HEADS, 4 * ROW + 3 * WIDTH, 4 * ROW + 2 * LENGTH * WIDTH),
        ("decoder", "neurons"): (1, NEURONS, 2 * HIDDEN + 1, 2 * HIDDEN),
    },
    "t5": {  # coupled over all layers of the stack; 8 buckets of position bias in the first self-attention
        ("encoder", "heads"): (3, HEADS, 3 * 4 * ROW + 8, 3 * (4 * ROW + 2 * LENGTH * WIDTH)),
        ("encoder", "neurons"): (1, NEURONS, 2 * HIDDEN, 2 * HIDDEN),
        ("decoder", "heads"): (2, HEADS, 2 * 4 * ROW + 8, 2 * (4 * ROW + 2 * LENGTH * WIDTH)),
        ("decoder", "cross_heads"): (2, HEADS, 2 * 4 * ROW, 2 * (4 * ROW + 2 * LENGTH * WIDTH)),
        ("decoder", "neurons"): (1, NEURONS, 2 * HIDDEN, 2 * HIDDEN),
    },
}
BY_HAND["gated-t5"] = BY_HAND["t5"] | {
    ("encoder", "neurons"): (1, NEURONS, 3 * HIDDEN, 3 * HIDDEN),
    ("decoder", "neurons"): (1, NEURONS, 3 * HIDDEN, 3 * HIDDEN),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_by_hand(case):
    anatomy = Anatomy.of(make(case))
    found = {}
    for group in anatomy.groups:
        parameters, macs = (unit_cost(anatomy, group, metric, LENGTH) for metric in ("parameters", "macs"))
        assert macs % LENGTH == 0
        found.setdefault((group.stack, group.kind), set()).add(
            (len(group.layers), group.units, parameters, macs // LENGTH)
        )
    assert found == {key: {value} for key, value in BY_HAND[case].items()}
    for stack in anatomy.stacks:
        for kind in {group.kind for group in anatomy.groups if group.stack == stack.name}:
            covered = [i for g in anatomy.groups if (g.stack, g.kind) == (stack.name, kind) for i in g.layers]
            assert covered == list(range(len(stack.layers)))


@pytest.mark.parametrize("case", CASES)
def test_dense_macs_are_what_the_flop_counter_sees(case):
    """A linear per token, scores and weighted sum per pair of tokens: exactly what runs."""
    ids = torch.randint(3, 40, (1, LENGTH))
    if case == "vit":
        model, inputs, length = vit(image_size=16), {"pixel_values": torch.randn(1, 3, 16, 16)}, 17
    else:
        model, inputs, length = make(case), {"input_ids": ids}, LENGTH
    if case.endswith("t5"):
        inputs["decoder_input_ids"] = ids
    assert total_cost(model, "macs", length) == measured_macs(model.eval(), inputs)


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_all_layers(case):
    model = make(case)
    by_hand = sum(p.numel() for stack in Anatomy.of(model).stacks for p in stack.layers.parameters())
    assert total_cost(model, "parameters", LENGTH) == by_hand


@pytest.mark.parametrize(
    ("case", "attention", "seen"),
    [
        ("bert", AttentionConfig("local", window=2, global_tokens=1), 2 * 2 + 1 + 1),
        ("bert", AttentionConfig("local", window=2), 2 * 2 + 1),
        ("bert", AttentionConfig("local", window=100), LENGTH),
        ("vit", AttentionConfig("local", window=2, global_tokens=1), 2 * 2 + 1 + 1),
        ("llama", AttentionConfig("local", window=3, global_tokens=1), 3 + 1),  # causal: the window looks back
        ("bert", AttentionConfig("linear"), WIDTH + 1),
        ("vit", AttentionConfig("linear"), WIDTH + 1),
        ("llama", AttentionConfig("linear"), WIDTH + 1),
    ],
)
def test_cost_of_efficient_attention(case, attention, seen):
    """Every query of a head costs 2 x width for each key that it sees, or for each of width + 1 state columns."""
    dense = make(case)
    model = convert_attention(dense, attention)
    anatomy, before = Anatomy.of(model), Anatomy.of(dense)
    heads = [(g, o) for g, o in zip(anatomy.groups, before.groups, strict=True) if g.kind == "heads"]
    per_unit = HEADS // heads[0][0].units
    for group, other in heads:
        saved = unit_cost(before, other, "macs", LENGTH) - unit_cost(anatomy, group, "macs", LENGTH)
        assert saved == LENGTH * 2 * WIDTH * per_unit * (LENGTH - seen)
        assert unit_cost(before, other, "parameters", LENGTH) == unit_cost(anatomy, group, "parameters", LENGTH)


def test_t5_decoder_sees_back_and_encoder_sees_both_sides():
    t5 = Anatomy.of(convert_attention(make("t5"), AttentionConfig("local", window=2, global_tokens=0)))
    cost = {(g.stack, g.kind): unit_cost(t5, g, "macs", LENGTH) // LENGTH for g in t5.groups}
    assert cost["encoder", "heads"] == 3 * (4 * ROW + 2 * 5 * WIDTH)
    assert cost["decoder", "heads"] == 2 * (4 * ROW + 2 * 2 * WIDTH)
    assert cost["decoder", "cross_heads"] == 2 * (4 * ROW + 2 * LENGTH * WIDTH)  # cross attention stays full


def test_rows_of_a_fused_linear():
    """Two parts of 3 units of width 2 along dimension 1: unit u has columns 2u, 2u + 1 of each part."""
    part, weight = Slice("c_attn.weight", dim=1, widths=(2, 2)), torch.arange(24.0).reshape(2, 12)
    assert part.count(weight) == 3
    assert part.rows(torch.tensor([0, 2]), weight).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    by_unit = part.by_unit(weight)
    for unit in range(3):
        rows = part.rows(torch.tensor([unit]), weight)
        assert sorted(by_unit[unit].tolist()) == sorted(weight.index_select(1, rows).flatten().tolist())


def test_expand():
    assert expand(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert expand(torch.tensor([1, 3]), 1).tolist() == [1, 3]
