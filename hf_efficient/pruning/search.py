"""The search for what to keep: layers first, then units in a number of steps.

    plan, small = Search(model, config, batches, costs, length).run()

Every step scores the units of the model as it is by then (pruned and, with `reconstruct`, fitted to the dense one),
takes the next part of the budget from them, and cuts the dense model anew to all that is still kept. So the result of
the last step is what the plan alone gives: `prune(model, plan=plan)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from ..families import family_of
from .allocation import allocate_global, allocate_uniform, choose_layers, fewest
from .calibration import answer_loss
from .config import PruningConfig
from .correction import Kept, correct
from .costs import Costs
from .groups import Group, find_groups
from .importance import Scores, score_units
from .layers import layer_scores
from .plan import PruningPlan
from .rearrangement import rearrange
from .reconstruction import TokenWeights, reconstruct, token_weights
from .statistics import mask_gradients
from .stream import Batch
from .surgery import apply_plan


@dataclass(frozen=True)
class Search:
    """One search: the dense model, what is asked, what it is judged on, and what its parts cost."""

    model: PreTrainedModel
    config: PruningConfig
    batches: Sequence[Batch]
    costs: Costs
    length: int

    def run(self) -> tuple[PruningPlan, PreTrainedModel]:
        """The plan and the model that it makes."""
        cutter = Cutter(self.model, self.config, self.batches)
        plan = PruningPlan(layers=self._layers() if "layer" in self.config.granularity else {})
        small = cutter.cut(plan)
        costs = replace(self.costs, of=_without_dropped(self.costs, plan))
        start = costs.total - sum(cost for key, cost in costs.layers.items() if not is_kept(key, plan))
        goal, steps = (1 - self.config.ratio) * costs.total, self.config.steps
        for step in range(1, steps + 1) if self.config.unit_kinds else ():
            target = start * (goal / start) ** (step / steps)  # the same factor in every step
            if start > target:
                now = costs if step == steps else replace(costs, measure=None)
                kept = self._units(small, plan, now, start, target)
                plan = replace(plan, units={group.name: units for group, units in kept.items()})
                small = cutter.cut(plan)
        return plan, small

    def _layers(self) -> dict[str, tuple[int, ...]]:
        """Which layers to keep so that their share of the budget goes: about that, and at least all of it if nothing
        else is to be removed."""
        config, costs, family = self.config, self.costs, family_of(self.model.config)
        scores = layer_scores(self.model, config, self.batches, self.length)
        remove, alone = config.layer_share * costs.total, not config.unit_kinds
        is_order = config.layer_importance == "loss"
        prices: Mapping[tuple[str, int], float] = dict.fromkeys(scores, 1.0) if is_order else costs.layers
        return choose_layers(scores, costs.layers, remove, alone, family.deepest, family.first_stays, prices)

    def _units(self, small: PreTrainedModel, plan: PruningPlan, costs: Costs, start: float, target: float) -> Kept:
        """What stays of each group of the dense model, which costs `start` with its kept layers, so that `target` is
        left; from scores of the model as it is now."""
        config, present = self.config, self._present(small, plan)
        names = {group: torch.tensor(plan.units.get(group.name, range(group.units))) for group in present.values()}
        scores: Scores = {}
        for now, values in score_units(small, list(present), config, self.batches, self.length).items():
            group = present[now]
            scores[group] = torch.full((group.units,), -torch.inf)  # what is gone stays gone
            scores[group][names[group]] = values
        kept = self._spend(scores, plan, costs, start, target)
        if not config.rearrange:
            return kept
        gradients = mask_gradients(small, list(present), self.batches, answer_loss(config.seed))
        return {group: _rearranged(gradients[now], names[group], kept[group]) for now, group in present.items()}

    def _present(self, small: PreTrainedModel, plan: PruningPlan) -> dict[Group, Group]:
        """Each group of the small model that units may leave, and which one of the dense model it is."""
        groups = find_groups(self.model)
        left = [group for group in groups if any(is_kept((group.stack, layer), plan) for layer in group.layers)]
        pairs = zip(find_groups(small), left, strict=True)
        return {now: group for now, group in pairs if now.kind in self.config.unit_kinds}

    def _spend(self, scores: Scores, plan: PruningPlan, costs: Costs, start: float, target: float) -> Kept:
        """Allocate by price; where the result can be measured, until that is right."""
        by_price = partial(allocate, self.model, scores, self.config, costs)
        if costs.measure is None:
            return by_price(start - target)
        measure = costs.measure

        def cost(kept: Kept) -> float:
            return measure(replace(plan, units={group.name: units for group, units in kept.items()}))

        most = sum(costs.of(group, group.units) - costs.of(group, fewest(group, self.config)) for group in scores)
        return correct(by_price, cost, costs.total, start, target, most)


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


def _without_dropped(costs: Costs, plan: PruningPlan) -> Callable[[Group, int], float]:
    """The cost of a group in the layers that are kept; T5's heads are one group in all layers."""

    def cost(group: Group, units: int) -> float:
        kept = sum(is_kept((group.stack, layer), plan) for layer in group.layers)
        return costs.of(group, units) * kept / len(group.layers)

    return cost


def _rearranged(gradients: torch.Tensor, names: torch.Tensor, kept: tuple[int, ...]) -> tuple[int, ...]:
    """`gradients` are those of the units that are left, `names` their numbers in the dense model."""
    places = torch.searchsorted(names, torch.tensor(kept))
    return tuple(names[list(rearrange(gradients, tuple(places.tolist())))].tolist())


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
