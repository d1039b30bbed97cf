"""Heads and neurons that leave while training: masked until the end, then cut out."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ...models.groups import Group, output_weight, unit_parameters
from ..choose.allocation import allocate
from ..choose.reach import check_reachable
from ..cut.surgery import apply_plan
from ..methods import IMPORTANCES
from ..plan import PruningPlan
from ..price.costs import make_costs, total_cost
from ..score.calibration import average_length
from ..score.units import by_kind, unit_effect
from .removal import Removal
from .schedule import Gradual


class UnitRemoval(Removal[Group]):
    """`[units]` for each group. `ratio` is that of the dense model's MACs or parameters.

    Raises:
        ConfigError: a ratio that cannot be reached.
    """

    def __init__(self, anatomy: Anatomy, settings: Gradual):
        groups = [group for group in anatomy.groups if group.kind in settings.config.unit_kinds]
        super().__init__(settings, {group: torch.zeros(group.units) for group in groups})
        self.anatomy = anatomy  # masks change no structure, so it holds until the end
        self.length = self.config.sequence_length or average_length([], anatomy.model)
        self.costs = make_costs(anatomy, self.config.metric, self.length)
        check_reachable(anatomy, self.config, self.costs)

    def effect(self, model: PreTrainedModel, part: Group) -> Tensor:
        return unit_effect(model, part)

    def given_scores(self, model: PreTrainedModel) -> dict[Group, Tensor]:
        score = IMPORTANCES[self.config.importance]
        return score(model, list(self.removed), batches=[], length=self.length, seed=self.config.seed)

    def raise_to(self, model: PreTrainedModel, ratio: float) -> None:
        scores = self.current_scores(model)
        if self.config.importance == "movement":  # scores below zero, per cost, would spare what is dear
            lowest = min(float(score.min()) for score in self.scores.values())
            scores = {group: score - lowest for group, score in scores.items()}
        if self.config.importance == "taylor":
            scores = by_kind(self.anatomy, scores, self.length)
        kept = allocate(self.anatomy, scores, self.config, self.costs.of, ratio * self.costs.total)
        for group, units in kept.items():
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[list(units)] = False
            self.removed[group] |= gone

    def zeros(self, model: PreTrainedModel) -> dict[str, Tensor]:
        masks = {}
        for group, removed in self.removed.items():
            units = removed.nonzero().flatten()
            for member in group.members if len(units) else ():
                for parameter, part in unit_parameters(model, member):
                    shape = [1] * parameter.ndim
                    shape[part.dim] = parameter.shape[part.dim]
                    mask = torch.zeros(shape[part.dim], dtype=torch.bool)
                    mask[part.rows(units, parameter).cpu()] = True
                    masks[f"{member.prefix}.{part.name}"] = mask.view(shape)
        return masks

    def finish(self, model: PreTrainedModel) -> float:
        kept = {}
        for group, removed in self.removed.items():
            # Nothing reads a unit whose output columns are all zero. These are fewer than were removed if the Trainer
            # went back to its best checkpoint.
            gone = removed.clone()
            for member in group.members:
                read = output_weight(model, member).detach().ne(0)
                gone &= ~member.output.by_unit(read).any(1).cpu()
            kept[group.name] = tuple((~gone).nonzero().flatten().tolist())
        become(model, apply_plan(Anatomy.of(model), PruningPlan(units=kept)))
        del self.anatomy  # it holds the large layers
        return 1 - total_cost(model, self.config.metric, self.length) / self.costs.total


def become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Turn the object `model` into `other`, so that every reference to it sees the new structure."""
    model.__class__ = other.__class__
    model.__dict__ = other.__dict__
