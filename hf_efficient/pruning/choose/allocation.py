"""From scores and a budget to a plan.

`remove` is always an amount of the metric to take away from the dense model; units that are gone already have a score
of -inf, and leave first. A greedy pass over score per cost fills it; every group keeps something. Neurons leave in
chunks, so that what remains is a multiple of `round_to`.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from math import inf, lcm

import torch

from ...errors import ConfigError
from ...models.anatomy import Anatomy
from ...models.groups import Group
from ..config import PruningConfig
from ..methods import UNIT_KINDS
from ..score.units import Scores

LayerNumbers = Mapping[tuple[str, int], float]
Cost = Callable[[Group, int], float]  # of a group with so many units

# Costs are whole numbers; an amount that is missing by less than half of one is rounding.
ROUNDING = 0.5
TINY = 1e-9  # what a chunk saves at least, so that a price can be divided by it


def allocate(
    anatomy: Anatomy, scores: Scores, config: PruningConfig, cost: Cost, remove: float
) -> dict[Group, tuple[int, ...]]:
    """Spend the budget over the scored groups, globally or uniformly."""
    if config.allocation == "global":
        return allocate_global(scores, cost, remove, config.round_to)
    return allocate_uniform(scores, cost, remove, config.round_to, heads_divide=_divided_by_heads(anatomy))


def allocate_alike(
    anatomy: Anatomy, groups: Iterable[Group], config: PruningConfig, cost: Cost, remove: float
) -> dict[Group, tuple[int, ...]]:
    """As many units from every layer, where there are no scores: what a uniform allocation gives, and about as much of
    the model as a global one.

    Raises:
        ConfigError: what `config` allows is not enough.
    """
    equal = {group: torch.ones(group.units) * cost(group, 1) for group in groups}
    divide = _divided_by_heads(anatomy) if config.allocation == "uniform" else None
    try:
        return allocate_uniform(equal, cost, remove, config.round_to, heads_divide=divide)
    except ConfigError:
        if config.allocation == "uniform":
            raise
        return allocate_global(equal, cost, remove, config.round_to)  # layers of sizes that no number fits


def _divided_by_heads(anatomy: Anatomy) -> int | None:
    """What the number of heads must divide, if anything, for a stock config to say it."""
    stack = anatomy.stacks[0]
    return stack.width // stack.group_size if anatomy.family.heads_divide_hidden else None


def allocate_global(scores: Scores, cost: Cost, remove: float, round_to: int) -> dict[Group, tuple]:
    """Units kept of each group: those of the lowest score per cost leave first; ConfigError if too few can leave."""
    steps = []  # (score per cost, cost, group, units after)
    for group, score in scores.items():
        ascending, price = score.sort().values, -inf
        for before, after in pairwise(_remaining(group, round_to)):
            chunk = ascending[group.units - before : group.units - after]
            saved = cost(group, before) - cost(group, after)
            # The maximum: a measured cost may fall in jumps, and a group must shrink in order.
            price = max(price, float(chunk.sum()) / max(saved, TINY))
            steps.append((price, saved, group, after))
    remaining = {group: group.units for group in scores}
    for _, saved, group, after in sorted(steps, key=lambda step: step[0]):  # stable: equal prices stay in order
        if remove < ROUNDING:
            break
        remove -= saved
        remaining[group] = after
    _check_enough(remove)
    return {group: _best(scores[group], count) for group, count in remaining.items()}


def allocate_uniform(
    scores: Scores, cost: Cost, remove: float, round_to: int, heads_divide: int | None = None
) -> dict[Group, tuple]:
    """Kept units: the same number of heads in every attention and of neurons in every FFN, each its own best.

    Among all pairs (heads, neurons) that meet the budget, the one that keeps the largest total score (the search of
    Kwon 2022, section 4.2, with uniform layers). With `heads_divide` only head counts that divide it are tried.

    Raises:
        ConfigError: no pair meets the budget.
    """
    by_kind = {kind: [g for g in scores if g.kind in UNIT_KINDS[kind]] for kind in UNIT_KINDS}
    counts = {kind: _common_counts(groups, round_to) for kind, groups in by_kind.items()}
    if heads_divide:
        counts["head"] = [count for count in counts["head"] if count == 0 or heads_divide % count == 0]
    least: dict[str, int] = {}  # of each kind: experts are much narrower than a dense FFN
    for group in scores:
        least[group.kind] = min(least.get(group.kind, group.units), group.units)
    # The total score of the best 0, 1, 2, ... units.
    gains = {g: [0.0, *s.double().sort(descending=True).values.cumsum(0).tolist()] for g, s in scores.items()}
    best, choice = -inf, None
    for heads in counts["head"]:
        for neurons in counts["neuron"]:
            kept = {g: _of_kind(g, neurons, least, round_to) if g.is_neurons else heads for g in scores}
            freed = sum(cost(group, group.units) - cost(group, count) for group, count in kept.items())
            gain = sum(gains[group][count] for group, count in kept.items())
            if freed > remove - ROUNDING and gain > -inf:  # -inf would bring back what the callback has removed
                if gain > best:
                    best, choice = gain, kept
                break  # counts fall, so the first that fits keeps most
    if choice is None:
        raise _out_of_reach()
    return {group: _best(scores[group], count) for group, count in choice.items()}


def _of_kind(group: Group, neurons: int, least: dict[str, int], round_to: int) -> int:
    """What FFNs of a kind keep where the narrowest keep so many: as large a part."""
    narrowest = min(count for kind, count in least.items() if kind in UNIT_KINDS["neuron"])
    if least[group.kind] == narrowest:
        return neurons
    count = neurons * least[group.kind] // narrowest
    step = _step(group, round_to)
    return group.units if neurons == narrowest else max(count - count % step, min(step, group.units))


def choose_layers(
    scores: LayerNumbers,
    costs: LayerNumbers,
    remove: float,
    exact: bool,
    deepest: str | None = None,
    first_stays: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Kept layers of each stack: those with the lowest score per cost leave first; the rest as in `drop_layers`."""
    order = sorted(scores, key=lambda key: scores[key] / costs[key])
    return drop_layers(order, costs, remove, exact, deepest, first_stays)


def drop_layers(
    order: Iterable[tuple[str, int]],
    costs: LayerNumbers,
    remove: float,
    exact: bool,
    deepest: str | None = None,
    first_stays: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Kept layers of each stack: they leave in `order` while the amount lasts; every stack keeps one.

    `order` names layers by (stack, layer), as `costs` does, and is asked for no more of them than have to leave: to
    find the next one may be long work. With `exact` the last layer that leaves may exceed the amount, so that at least
    `remove` is gone. No stack may become deeper than `deepest`, if one is named. With `first_stays` no stack loses its
    layer 0.

    Raises:
        ConfigError: even one layer for each stack costs too much (`exact` only).
    """
    kept: dict[str, set[int]] = {}
    for stack, layer in costs:
        kept.setdefault(stack, set()).add(layer)
    coming, waiting = iter(order), list[tuple[str, int]]()  # those wait whose stack may not shrink yet
    while any(_may_shrink(kept, stack, deepest) for stack in kept):
        least = 0.0 if exact else min(costs[stack, layer] for stack, layers in kept.items() for layer in layers)
        if remove < ROUNDING if exact else least >= remove + ROUNDING:
            break
        leaving = next((key for key in waiting if _may_shrink(kept, key[0], deepest)), None)
        while leaving is None and (key := next(coming, None)) is not None:
            if key[1] > 0 or not first_stays:
                waiting.append(key)
                leaving = key if _may_shrink(kept, key[0], deepest) else None
        if leaving is None:
            break
        waiting.remove(leaving)
        if exact or costs[leaving] < remove + ROUNDING:
            kept[leaving[0]].remove(leaving[1])
            remove -= costs[leaving]
    if exact:
        _check_enough(remove)
    return {stack: tuple(sorted(layers)) for stack, layers in kept.items()}


def _may_shrink(kept: dict[str, set[int]], stack: str, deepest: str | None) -> bool:
    others = [len(layers) for name, layers in kept.items() if name != stack]
    holds_the_rest = stack == deepest and len(kept[stack]) <= max(others, default=0)
    return len(kept[stack]) > 1 and not holds_the_rest


def fewest(group: Group, config: PruningConfig) -> int:
    """What every group keeps at least: one head, `round_to` neurons."""
    return min(group.units, _step(group, config.round_to))


def _step(group: Group, round_to: int) -> int:
    return lcm(round_to, group.step) if group.is_neurons else 1


def _remaining(group: Group, round_to: int) -> list[int]:
    """The counts a group may go through, descending: all units, then multiples of `round_to` (1 for heads)."""
    step = _step(group, round_to)
    largest = (group.units - 1) // step * step
    return [group.units, *range(largest, 0, -step)]


def _common_counts(groups: list[Group], round_to: int) -> list[int]:
    """Counts that all groups can have, descending; `[0]` stands for "no such groups"."""
    if not groups:
        return [0]
    smallest = min(groups, key=lambda group: (group.units, -group.step))
    same = all(group.units == smallest.units for group in groups)
    is_round = smallest.units % _step(smallest, round_to) == 0
    return _remaining(smallest, round_to)[0 if same or is_round else 1 :]


def _best(score: torch.Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(score, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def _check_enough(missing: float) -> None:
    if missing >= ROUNDING:
        raise _out_of_reach()


def _out_of_reach() -> ConfigError:
    return ConfigError(
        "This ratio cannot be reached: every layer keeps at least one head and `round_to` neurons, and every "
        "stack one layer. Lower `ratio` or `round_to`, or add to `granularity`."
    )
