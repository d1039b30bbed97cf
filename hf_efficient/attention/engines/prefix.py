"""Softmax-weighted means of everything so far, at every position: the softmax of a prefix, for all prefixes in O(n).

    L_i = log sum_(j<=i) exp(score_j),    mean_i = sum_(j<=i) exp(score_j - L_i) x_j

    >>> import torch
    >>> totals, (means,) = prefix_means(torch.randn(4, 1000), (torch.randn(4, 1000, 64),))
    >>> means.shape
    torch.Size([4, 1000, 64])

Nothing overflows, and nothing looks ahead: every weight is at most 1 by the L of its own row. (L, mean) of the last
position is all that later ones need of the past.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # the weights inside a chunk cost n * CHUNK, the sums of the chunks n / CHUNK


def prefix_means(
    scores: Tensor, xs: tuple[Tensor, ...], real: Tensor | None = None, past: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scores [..,T] and each x [..,T,E] -> the totals L [..,T] and the means [..,T,E].

    Parameters:
        xs: the x, zeros at positions that are not `real` [.., T] (None: all are).
        past: L and the means of the position before.

    Returns:
        L, and a mean for each x; zeros before the first real position.
    """
    if real is not None:
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    totals = _running_logsumexp(scores)
    if past is None:
        return totals, _prefix_sums(scores, totals, xs)
    before, *old_means = (part.unsqueeze(dim) for part, dim in zip(past, (-1, *[-2] * len(xs)), strict=True))
    totals = torch.logaddexp(totals, before)  # the past counts as one position more, of score L and value mean
    decay = (before - totals).exp().unsqueeze(-1)
    sums = _prefix_sums(scores, totals, xs)
    return totals, tuple(new.addcmul_(decay, old) for new, old in zip(sums, old_means, strict=True))


def _running_logsumexp(scores: Tensor) -> Tensor:
    """log sum_(j<=i) exp(scores_j) along the last dimension."""
    if torch.compiler.is_exporting():
        return _chunked_logsumexp(scores)
    totals = scores.detach().logcumsumexp(-1)
    if scores.requires_grad:  # its own gradient takes differences of logarithms; this one, whose value is 0, does not
        totals = totals + _prefix_sums(scores, totals, (torch.ones_like(scores).unsqueeze(-1),))[0].squeeze(-1).log()
    return totals


def _chunked_logsumexp(scores: Tensor) -> Tensor:
    """The same in operators that ONNX has."""
    low = torch.finfo(scores.dtype).min
    chunks = F.pad(scores, (_missing(scores), 0), value=low).unflatten(-1, (-1, CHUNK))
    # [.., N, C] inside each chunk; its last column, running once more, is what lies before the next chunk.
    inside = _logsumexp_so_far(chunks)
    before = F.pad(_logsumexp_so_far(inside[..., -1]), (1, -1), value=low)
    both = torch.stack(torch.broadcast_tensors(inside, before.unsqueeze(-1)), -1)
    return _logsumexp(both).flatten(-2)[..., -scores.shape[-1] :]


def _logsumexp_so_far(scores: Tensor) -> Tensor:
    return _logsumexp(scores.unsqueeze(-2).masked_fill(_future(scores), torch.finfo(scores.dtype).min))


def _logsumexp(scores: Tensor) -> Tensor:
    """Of the last dimension. ONNX's own gives -inf for very low scores."""
    top = scores.amax(-1, keepdim=True)
    return top.squeeze(-1) + (scores - top).exp().sum(-1).log()


def _future(scores: Tensor) -> Tensor:
    """[C, C], True where the key lies ahead of the query."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    return position > position[:, None]


def _prefix_sums(scores: Tensor, totals: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """sum_(j<=i) exp(scores_j - totals_i) x_j for each x: [..,T], [..,T] and [..,T,E] -> [..,T,E].

    No weight is above 1, because `totals` is a running log-sum-exp. Dense inside chunks; the sums of whole chunks,
    each relative to the total at its end, are the same task again.
    """
    length, compiling = scores.shape[-1], torch.compiler.is_compiling()
    # [.., T] and [.., T, E] become [.., N, C] and [.., N, C, E].
    if not compiling and length <= CHUNK:
        return _prefix_sums_dense(scores, totals, xs)
    extra, low = _missing(scores), torch.finfo(scores.dtype).min
    if compiling or extra:  # filled up in front, so that the last chunk ends with the last position
        scores, totals = (F.pad(x, (extra, 0), value=low) for x in (scores, totals))
        xs = tuple(F.pad(x, (0, 0, extra, 0)) for x in xs)
    scores, totals = (x.unflatten(-1, (-1, CHUNK)) for x in (scores, totals))
    sums = _prefix_sums_dense(scores, totals, tuple(x.unflatten(-2, (-1, CHUNK)) for x in xs))
    ends = totals[..., -1]  # [.., N]
    whole = _prefix_sums_dense if compiling else _prefix_sums  # compiled, the number of levels must not depend on T
    earlier = whole(ends, ends, tuple(x[..., -1, :].clone() for x in sums))
    # What came before a chunk is relative to the total at that chunk's start; every position brings it to its own.
    decay = (F.pad(ends, (1, -1), value=low).unsqueeze(-1) - totals).exp().unsqueeze(-1)
    shifted = (F.pad(x, (0, 0, 1, -1)).unsqueeze(-2) for x in earlier)
    return tuple(
        x.addcmul_(decay, before).flatten(-3, -2)[..., extra:, :] for x, before in zip(sums, shifted, strict=True)
    )


def _missing(scores: Tensor) -> int:
    """Positions to whole chunks. Compiled, one chunk more: a program is made for one chunk, or for several."""
    return -scores.shape[-1] % CHUNK + (CHUNK if torch.compiler.is_compiling() else 0)


def _prefix_sums_dense(scores: Tensor, totals: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = (scores.unsqueeze(-2) - totals.unsqueeze(-1)).masked_fill_(_future(scores), float("-inf")).exp_()
    return tuple(weights @ x for x in xs)
