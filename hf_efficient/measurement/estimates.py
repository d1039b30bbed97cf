"""Means over samples with their standard errors (formulas in `quality`).

mean_and_error(loss_sums, token_counts)                    # the ratio estimator
macro_f1(counts, predictions, targets)                     # with the jackknife's error
"""

import math

import torch


def mean_and_error(total: torch.Tensor, count: torch.Tensor) -> tuple[float, float]:
    """sum(total) / sum(count) and its standard error over samples; the error of a single sample is unknown: nan."""
    mean = total.sum() / count.sum()
    n = len(total)
    if n < 2:
        return mean.item(), math.nan
    return mean.item(), ((n / (n - 1) * ((total - mean * count) ** 2).sum()).sqrt() / count.sum()).item()


def macro_f1(count: torch.Tensor, predictions: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """The mean over the classes of the targets of F1 = 2 tp / (predicted + true), and its jackknife error.

    Parameters:
        count: `[n]` how many of the predictions belong to each sample.
        predictions, targets: `[total]` class ids.
    """
    n, classes = len(count), int(torch.maximum(predictions.max(), targets.max())) + 1
    sample = torch.arange(n).repeat_interleave(count.long())

    def counted(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.bincount((sample * classes + ids)[where], minlength=n * classes).view(n, classes).double()

    everywhere = torch.ones_like(targets, dtype=torch.bool)
    right = counted(targets, predictions == targets)
    either = counted(predictions, everywhere) + counted(targets, everywhere)
    known = targets.unique()

    def score(right: torch.Tensor, either: torch.Tensor) -> torch.Tensor:
        return (2 * right / either.clamp_min(1))[..., known].mean(-1)

    without = score(right.sum(0) - right, either.sum(0) - either)  # [n]
    error = ((n - 1) / n * ((without - without.mean()) ** 2).sum()).sqrt().item() if n > 1 else math.nan
    return score(right.sum(0), either.sum(0)).item(), error


def exp_of(loss: float) -> float:
    """exp, but infinite instead of an OverflowError: a diverged model still gets its report."""
    return math.exp(loss) if not loss > 700 else math.inf
