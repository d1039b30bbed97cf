"""The search for what to keep: layers first, then units in a number of steps.

    plan, small = search(model, config, batches, costs, length)

Every step scores the units of the model as it is by then (pruned and, with `reconstruct`, fitted to the dense one),
takes the next part of the budget from them, and cuts the dense model anew to all that is still kept. So the result of
the last step is what the plan alone gives: `prune(model, plan=plan)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from ..errors import DataError
from ..families import family_of, find_stacks
from .allocation import allocate_global, allocate_uniform, choose_layers, fewest
from .calibration import answer_loss
from .config import PruningConfig
from .correction import Kept, correct
from .costs import Costs
from .groups import Group, find_groups
from .importance import IMPORTANCES, Scores
from .layers import LAYER_IMPORTANCES, LayerScores
from .plan import PruningPlan
from .rearrangement import rearrange
from .reconstruction import TokenWeights, reconstruct, token_weights
from .statistics import mask_gradients
from .stream import Batch
from .surgery import apply_plan


def search(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], costs: Costs, length: int
) -> tuple[PruningPlan, PreTrainedModel]:
    """The plan and the model that it makes."""
    cutter = Cutter(model, config, batches)
    plan = PruningPlan()
    if "layer" in config.granularity:
        plan = PruningPlan(layers=_choose_layers(model, config, batches, costs, length))
    small = cutter.cut(plan)
    costs = replace(costs, of=_without_dropped(costs, plan))
    start = costs.total - sum(cost for key, cost in costs.layers.items() if not is_kept(key, plan))
    goal = (1 - config.ratio) * costs.total
    for step in range(1, config.steps + 1) if config.unit_kinds else ():
        target = start * (goal / start) ** (step / config.steps)  # the same factor in every step
        if start > target:
            corrected = costs if step == config.steps else replace(costs, measure=None)
            kept = _next_units(model, small, plan, config, batches, corrected, length, start, target)
            plan = replace(plan, units={group.name: units for group, units in kept.items()})
            small = cutter.cut(plan)
    return plan, small


def _without_dropped(costs: Costs, plan: PruningPlan) -> Callable[[Group, int], float]:
    """The cost of a group in the layers that are kept; T5's heads are one group in all layers."""

    def cost(group: Group, units: int) -> float:
        kept = sum(is_kept((group.stack, layer), plan) for layer in group.layers)
        return costs.of(group, units) * kept / len(group.layers)

    return cost


class Cutter:
    """Cuts the dense model to a plan, and fits what is left where that is asked for and there are batches."""

    def __init__(self, model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch]):
        self.model, self.batches = model, batches
        self.fits = config.reconstruct and bool(batches)
        self.weights: TokenWeights = token_weights(model, batches, answer_loss(config.seed)) if self.fits else {}

    def cut(self, plan: PruningPlan) -> PreTrainedModel:
        if not plan.layers and not plan.units:
            return self.model
        small = apply_plan(self.model, plan)
        if self.fits:
            reconstruct(small, self.model, self.batches, self.weights, plan.layers)
        return small


def _next_units(
    model: PreTrainedModel,
    small: PreTrainedModel,
    plan: PruningPlan,
    config: PruningConfig,
    batches: Sequence[Batch],
    costs: Costs,
    length: int,
    start: float,
    target: float,
) -> dict[Group, tuple[int, ...]]:
    """What stays of each group of the dense model, which costs `start` with its kept layers, so that `target` is left;
    from scores of the model as it is now."""
    present = {now: group for group, now in _pairs(model, small, plan) if now.kind in config.unit_kinds}
    names = {group: torch.tensor(plan.units.get(group.name, range(group.units))) for group in present.values()}
    score = IMPORTANCES[config.importance]
    found = score(small, list(present), batches=batches, length=length, seed=config.seed)
    scores: Scores = {}
    for now, values in found.items():
        _check_scores(now, values, config)
        group = present[now]
        scores[group] = torch.full((group.units,), -torch.inf)  # what is gone stays gone
        scores[group][names[group]] = values.float()
    kept = _spend(model, scores, plan, config, costs, start, target)
    if not config.rearrange:
        return kept
    gradients = mask_gradients(small, list(present), batches, answer_loss(config.seed))
    return {group: _rearranged(gradients[now], names[group], kept[group]) for now, group in present.items()}


def _spend(
    model: PreTrainedModel,
    scores: Scores,
    plan: PruningPlan,
    config: PruningConfig,
    costs: Costs,
    start: float,
    target: float,
) -> Kept:
    """Allocate by price; where the result can be measured, until that is right."""
    by_price = partial(allocate, model, scores, config, costs)
    if costs.measure is None:
        return by_price(start - target)
    measure = costs.measure

    def cost(kept: Kept) -> float:
        return measure(replace(plan, units={group.name: units for group, units in kept.items()}))

    most = sum(costs.of(group, group.units) - costs.of(group, fewest(group, config)) for group in scores)
    return correct(by_price, cost, costs.total, start, target, most)


def _rearranged(gradients: torch.Tensor, names: torch.Tensor, kept: tuple[int, ...]) -> tuple[int, ...]:
    """`gradients` are those of the units that are left, `names` their numbers in the dense model."""
    places = torch.searchsorted(names, torch.tensor(kept))
    return tuple(names[list(rearrange(gradients, tuple(places.tolist())))].tolist())


def _pairs(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> list[tuple[Group, Group]]:
    """Each group of the dense model that has kept layers, and what it is in the small one."""
    left = [group for group in find_groups(model) if any(is_kept((group.stack, i), plan) for i in group.layers)]
    return list(zip(left, find_groups(small), strict=True))


def is_kept(key: tuple[str, int], plan: PruningPlan) -> bool:
    stack, layer = key
    return stack not in plan.layers or layer in plan.layers[stack]


def allocate(
    model: PreTrainedModel, scores: Scores, config: PruningConfig, costs: Costs, remove: float
) -> dict[Group, tuple[int, ...]]:
    """Spend the budget over the scored groups, globally or uniformly."""
    if config.allocation == "global":
        return allocate_global(scores, costs.of, remove, config.round_to)
    family = family_of(model.config)
    stack = family.stacks[0]
    divide = stack.width(model.config) // stack.group_size(model.config) if family.heads_divide_hidden else None
    return allocate_uniform(scores, costs.of, remove, config.round_to, heads_divide=divide)


def _choose_layers(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], costs: Costs, length: int
) -> dict[str, tuple[int, ...]]:
    """Which layers to keep so that their share of the budget goes: about that, and at least all of it if nothing else
    is to be removed."""
    scores = layer_scores(model, config, batches, length)
    family, alone = family_of(model.config), not config.unit_kinds
    by_rank = config.layer_importance == "loss"
    prices: Mapping[tuple[str, int], float] = dict.fromkeys(scores, 1.0) if by_rank else costs.layers
    return choose_layers(
        scores, costs.layers, config.layer_share * costs.total, alone, family.deepest, family.first_stays, prices
    )


def layer_scores(model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], length: int) -> LayerScores:
    """By (stack, layer)."""
    if config.layer_importance in LAYER_IMPORTANCES:
        return LAYER_IMPORTANCES[config.layer_importance](model, batches)
    score = IMPORTANCES[config.layer_importance]
    groups = find_groups(model)
    found = score(model, groups, batches=batches, length=length, seed=config.seed)
    sums = {(stack.name, index): 0.0 for stack, layers in find_stacks(model) for index in range(len(layers))}
    for group, values in found.items():
        _check_scores(group, values, config)
        for layer in group.layers:
            sums[group.stack, layer] += float(values.sum()) / len(group.layers)
    return sums


def _check_scores(group: Group, values: torch.Tensor, config: PruningConfig) -> None:
    if values.shape != (group.units,) or not torch.isfinite(values).all():
        raise DataError(
            f"The {config.importance} scores of {group.name} must be {group.units} finite numbers, got "
            f"{tuple(values.shape)}, {int(values.isfinite().sum())} of them finite. Check the calibration data "
            "and the weights for NaN."
        )
