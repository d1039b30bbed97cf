"""How much each single weight matters: one score for each entry of each matrix, larger is more important.

- `magnitude`: |w| (Han 2015).
- `activation`: |w_ij| ||x_j||_2 with x_j the j-th input over all calibration tokens (Wanda, Sun 2023).
- `taylor`: sum over batches of |w * dL/dw|, the first-order change of the loss (Molchanov 2019).
- `fisher`: w^2 times the mean over batches of (dL/dw)^2: Optimal Brain Damage (LeCun 1990) with the diagonal empirical
  Fisher information as curvature. Of single examples where batches hold one; else smoothed, as in Kwon 2022.
- `random`: uniform noise, a control.

`obs` (SparseGPT's) gives no scores: it chooses and updates together, in `fit/sparsegpt.py`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.modes import eval_mode
from ...training.progress import told
from ...training.ranks import share, total
from ..cut.linears import Linear, as_matrix, matrix, parameter_of
from .calibration import model_loss, wide
from .handing import Batch
from .linear_inputs import collect

WeightScores = dict[Linear, Tensor]  # [out, in], on the CPU


def magnitude(model: PreTrainedModel, linears: Sequence[Linear], **unused) -> WeightScores:
    """`[out, in]` sizes for each linear."""
    return {linear: wide(matrix(model, linear)).abs().cpu() for linear in linears}


def random(model: PreTrainedModel, linears: Sequence[Linear], *, seed: int, **unused) -> WeightScores:
    """`[out, in]` noise for each linear."""
    generator = torch.Generator().manual_seed(seed)
    return {linear: torch.rand(matrix(model, linear).shape, generator=generator) for linear in linears}


def activation(
    model: PreTrainedModel, linears: Sequence[Linear], *, batches: Sequence[Batch], **unused
) -> WeightScores:
    """`[out, in]` Wanda scores for each linear, to be compared within one output row."""
    squares = collect(model, linears, batches, lambda rows: rows.square().sum(0))
    scores = magnitude(model, linears)
    return {linear: scores[linear] * squares[linear].sqrt().cpu() for linear in squares} | {
        linear: torch.zeros_like(scores[linear]) for linear in linears if linear not in squares
    }


def taylor(model: PreTrainedModel, linears: Sequence[Linear], *, batches: Sequence[Batch], **unused) -> WeightScores:
    """`[out, in]` first-order scores for each linear; without labels the model's own predictions stand in."""
    scores = {linear: torch.zeros_like(score) for linear, score in magnitude(model, linears).items()}
    for linear, gradient in _gradients(model, linears, batches):
        scores[linear] += (matrix(model, linear) * gradient).abs().cpu()
    return total(scores, linears)


def fisher(model: PreTrainedModel, linears: Sequence[Linear], *, batches: Sequence[Batch], **unused) -> WeightScores:
    """`[out, in]` second-order scores for each linear; without labels the model's own predictions stand in."""
    weights = magnitude(model, linears)
    curvature = {linear: torch.zeros_like(weight) for linear, weight in weights.items()}
    for linear, gradient in _gradients(model, linears, batches):
        curvature[linear] += wide(gradient).square().cpu() / len(batches)
    curvature = total(curvature, linears)
    return {linear: weight.square() * curvature[linear] for linear, weight in weights.items()}


def _gradients(
    model: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch]
) -> Iterator[tuple[Linear, Tensor]]:
    """The gradient `[out, in]` of each batch for each linear; a weight that gets none has no effect."""
    weights = [parameter_of(model, linear) for linear in linears]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for batch in told(share(batches), "calibrate"):
            with eval_mode(model), torch.enable_grad():
                gradients = torch.autograd.grad(model_loss(model, batch), weights, allow_unused=True)
            for linear, gradient in zip(linears, gradients, strict=True):
                if gradient is not None:
                    yield linear, as_matrix(model, linear, gradient)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
