"""Zeros that the remaining weights make good: SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

For a matrix W that reads inputs X, the output error ||X W'^T - X W^T||^2 of each row of W is a quadratic with Hessian
H = X^T X + lambda I. Optimal Brain Surgeon removes weight j of a row at the cost w_j^2 / [H^-1]_jj and moves the
others by -w_j / [H^-1]_jj * H^-1[:, j]. Columns are visited from left to right and only those to the right move, so
that all rows share one H^-1, whose Cholesky factor U (H^-1 = U^T U) holds what each column needs.

    new = prune_matrix(weight, rows.T @ rows, choose_n_of_m(2, 4), width=4)     # [out, in] and [tokens, in]

The layers are done one after the other; each reads the outputs of those that are already pruned.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..choose.sparsity import Masks, keep_n_of_m, lowest, shares
from ..cut.linears import Linear, matrix
from ..score.finite import check_finite
from ..score.handing import Batch
from ..score.linear_inputs import collect
from ..score.surgeon import damped_inverse

BLOCK = 128

# (errors [out, stop - start], start, stop) -> bool: which of these columns' weights leave.
Choose = Callable[[Tensor, int, int], Tensor]


@torch.no_grad()
def update_kept(model: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch], masks: Masks) -> None:
    """Zero what the masks name, in place, and update what stays."""
    for linear, gram in _layer_by_layer(model, linears, batches):
        mask = masks[linear].to(gram.device)
        _write(model, linear, prune_matrix(_weight(model, linear, gram), gram, choose_given(mask)))


@torch.no_grad()
def sparsegpt(
    model: PreTrainedModel,
    linears: Sequence[Linear],
    batches: Sequence[Batch],
    ratio: float,
    structure: tuple[int, int] | None = None,
) -> None:
    """Choose and update together, in place: the fraction `ratio` of every matrix, or n of m."""
    counts = dict(zip(linears, shares(ratio, (matrix(model, linear).numel() for linear in linears)), strict=True))
    for linear, gram in _layer_by_layer(model, linears, batches):
        weight = _weight(model, linear, gram)
        if structure is None:
            new = prune_matrix(weight, gram, choose_count(counts[linear], weight.shape), width=BLOCK)
        else:
            m = structure[1]
            new = prune_matrix(weight, gram, choose_n_of_m(*structure), width=m, block=BLOCK // m * m)
        _write(model, linear, new)


def prune_matrix(weight: Tensor, gram: Tensor, choose: Choose, width: int = BLOCK, block: int = BLOCK) -> Tensor:
    """The pruned and updated copy of `weight` `[out, in]`.

    Parameters:
        gram: X^T X, `[in, in]`.
        choose: what leaves, asked for `width` columns at a time with the errors that removing each would make.
        block: columns whose effect on all further ones is added up before it is applied; a multiple of `width`.
    """
    upper = inverse_factor(gram)
    weight, columns = weight.clone(), weight.shape[1]
    removed = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        steps = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if j % width == 0:
                stop = min(j + width, columns)
                errors = (weight[:, j:stop] / upper.diagonal()[j:stop]).square()
                removed[:, j:stop] = choose(errors, j, stop)
            step = weight[:, j] * removed[:, j] / upper[j, j]
            weight[:, j:end] -= step[:, None] * upper[j, j:end]
            steps[:, j - start] = step
        weight[:, end:] -= steps @ upper[start:end, end:]
    return weight.masked_fill(removed, 0)


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (gram + lambda I)^-1.

    Raises:
        DataError: the inputs are not finite.
    """
    check_finite(gram, "What a linear reads on the calibration data")
    return torch.linalg.cholesky(damped_inverse(gram), upper=True)


def choose_given(mask: Tensor) -> Choose:
    """What was chosen before."""
    return lambda errors, start, stop: mask[:, start:stop]


def choose_n_of_m(n: int, m: int) -> Choose:
    """All but the n whose removal would cost most; to be asked for m columns at a time."""
    return lambda errors, start, stop: keep_n_of_m(errors, n, m)


def choose_count(count: int, shape: Sequence[int]) -> Choose:
    """The cheapest of the asked columns, in all rows together; `count` in the whole matrix of this shape."""
    rows, columns = shape

    def choose(errors: Tensor, start: int, stop: int) -> Tensor:
        own = shares(count / (rows * columns), [rows * start, rows * (stop - start)])[1]
        return lowest(errors.flatten(), own).view_as(errors)

    return choose


def _layer_by_layer(model: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch]):
    """(linear, X^T X of its inputs) in the order of the layers; the caller prunes before the next layer is run."""
    for name, group in groupby(linears, lambda linear: linear.layer):
        own = list(group)
        grams = collect(model, own, batches, lambda rows: rows.T @ rows, last_layer=model.get_submodule(name))
        for linear in own:
            gram = grams.get(linear, torch.eye(matrix(model, linear).shape[1], device=model.device))
            check_finite(gram, f"What {linear.name} reads on the calibration data")
            yield linear, gram


def _weight(model: PreTrainedModel, linear: Linear, gram: Tensor) -> Tensor:
    return matrix(model, linear).to(gram.dtype)


def _write(model: PreTrainedModel, linear: Linear, new: Tensor) -> None:
    check_finite(new, f"The reconstructed weight of {linear.name}")
    matrix(model, linear).copy_(new)
