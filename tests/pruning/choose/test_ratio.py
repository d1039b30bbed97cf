"""The ratio is reached, and not passed by more than the last step; nothing is emptied."""

from itertools import pairwise

import pytest

from hf_efficient import ConfigError, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.price.costs import layer_costs, total_cost, unit_cost
from hf_efficient.pruning.score.calibration import DEFAULT_LENGTH, average_length

from ..tiny import CASES, NEURONS, batches, config, depths, make, sizes

ROUND_TO = 8


def removed(dense, small, metric: str, length: int) -> int:
    return total_cost(dense, metric, length) - total_cost(small, metric, length)


@pytest.mark.cover
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("metric", ["macs", "parameters"])
@pytest.mark.parametrize("case", CASES)
def test_global_reaches_the_ratio_and_passes_it_by_one_step_at_most(case, metric, steps):
    dense, length = make(case), average_length(batches(case), make(case))
    for ratio in (0.1, 0.35, 0.6):
        settings = config(ratio=ratio, metric=metric, steps=steps, round_to=ROUND_TO, importance="random")
        small = prune(dense, settings, batches(case))
        gone, wanted = removed(dense, small, metric, length), ratio * total_cost(dense, metric, length)
        largest = max(
            unit_cost(Anatomy.of(dense), group, metric, length) * (ROUND_TO if group.kind == "neurons" else 1)
            for group in Anatomy.of(dense).groups
        )
        assert wanted - 1 <= gone < wanted + largest
        check_sizes(small)


@pytest.mark.cover
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("metric", ["macs", "parameters"])
@pytest.mark.parametrize("case", CASES)
def test_uniform_reaches_the_ratio_and_passes_it_by_one_step_at_most(case, metric, steps):
    """A step takes a chunk from every FFN, or a head from every attention."""
    dense, length = make(case), average_length(batches(case), make(case))
    for ratio in (0.1, 0.35, 0.6):
        settings = config(ratio=ratio, metric=metric, steps=steps, allocation="uniform", round_to=ROUND_TO)
        small = prune(dense, settings, batches(case))
        gone, wanted = removed(dense, small, metric, length), ratio * total_cost(dense, metric, length)
        groups = Anatomy.of(dense).groups
        chunk = sum(unit_cost(Anatomy.of(dense), g, metric, length) * ROUND_TO for g in groups if g.kind == "neurons")
        head = sum(unit_cost(Anatomy.of(dense), g, metric, length) for g in groups if g.kind != "neurons")
        assert wanted - 1 <= gone < wanted + max(chunk, head)
        check_sizes(small)
        assert len({units for (_, kind, _), units in sizes(small).items() if kind == "neurons"}) == 1
        assert len({units for (_, kind, _), units in sizes(small).items() if kind != "neurons"}) == 1


def check_sizes(model) -> None:
    for (_, kind, _), units in sizes(model).items():
        assert units >= (ROUND_TO if kind == "neurons" else 1)
        assert kind != "neurons" or units % ROUND_TO == 0


@pytest.mark.parametrize("round_to", [1, 5, 16])
def test_round_to_is_respected(round_to):
    """48 neurons are no multiple of 5: a layer that nobody cuts may keep them."""
    small = prune(make("bert"), config(ratio=0.4, round_to=round_to, importance="random"))
    neurons = [units for (_, kind, _), units in sizes(small).items() if kind == "neurons"]
    assert all(units % round_to == 0 or units == NEURONS for units in neurons)
    assert min(neurons) < NEURONS and min(neurons) >= round_to
    assert round_to != 1 or any(units % 8 for units in neurons)


@pytest.mark.parametrize("case", CASES)
def test_layers_alone_reach_the_ratio(case):
    dense = make(case)
    for ratio in (0.2, 0.4):
        small = prune(dense, config(ratio=ratio, granularity="layer", importance="random"))
        costs = layer_costs(Anatomy.of(dense), "macs", DEFAULT_LENGTH)
        gone, wanted = removed(dense, small, "macs", DEFAULT_LENGTH), ratio * sum(costs.values())
        assert wanted - 1 <= gone < wanted + max(costs.values())
        assert min(depths(small).values()) >= 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allocation": "uniform"},
        {"granularity": "layer"},
        {"granularity": ("layer", "head", "neuron")},
        {"granularity": "head", "ratio": 0.7},
        {"granularity": "neuron", "ratio": 0.7, "allocation": "uniform"},
        {"steps": 3},
        {"round_to": 64, "granularity": "neuron", "ratio": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["bert", "llama", "t5"])
def test_an_impossible_ratio(case, settings):
    with pytest.raises(ConfigError, match=r"cannot be reached.* At most .* Lower `ratio`"):
        prune(make(case), config(**({"ratio": 0.999} | settings)))


@pytest.mark.cover
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("case", CASES)
def test_a_larger_ratio_never_keeps_more(case, allocation):
    dense, length = make(case), average_length(batches(case), make(case))
    costs, widths = [], []
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        small = prune(dense, config(ratio=ratio, allocation=allocation), batches(case))
        costs.append(total_cost(small, "macs", length))
        widths.append(sizes(small))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    if allocation == "global":  # and each group only shrinks
        for larger, smaller in pairwise(widths):
            assert all(smaller[key] <= larger[key] for key in larger)


def test_steps_score_again():
    """Three steps are not one: what is important changes when other units have left."""
    dense = make("bert")
    once, thrice = (
        prune(dense, config(ratio=0.6, steps=steps, importance="taylor"), batches("bert")) for steps in (1, 3)
    )
    assert any(
        value.shape != other.shape or not value.equal(other)
        for value, other in zip(once.state_dict().values(), thrice.state_dict().values(), strict=True)
    )


def test_macs_are_counted_at_the_length_of_the_calibration():
    """Attention is a larger part of long sequences, so fewer heads are the same share of them."""
    dense = make("bert")
    short, long = ([{"input_ids": batches("bert")[0]["input_ids"].repeat(1, n)[:, :30]}] for n in (1, 4))
    assert (average_length(short, dense), average_length(long, dense)) == (9, 30)
    heads = {"granularity": "head", "ratio": 0.26}
    kept = [sum(sizes(prune(dense, config(**heads), data)).values()) for data in (short, long)]
    assert kept[1] == kept[0] + 1


def test_average_length():
    assert average_length(batches("bert"), make("bert")) == (9 + 7 + 5) // 3
    assert average_length([{"input_ids": batches("bert")[0]["input_ids"]}], make("bert")) == 9
    assert average_length([], make("bert")) == DEFAULT_LENGTH
    assert average_length([], make("vit")) == 2 * 2 + 1
