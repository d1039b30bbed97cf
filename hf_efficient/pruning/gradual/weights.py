"""Single weights that become zero while training: anywhere, or n of every m inputs.

The model keeps its class and size. A pattern n:m is filled in gradually: of the weights that it would take now, the
least important are taken first.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ..choose.sparsity import check_structure, choose_masks, keep_n_of_m
from ..cut.linears import Linear, as_matrix, find_linears, matrix, parameter_of
from ..methods import WEIGHT_IMPORTANCES
from .removal import Removal
from .schedule import Gradual


class WeightRemoval(Removal[Linear]):
    """`[out, in]` for each linear. `ratio` is a fraction of all their weights, of which those count that are zero
    anyway.

    Raises:
        ConfigError: a matrix does not consist of whole groups of m inputs.
    """

    def __init__(self, anatomy: Anatomy, settings: Gradual):
        check_structure(anatomy, settings.config)
        matrices = {linear: matrix(anatomy.model, linear) for linear in find_linears(anatomy)}
        blank = {linear: torch.zeros(w.shape, device=w.device) for linear, w in matrices.items()}
        super().__init__(settings, blank)

    def effect(self, model: PreTrainedModel, part: Linear) -> Tensor:
        gradient = parameter_of(model, part).grad
        if gradient is None:
            return torch.zeros_like(self.scores[part])
        return matrix(model, part).float() * as_matrix(model, part, gradient).float()

    def given_scores(self, model: PreTrainedModel) -> dict[Linear, Tensor]:
        scores = WEIGHT_IMPORTANCES[self.config.importance](model, list(self.removed), seed=self.config.seed)
        return {linear: score.to(self.removed[linear].device) for linear, score in scores.items()}

    def raise_to(self, model: PreTrainedModel, ratio: float) -> None:
        scores = self.current_scores(model)
        for linear, score in scores.items():  # what is zero anyway leaves first, after what was removed
            by_chance = (matrix(model, linear) == 0) & ~self.removed[linear]
            score.masked_fill_(by_chance, torch.finfo(score.dtype).min)
            if self.config.structure is not None:
                score.masked_fill_(~keep_n_of_m(score, *self.config.structure), torch.inf)
        for linear, mask in choose_masks(scores, ratio, allocation=self.config.allocation).items():
            self.removed[linear] |= mask

    def zeros(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {f"{linear.name}.weight": as_matrix(model, linear, mask) for linear, mask in self.removed.items()}

    def finish(self, model: PreTrainedModel) -> float:
        zero = sum(int((matrix(model, linear) == 0).sum()) for linear in self.removed)
        return zero / sum(mask.numel() for mask in self.removed.values())
