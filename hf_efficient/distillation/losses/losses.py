"""The losses as pure functions of tensors. Each returns `(sum, count)`, so that the caller chooses the denominator.

    total, count = kd_loss(student_logits, teacher_logits, mask, temperature=2.0)
    loss = total / count_over_the_whole_optimizer_step

Rules kept by all of them: rows are selected by the mask first, so what lies under padding is never read; arithmetic is
in float32 at least; nothing valid gives a sum of 0 that is still connected to the graph. `count` is `mask.sum()`.

`terms` has the table of names that `DistillationArguments.losses` accepts.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError, unknown_name
from ...models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .chunks import RowSum
from .divergences import forward_kl_of_logits, log_probabilities
from .draws import DrawnTokens
from .tables import DIVERGENCES, HIDDEN_DISTANCES
from .top_k import TopLogits


def check_shape(values: Tensor, mask: Tensor) -> None:
    """DataError for outputs that the mask does not fit."""
    if values.shape[: mask.dim()] != mask.shape:
        raise DataError(
            f"A mask of shape {tuple(mask.shape)} does not fit model outputs of shape {tuple(values.shape)}. "
            "Models that change the sequence length (prompt tuning, image tokens, strided audio) cannot be matched "
            "position by position."
        )


def select(values: Tensor, mask: Tensor) -> Tensor:
    """The entries of `values` where `mask` is true, in float32 or wider: [n, ...]."""
    check_shape(values, mask)
    chosen = values[mask]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def ce_loss(logits: Tensor, labels: Tensor, mask: Tensor, *, problem: str = SINGLE_LABEL) -> tuple[Tensor, Tensor]:
    """Hard labels: cross entropy, or by `problem` binary cross entropy / squared error for each label.

    Shapes: logits [..., classes] with labels and mask [...]; multi-label and regression: all three [batch, labels].
    """
    if problem == SINGLE_LABEL:
        check_shape(logits, mask)
        return ce_rows(labels, mask).of(logits), mask.sum()
    chosen = select(logits, mask)
    targets = labels[mask].to(chosen.dtype)
    if problem == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(chosen, targets, reduction="sum"), mask.sum()
    return F.mse_loss(chosen, targets, reduction="sum"), mask.sum()


def ce_rows(labels: Tensor, mask: Tensor) -> RowSum:
    """The sum of `ce_loss` of single labels."""
    return RowSum(partial(F.cross_entropy, reduction="sum"), (labels,), mask)


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopLogits | DrawnTokens,
    mask: Tensor,
    *,
    problem: str = SINGLE_LABEL,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Soft labels (Hinton et al. 2015): T^2 D(softmax(teacher / T), softmax(student / T)).

    The gradient of the softened divergence shrinks as 1/T^2; `temperature_squared` undoes that. Multi-label logits are
    compared as independent yes/no distributions, regression outputs by squared error (no temperature): what the former
    tends to, but for a factor of 8, as the temperature grows.

    Shapes: logits [..., classes] with mask [...]; multi-label and regression: logits and mask [batch, labels]. A
    teacher's `TopLogits` or `DrawnTokens` are compared at their own temperature, the latter by the forward divergence.

    Parameters:
        how: as in `kd_rows`; regression has no use for it.
    """
    check_shape(student, mask)
    if problem == REGRESSION:
        return F.mse_loss(select(student, mask), select(teacher, mask), reduction="sum"), mask.sum()
    return kd_rows(teacher, mask, problem=problem, **how).of(student), mask.sum()


def kd_rows(
    teacher: Tensor | TopLogits | DrawnTokens,
    mask: Tensor,
    *,
    problem: str = SINGLE_LABEL,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    divergence: str = "forward",
    beta: float = 0.5,
) -> RowSum:
    """The sum of `kd_loss` of probabilities: the rows of the student's logits are given in chunks, so that each case
    below is a function of some rows of both sides, [rows, V] and what the teacher's answer has of the same rows."""
    factor = temperature**2 if temperature_squared else 1.0
    if divergence not in DIVERGENCES:
        raise unknown_name("divergence", divergence, DIVERGENCES)
    compare = DIVERGENCES[divergence]
    if isinstance(teacher, TopLogits):
        fixed = teacher.temperature

        def of_top(own: Tensor, ids: Tensor, logits: Tensor, log_sum_exp: Tensor) -> Tensor:
            return factor * compare(*TopLogits(ids, logits, log_sum_exp, fixed).buckets(own), beta).sum()

        return RowSum(of_top, (teacher.ids, teacher.logits, teacher.log_sum_exp), mask)
    if isinstance(teacher, DrawnTokens):
        fixed = teacher.temperature

        def of_drawn(own: Tensor, ids: Tensor, entropy: Tensor) -> Tensor:
            return factor * DrawnTokens(ids, entropy, fixed).forward_kl(own).sum()

        return RowSum(of_drawn, (teacher.ids, teacher.entropy), mask)
    check_shape(teacher, mask)

    def of_all(own: Tensor, other: Tensor) -> Tensor:
        sides = (other.to(torch.promote_types(other.dtype, torch.float32)), own)
        if divergence == "forward" and problem != MULTI_LABEL:
            return factor * forward_kl_of_logits(*sides, temperature)
        logs = (log_probabilities(side, temperature, binary=problem == MULTI_LABEL) for side in sides)
        return factor * compare(*logs, beta).sum()

    return RowSum(of_all, (teacher,), mask)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor, *, kind: str = "mse") -> tuple[Tensor, Tensor]:
    """Distance of hidden states: mean over the width of (s - t)^2, or 1 - cos(s, t) (DistilBERT, Sanh et al. 2019).

    Shapes: states [batch, positions, width] and mask [batch, positions]; with mask [batch] (images) an example counts
    once, with the mean over its positions.
    """
    if kind not in HIDDEN_DISTANCES:
        raise unknown_name("hidden_loss", kind, HIDDEN_DISTANCES)
    values = HIDDEN_DISTANCES[kind](select(student, mask), select(teacher, mask))
    if mask.dim() == 1:
        values = values.flatten(1).mean(dim=1)
    return values.sum(), mask.sum()


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """[..., width] both -> [...]"""
    return (student - teacher).square().mean(dim=-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos: [..., width] both -> [...]"""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)
