"""What a training run has removed so far, and the scores by which more will go; `PruningCallback` has one of these.

Parts are units (`unit_removal`) or single weights (`weight_removal`). The effect e of a part is w * dL/dw, for a unit
summed over the columns that read it: the first-order change of the loss that it makes. From the gradients that the
optimizer gets, of whole steps, training gives for free

- `taylor`: the running average of |e| (Molchanov 2019),
- `fisher`: that of e^2,
- `movement`: minus the sum of e over all steps since the beginning (Sanh 2020, section 4: S <- S - dL/dS with
  dL/dS = w * dL/dw; a constant learning rate of the scores would not change their order). Weights that the loss moves
  away from zero gain. Unlike there, what is gone stays gone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ..methods import TRAINED_IMPORTANCES
from ..score.finite import check_finite
from .schedule import Gradual


def taylor(score: Tensor, effect: Tensor, momentum: float) -> Tensor:
    return score.lerp_(effect.abs(), 1 - momentum)


def fisher(score: Tensor, effect: Tensor, momentum: float) -> Tensor:
    return score.lerp_(effect.square(), 1 - momentum)


def movement(score: Tensor, effect: Tensor, momentum: float) -> Tensor:
    return score.sub_(effect)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=_Named)


class Removal(ABC, Generic[P]):
    """Parts with a score and a mark for each of their elements.

    Fields:
        removed: for each part a bool tensor; True: gone.
        scores: those that are learned; empty for importances that look at weights only.
    """

    def __init__(self, settings: Gradual, blank: Mapping[P, Tensor]):
        """`blank`: zeros in the shape of each part's scores."""
        self.config, self.momentum = settings.config, settings.momentum
        self.removed = {part: torch.zeros_like(zeros, dtype=torch.bool) for part, zeros in blank.items()}
        learns = self.config.importance in TRAINED_IMPORTANCES
        self.scores = {part: zeros.clone() for part, zeros in blank.items()} if learns else {}

    @abstractmethod
    def effect(self, model: PreTrainedModel, part: P) -> Tensor:
        """What the gradients that the model holds say of a part."""

    @abstractmethod
    def given_scores(self, model: PreTrainedModel) -> dict[P, Tensor]:
        """New scores of an importance that looks at weights only."""

    @abstractmethod
    def raise_to(self, model: PreTrainedModel, ratio: float) -> None:
        """Remove more, until this fraction is gone."""

    @abstractmethod
    def zeros(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What is gone, by names of parameters: bool, of a shape that broadcasts to the parameter's."""

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> float:
        """Make the model object itself what training was for; returns the fraction that is gone."""

    def learn(self, model: PreTrainedModel) -> None:
        """Count the gradients of one optimizer step; not of one that overflowed, which the scaler of fp16 skips."""
        gradients = (parameter.grad for parameter in model.parameters())
        finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None] if self.scores else []
        if finite and bool(torch.stack(finite).all()):
            for part, score in self.scores.items():
                TRAINED_IMPORTANCES[self.config.importance](score, self.effect(model, part), self.momentum)

    def current_scores(self, model: PreTrainedModel) -> dict[P, Tensor]:
        """A copy; -inf for what is gone, so that it stays gone. DataError if a score is not finite."""
        scores = {part: score.clone() for part, score in self.scores.items()} or self.given_scores(model)
        for part, score in scores.items():
            check_finite(score, f"The {self.config.importance} score of {part.name}")
        return {part: score.masked_fill(self.removed[part], -torch.inf) for part, score in scores.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        tensors = {f"{part.name}.removed": mask for part, mask in self.removed.items()}
        tensors |= {f"{part.name}.scores": score for part, score in self.scores.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Read what `to_tensors` wrote; CheckpointError if that was for other parts or another kind of importance."""
        expected = {name: tensor.shape for name, tensor in self.to_tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise CheckpointError(
                "The state of pruning in the checkpoint belongs to another granularity, importance or model. Resume "
                "with the PruningConfig that the run was started with, or start anew."
            )
        for what, tensors_of in (("removed", self.removed), ("scores", self.scores)):
            for part, tensor in tensors_of.items():
                tensor.copy_(tensors[f"{part.name}.{what}"])
