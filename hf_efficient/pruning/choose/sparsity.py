"""From scores and a fraction to masks: which weights become zero. Counts are exact, ties leave in order.

masks = choose_masks(scores, ratio=0.5, allocation="global")       # True: becomes zero
masks = choose_masks(scores, ratio=0.5, structure=(2, 4))          # keep 2 of every 4 consecutive inputs
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...errors import ConfigError
from ...models.anatomy import Anatomy
from ..config import PruningConfig
from ..cut.linears import Linear, find_linears, matrix

Masks = dict[Linear, Tensor]


def choose_masks(
    scores: Mapping[Linear, Tensor],
    ratio: float,
    *,
    allocation: str = "uniform",
    structure: tuple[int, int] | None = None,
    by_row: bool = False,
) -> Masks:
    """Bool `[out, in]` for each matrix of scores `[out, in]`.

    Parameters:
        ratio: the fraction of all weights; reached to one weight, in every matrix and (`by_row`) in every row too.
        allocation: `"global"` compares all weights of the network, `"uniform"` those of one matrix.
        structure: `(n, m)` keeps n of every m consecutive inputs and decides the fraction; the rest is not used.
        by_row: with `"uniform"`, compare the weights of one output row only.
    """
    if structure is not None:
        return {linear: keep_n_of_m(score, *structure) for linear, score in scores.items()}
    if allocation == "global":
        sizes = [score.numel() for score in scores.values()]
        flat = lowest(torch.cat([score.flatten() for score in scores.values()]), round(ratio * sum(sizes)))
        parts = zip(scores.items(), flat.split(sizes), strict=True)
        return {linear: part.view_as(score) for (linear, score), part in parts}
    masks = {}
    counts = shares(ratio, (score.numel() for score in scores.values()))
    for (linear, score), count in zip(scores.items(), counts, strict=True):
        if by_row:
            of_rows = shares(count / score.numel(), [score.shape[1]] * len(score))
            masks[linear] = lowest_in_rows(score, torch.tensor(of_rows))
        else:
            masks[linear] = lowest(score.flatten(), count).view_as(score)
    return masks


def check_structure(anatomy: Anatomy, config: PruningConfig) -> None:
    """ConfigError unless every matrix has whole groups of m inputs; the model may be on the meta device."""
    for linear in find_linears(anatomy) if config.structure else ():
        inputs = matrix(anatomy.model, linear).shape[1]
        if inputs % config.structure[1]:
            raise ConfigError(
                f"mask_structure={config.mask_structure!r} needs matrices whose inputs are a multiple of "
                f"{config.structure[1]}, but {linear.name} has {inputs}. Choose another mask_structure, or None."
            )


def shares(ratio: float, sizes: Iterable[int]) -> list[int]:
    """How many leave from each part, so that the sum over the first parts is always the nearest whole number."""
    counts, before, done = [], 0, 0
    for size in sizes:
        before += size
        counts.append(round(ratio * before) - done)
        done += counts[-1]
    return counts


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool like the flat `scores`: exactly the `count` smallest; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    mask = scores < threshold
    equal = (scores == threshold).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def lowest_in_rows(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Bool like `scores` `[rows, columns]`: the `counts` (one number, or `[rows]`) smallest of each row."""
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < (counts[:, None] if isinstance(counts, Tensor) else counts)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool like `scores` `[out, in]`: in every m consecutive inputs the m - n smallest."""
    return lowest_in_rows(scores.reshape(-1, m), m - n).view_as(scores)
