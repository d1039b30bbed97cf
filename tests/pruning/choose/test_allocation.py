"""The budget is met, nothing more than a step over it, and the cheapest score leaves first."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient import ConfigError
from hf_efficient.models.groups import Group
from hf_efficient.pruning.choose.allocation import allocate_global, allocate_uniform, choose_layers

from ...helpers import random_examples

LAYERS = 3


def group(kind: str, layer: int, units: int) -> Group:
    return Group("encoder", kind, (layer,), units, ())


@st.composite
def networks(draw, uniform: bool = False, layers: int = LAYERS):
    """Scores with many ties, whole costs, and a budget that is within reach."""
    round_to = draw(st.sampled_from([1, 2, 4]))
    same = {"heads": draw(st.integers(1, 4)), "neurons": draw(st.integers(4, 9))}
    scores, costs, removable = {}, {}, 0
    for layer in range(layers):
        for kind, low, high in (("heads", 1, 4), ("neurons", 4, 9)):
            units = same[kind] if uniform else draw(st.integers(low, high))
            values = draw(st.lists(st.integers(0, 5), min_size=units, max_size=units))
            one = group(kind, layer, units)
            scores[one] = torch.tensor(values, dtype=torch.float) / 10
            costs[one] = draw(st.integers(1, 20)) if layer == 0 or not uniform else costs[group(kind, 0, units)]
            removable += (units - (1 if kind == "heads" else round_to)) * costs[one]
    return scores, costs, draw(st.floats(0, removable)), round_to


def price(costs):
    """The same for every unit."""
    return lambda group, units: costs[group] * units


def freed(scores, costs, kept) -> int:
    return sum((g.units - len(kept[g])) * costs[g] for g in scores)


def check_kept(scores, kept, round_to: int) -> None:
    assert set(kept) == set(scores)
    for one, units in kept.items():
        assert list(units) == sorted(set(units))
        assert units and units[0] >= 0 and units[-1] < one.units
        if one.kind == "neurons" and len(units) < one.units:
            assert len(units) % round_to == 0
        gone = [u for u in range(one.units) if u not in units]
        assert not gone or scores[one][gone].max() <= scores[one][list(units)].min()


@random_examples(150)
@given(networks())
def test_global_meets_the_budget_by_the_lowest_price(network):
    scores, costs, remove, round_to = network
    kept = allocate_global(scores, price(costs), remove, round_to)
    check_kept(scores, kept, round_to)
    total = freed(scores, costs, kept)
    assert total >= remove - 0.5
    prices = []  # of the last chunk that left each group
    for one, units in kept.items():
        if len(units) == one.units:
            continue
        step = round_to if one.kind == "neurons" else 1
        bigger = min(one.units, len(units) + step)
        chunk = scores[one].sort().values[one.units - bigger : one.units - len(units)]
        prices.append((float(chunk.mean()) / costs[one], (bigger - len(units)) * costs[one]))
    if prices:
        assert total - max(prices)[1] < remove or any(total - size < remove for _, size in prices)
    for one, units in kept.items():  # what could leave next is not cheaper than anything that left
        step = round_to if one.kind == "neurons" else 1
        smaller = (len(units) - 1) // step * step
        if smaller:
            chunk = scores[one].sort().values[one.units - len(units) : one.units - smaller]
            assert all(float(chunk.mean()) / costs[one] >= price - 1e-6 for price, _ in prices)


@random_examples(100)
@given(networks(), st.floats(0, 1))
def test_global_removes_more_of_the_same_for_a_larger_budget(network, share):
    scores, costs, remove, round_to = network
    more = allocate_global(scores, price(costs), remove, round_to)
    less = allocate_global(scores, price(costs), remove * share, round_to)
    assert all(set(more[one]) <= set(less[one]) for one in scores)


def test_global_by_hand():
    """Prices per MAC: heads 0.2, 0.4; neurons in pairs 0.1, 0.3. A budget of 10 takes the pair, then a head."""
    heads, neurons = group("heads", 0, 2), group("neurons", 0, 4)
    scores = {heads: torch.tensor([4.0, 2.0]), neurons: torch.tensor([0.5, 1.5, 0.5, 1.5])}
    costs = {heads: 10, neurons: 5}
    assert allocate_global(scores, price(costs), 10, 2) == {heads: (0, 1), neurons: (1, 3)}
    assert allocate_global(scores, price(costs), 11, 2) == {heads: (0,), neurons: (1, 3)}
    with pytest.raises(ConfigError, match="cannot be reached"):
        allocate_global(scores, price(costs), 21, 2)


def test_equal_scores_never_shrink_a_group_out_of_order():
    """In float32 the mean of 11 and of 8 times the same number may differ in the last bit."""
    neurons = [group("neurons", layer, 43) for layer in range(20)]
    torch.manual_seed(0)
    scores = {one: torch.rand(()).expand(43).clone() for one in neurons}
    for remove in range(0, 20 * 35, 7):
        kept = allocate_global(scores, price(dict.fromkeys(neurons, 1)), remove, 8)
        assert remove <= sum(43 - len(units) for units in kept.values()) <= remove + 8


def brute_force_uniform(scores, costs, remove, round_to):
    """The best total score among all pairs of counts; None if no pair meets the budget."""
    counts = {}
    for kind, step in (("heads", 1), ("neurons", round_to)):
        units = next(one.units for one in scores if one.kind == kind)
        counts[kind] = [n for n in range(1, units + 1) if n == units or n % step == 0]
    best = None
    for heads, neurons in product(counts["heads"], counts["neurons"]):
        kept = {one: heads if one.kind == "heads" else neurons for one in scores}
        if sum((one.units - kept[one]) * costs[one] for one in scores) > remove - 0.5:
            gain = sum(float(scores[one].sort(descending=True).values[: kept[one]].sum()) for one in scores)
            best = gain if best is None else max(best, gain)
    return best


@random_examples(150)
@given(networks(uniform=True))
def test_uniform_finds_what_brute_force_finds(network):
    scores, costs, remove, round_to = network
    expected = brute_force_uniform(scores, costs, remove, round_to)
    kept = allocate_uniform(scores, price(costs), remove, round_to)
    check_kept(scores, kept, round_to)
    assert freed(scores, costs, kept) >= remove - 0.5
    assert len({len(units) for one, units in kept.items() if one.kind == "heads"}) == 1
    assert len({len(units) for one, units in kept.items() if one.kind == "neurons"}) == 1
    assert sum(float(scores[one][list(units)].sum()) for one, units in kept.items()) == pytest.approx(expected)


def test_uniform_head_counts_divide():
    heads = [group("heads", layer, 6) for layer in range(2)]
    scores = {one: torch.arange(6.0) for one in heads}
    free = allocate_uniform(scores, price(dict.fromkeys(heads, 1)), 2, 8)
    divided = allocate_uniform(scores, price(dict.fromkeys(heads, 1)), 2, 8, heads_divide=24)
    assert [len(units) for units in free.values()] == [5, 5]
    assert [len(units) for units in divided.values()] == [4, 4]


@pytest.mark.parametrize(("round_to", "count"), [(8, 16), (3, 15)])
def test_uniform_over_unequal_groups(round_to, count):
    """The smallest group may stay whole only if its count suits the others too."""
    small, large = group("neurons", 0, 16), group("neurons", 1, 24)
    scores = {small: torch.rand(16), large: torch.rand(24)}
    kept = allocate_uniform(scores, price({small: 1, large: 1}), 4, round_to)
    assert [len(units) for units in kept.values()] == [count, count]


def test_uniform_with_worthless_scores_still_chooses():
    """Units that the callback has removed already have no score at all."""
    one = group("neurons", 0, 8)
    scores = {one: torch.tensor([-torch.inf] * 4 + [0.0] * 4)}
    assert allocate_uniform(scores, price({one: 1}), 2, 2) == {one: (4, 5, 6, 7)}


def layer_numbers(values):
    return {("encoder", index): float(value) for index, value in enumerate(values)}


def test_layers_leave_by_price():
    scores, costs = layer_numbers([3, 1, 2, 5]), layer_numbers([1, 1, 1, 1])
    assert choose_layers(scores, costs, 2, exact=True) == {"encoder": (0, 3)}
    assert choose_layers(scores, costs, 1.7, exact=True) == {"encoder": (0, 3)}
    assert choose_layers(scores, costs, 1.2, exact=False) == {"encoder": (0, 2, 3)}
    heavy = layer_numbers([30, 1, 1, 1])  # the same score for ten times the cost leaves first
    assert choose_layers(scores, heavy, 3, exact=True) == {"encoder": (1, 2, 3)}
    with pytest.raises(ConfigError, match="one layer"):
        choose_layers(scores, costs, 3.9, exact=True)


@random_examples(100)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_no_stack_outgrows_the_deepest(encoder, decoder, share):
    scores = {("encoder", i): float(v) for i, v in enumerate(encoder)}
    scores |= {("decoder", i): float(v) for i, v in enumerate(decoder)}
    costs = dict.fromkeys(scores, 1.0)
    kept = choose_layers(scores, costs, share * len(scores), exact=False, deepest="encoder")
    assert kept["encoder"] and kept["decoder"]
    untouched = len(kept["encoder"]) == len(encoder)  # a decoder that was deeper already
    assert len(kept["decoder"]) <= len(kept["encoder"]) or untouched
