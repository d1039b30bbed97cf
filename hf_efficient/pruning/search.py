"""The search for what to keep: layers first, then experts, then units in a number of steps.

    search = Search(config, Cutter(Anatomy.of(model), config, batches), costs, length)
    plan = search.plan()                  # scores and allocates
    small = search.cutter.cut(plan).model # surgery, and least squares
    other = search.at(0.7).plan()         # another ratio: what does not depend on it is not computed again

Every step scores the units of the model as it is by then (pruned and, with `reconstruct`, fitted to the dense one) and
takes the next part of the budget from them. The first step needs no cut: one that follows on layers or on another step
does. All cuts start from the dense model, so a plan alone gives what the search would: `prune(model, plan=plan)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from transformers import PreTrainedModel

from ..models.anatomy import Anatomy
from ..models.families import FAMILIES
from ..models.groups import Group
from ..models.mixtures import Mixture
from ..training.ranks import from_main, share
from .choose.allocation import allocate, choose_layers, drop_layers, fewest
from .choose.experts import choose_experts
from .choose.reach import check_reachable
from .choose.rearrangement import rearrange
from .config import PruningConfig
from .cut.silenced import check_cut
from .cut.surgery import apply_plan
from .fit.reconstruction import TokenWeighing, TokenWeights, reconstruct_blocks, token_weights
from .plan import PruningPlan
from .price.correction import Kept, correct
from .price.costs import Costs
from .score.calibration import answer_loss
from .score.experts import ExpertScores, score_experts
from .score.handing import Batch
from .score.layers import LayerScores, layer_scores, loss_order
from .score.statistics import MaskGradients, mask_gradients
from .score.units import Scores, check_scores, score_units


class Cutter:
    """Cuts the dense model to a plan, and fits what is left where that is asked for and there are batches."""

    def __init__(self, dense: Anatomy, config: PruningConfig, batches: Sequence[Batch]):
        self.dense, self.batches, self.seed = dense, batches, config.seed
        self.fits = config.reconstruct and bool(batches)

    @cached_property
    def weights(self) -> TokenWeights:
        return token_weights(self.dense, self.batches, answer_loss(self.seed))

    def cut(self, plan: PruningPlan) -> Anatomy:
        """The small model; the dense one itself where the plan removes nothing."""
        if not plan.layers and not plan.units:
            return self.dense
        small = Anatomy.of(apply_plan(self.dense, plan))
        if self.batches and self.dense.family.model_type not in FAMILIES:
            check_cut(self.dense, small.model, plan, self.batches[0])
        if self.fits:
            reconstruct_blocks(small, self.dense, self.batches, self.weights, plan.layers)
        return small


@dataclass
class Judgement:
    """What is known of the dense model, whatever the ratio."""

    layers: LayerScores | None = None
    order: list[tuple[str, int]] = field(default_factory=list)  # in which layers leave, as far as it was asked for
    coming: Iterator[tuple[str, int]] | None = None  # the rest of it
    units: tuple[Scores, MaskGradients] | None = None
    experts: ExpertScores | None = None


@dataclass(frozen=True)
class Search:
    """One search: what is asked, what cuts the dense model and knows its batches, and what its parts cost."""

    config: PruningConfig
    cutter: Cutter
    costs: Costs
    length: int
    known: Judgement = field(default_factory=Judgement)

    @property
    def dense(self) -> Anatomy:
        return self.cutter.dense

    @property
    def batches(self) -> Sequence[Batch]:
        return self.cutter.batches

    def at(self, ratio: float) -> "Search":
        """The same search for another ratio; ConfigError if that cannot be reached. Both share the dense model."""
        config = replace(self.config, ratio=ratio)
        check_reachable(self.dense, config, self.costs)
        return replace(self, config=config)

    def plan(self) -> PruningPlan:
        """What to keep: nothing of the dense model is computed twice, also not for another ratio.

        A step that follows on another, or on layers, scores the model that it finds, which is cut for that.
        """
        plan = PruningPlan(layers=self._layers() if "layer" in self.config.granularity else {})
        costs = replace(self.costs, of=_without_dropped(self.costs, plan))
        start = costs.total - sum(cost for key, cost in costs.layers.items() if not is_kept(key, plan))
        goal, steps = (1 - self.config.ratio) * costs.total, self.config.steps
        if "expert" in self.config.granularity:
            target = goal if not self.config.unit_kinds else (start * goal) ** 0.5  # the same factor as the units
            plan = replace(plan, units=self._experts(plan, start - target))
            start, costs = with_kept(self.costs, plan, start)
        for step in range(1, steps + 1) if self.config.unit_kinds else ():
            target = start * (goal / start) ** (step / steps)  # the same factor in every step
            if start > target:
                now = costs if step == steps else replace(costs, measure=None)
                kept = self._units(self.cutter.cut(plan), plan, now, start, target)
                plan = replace(plan, units=plan.units | {group.name: units for group, units in kept.items()})
        # One plan for all processes, whatever the last bit of a sum is on another machine.
        return PruningPlan.from_dict(from_main(plan.to_dict))

    def _experts(self, plan: PruningPlan, remove: float) -> dict[str, tuple[int, ...]]:
        """The experts that stay in the layers that do."""
        mixtures = kept_mixtures(self.dense, plan)
        if not mixtures or remove <= 0:
            return {}
        small = self.cutter.cut(plan)
        if small is not self.dense:
            scores = score_experts(small, small.mixtures, self.config, self.batches)
        else:
            if self.known.experts is None:
                self.known.experts = score_experts(small, mixtures, self.config, self.batches)
            scores = self.known.experts
        # Both lists go through stacks and layers in the same order.
        scores = dict(zip(mixtures, (scores[one] for one in small.mixtures), strict=True))
        return {one.name: kept for one, kept in choose_experts(scores, self.costs.experts, remove).items()}

    def _layers(self) -> dict[str, tuple[int, ...]]:
        """Which layers to keep so that their share of the budget goes: about that, and at least all of it if nothing
        else is to be removed."""
        config, costs, family = self.config, self.costs.layers, self.dense.family
        alone = tuple(config.granularity) == ("layer",)
        budget = config.layer_share * self.costs.total, alone, family.deepest, family.first_stays
        if config.layer_importance == "loss":
            return drop_layers(self._order(), costs, *budget)
        if self.known.layers is None:
            self.known.layers = layer_scores(self.dense, config, self.batches, self.length)
        return choose_layers(self.known.layers, costs, *budget)

    def _order(self) -> Iterator[tuple[str, int]]:
        """That of `loss`, found as far as it is asked for."""
        known = self.known
        known.coming = known.coming or loss_order(self.dense, self.batches)
        yield from known.order
        for key in known.coming:
            known.order.append(key)
            yield key

    def scores(self, model: PreTrainedModel, groups: Sequence[Group]) -> tuple[Scores, MaskGradients]:
        """Of the units of a model, dense or cut already; and the gradients behind them where they are rearranged."""
        if model is self.dense.model and self.known.units is not None:
            return self.known.units
        is_dense, gradients = model is self.dense.model, dict[Group, torch.Tensor]()
        # The pass that scores the dense model says as well how much each token counts in the fit that follows.
        is_seen = is_dense and self.cutter.fits and self.config.importance == "fisher"
        weighing = TokenWeighing(self.dense) if is_seen else None
        if self.config.rearrange:  # which goes with fisher: one pass gives both
            loss = answer_loss(self.config.seed)
            gradients = mask_gradients(model, list(groups), self.batches, loss, weighing)
            scores = {group: gradient.square().sum(0) for group, gradient in gradients.items()}
            for group, values in scores.items():
                check_scores(group, values, self.config.importance)
        else:
            scores = score_units(model, list(groups), self.config, self.batches, self.length, weighing)
        if weighing is not None:
            self.cutter.weights = weighing.weights(share(self.batches))
        if is_dense:
            self.known.units = scores, gradients
        return scores, gradients

    def _units(self, small: Anatomy, plan: PruningPlan, costs: Costs, start: float, target: float) -> Kept:
        """What stays of each group of the dense model, which costs `start` with its kept layers, so that `target` is
        left; from scores of the model as it is now."""
        # Both lists go through stacks and layers in the same order; the small one lacks the groups of dropped layers.
        pairs = zip(small.groups, kept_groups(self.dense, plan), strict=True)
        present = {now: group for now, group in pairs if now.kind in self.config.unit_kinds}
        names = {group: torch.tensor(plan.units.get(group.name, range(group.units))) for group in present.values()}
        # Scores are [units of the small group]; budgets and plans speak of the dense one, so they move to its places.
        scores_now, gradients = self.scores(small.model, list(present))
        scores: Scores = {}
        for now, values in scores_now.items():
            group = present[now]
            scores[group] = values.new_full((group.units,), -torch.inf)  # what is gone stays gone
            scores[group][names[group]] = values
        kept = self._spend(scores, plan, costs, start, target)
        for now, group in present.items() if self.config.rearrange else ():
            # Gradients are those of the units that are left, `names` their numbers in the dense model.
            places = torch.searchsorted(names[group], torch.tensor(kept[group]))
            chosen = rearrange(gradients[now], tuple(places.tolist()))
            kept[group] = tuple(names[group][list(chosen)].tolist())
        return kept

    def _spend(self, scores: Scores, plan: PruningPlan, costs: Costs, start: float, target: float) -> Kept:
        """Allocate by price; where the result can be measured, until that is right."""
        by_price = partial(allocate, self.dense, scores, self.config, costs.of)
        if costs.measure is None:
            return by_price(start - target)
        measure = costs.measure

        def cost(kept: Kept) -> float:
            return measure(replace(plan, units={group.name: units for group, units in kept.items()}))

        most = sum(costs.of(group, group.units) - costs.of(group, fewest(group, self.config)) for group in scores)
        return correct(by_price, cost, costs.total, start, target, most)


def _without_dropped(costs: Costs, plan: PruningPlan) -> Callable[[Group, int], float]:
    """The cost of a group in the layers that are kept (T5's heads are one group in all layers), and in the experts."""
    parts = {
        (one.stack, one.layer): len(plan.units[one.name]) / one.experts
        for one in costs.experts
        if one.name in plan.units
    }

    def cost(group: Group, units: int) -> float:
        kept = sum(is_kept((group.stack, layer), plan) for layer in group.layers)
        part = parts.get((group.stack, group.layers[0]), 1.0) if group.has_experts else 1.0
        return costs.of(group, units) * part * kept / len(group.layers)

    return cost


def with_kept(costs: Costs, plan: PruningPlan, start: float) -> tuple[float, Costs]:
    """What is left of `start` when experts have left, and what their neurons cost now."""
    gone = {one: one.experts - len(plan.units[one.name]) for one in costs.experts if one.name in plan.units}
    left = start - sum(costs.experts[one] * count for one, count in gone.items())
    return left, replace(costs, of=_without_dropped(costs, plan))


def kept_groups(dense: Anatomy, plan: PruningPlan) -> list[Group]:
    """The groups of which a layer stays."""
    return [group for group in dense.groups if any(is_kept((group.stack, layer), plan) for layer in group.layers)]


def kept_mixtures(dense: Anatomy, plan: PruningPlan) -> list[Mixture]:
    """Those of the layers that stay."""
    return [one for one in dense.mixtures if is_kept((one.stack, one.layer), plan)]


def is_kept(key: tuple[str, int], plan: PruningPlan) -> bool:
    stack, layer = key
    return stack not in plan.layers or layer in plan.layers[stack]
