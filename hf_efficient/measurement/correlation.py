"""Do two lists of numbers rise together? Pearson's and Spearman's correlation, with the jackknife's error.

    rho = spearman(cosines, labels)
    parts = jackknife(spearman, cosines, labels)           # [n]; their mean is rho less its bias, Quenouille 1956

The error is that of the mean of the parts, as of any mean; the paired one of two models that of their differences.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 2000  # pairs that are left out one by one; of more, as many groups of them


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """`[n]` both; nan where one of them has a single value."""
    a, b = (each.double() - each.double().mean() for each in (first, second))
    return (a @ b) / (a.norm() * b.norm())


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """That of the ranks."""
    return pearson(ranks(first), ranks(second))


def ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their places."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()


def jackknife(score: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """`n * score - (n - 1) * score without i` for each pair i; beyond `MOST` pairs for each of so many groups."""
    groups = torch.arange(len(first)).chunk(MOST) if len(first) > MOST else torch.arange(len(first)).split(1)
    whole, kept = score(first, second), torch.ones(len(first), dtype=torch.bool)
    parts = []
    for group in groups:
        kept[group] = False
        parts.append(len(groups) * whole - (len(groups) - 1) * score(first[kept], second[kept]))
        kept[group] = True
    return torch.stack(parts)
