"""Sums over the rows of large logits, some rows at a time, so that no copy of all of them is ever made.

    total = RowSum(lambda own, label: F.cross_entropy(own, label, reduction="sum"), (labels,), mask).of(logits)

The obvious `f(logits[mask]).sum()` keeps several copies of n x V numbers until the backward: the chosen rows, their
softmax, what the divergence multiplies. For a vocabulary that is most of the memory of a step. Here the gradient of
each chunk is computed at once, while its rows are in the cache, and written into the one tensor that the backward
needs anyway (as Liger's fused losses do); several sums over the same logits share it (`sum_together`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # numbers in one chunk; what has no more of them is not cut

RowLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class RowSum:
    """`loss(logits[mask], *(other[mask] for other in others))`, which must be a sum over rows.

    The loss gets its logits in float32 or wider, and gradients go to them alone.

    Shapes: logits [..., classes] with mask [...]; the others begin with the shape of the mask.
    """

    loss: RowLoss
    others: Sequence[Tensor]
    mask: Tensor

    def of(self, logits: Tensor) -> Tensor:
        """The sum over these logits."""
        return sum_together([self], logits, [1.0])[0]

    def flat(self) -> "RowSum":
        """Of logits [rows, classes]: mask [rows], the others [rows, ...]."""
        return RowSum(self.loss, [other.flatten(0, self.mask.dim() - 1) for other in self.others], self.mask.flatten())

    def value(self, own: Tensor, part: slice, where: Any, *, all_count: bool) -> Tensor:
        """Over `own`, the rows of a part of the flat logits that `where` chooses; `all_count`: they all count here."""
        inside = where if all_count else self.mask[part]
        rows = own if all_count else own[inside[where]]
        return self.loss(rows, *(other[part][inside] for other in self.others))


def sum_together(sums: Sequence[RowSum], logits: Tensor, shares: Sequence[Tensor | float]) -> tuple[Tensor, ...]:
    """Several sums over the rows of the same logits, whose gradients are written once: each must reach the loss times
    its share, or the same multiple of its share as the others.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() <= CHUNK:
        return tuple(
            each.loss(logits[each.mask].to(wide), *(other[each.mask] for other in each.others)) for each in sums
        )
    rows = logits.flatten(0, sums[0].mask.dim() - 1)
    return _RowSums.apply(rows, wide, [each.flat() for each in sums], shares)


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, wide: torch.dtype, sums: Sequence[RowSum], shares: Sequence[Tensor | float]
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        totals = [torch.zeros((), dtype=wide, device=rows.device) for _ in sums]
        # The rows that count for any of the sums; where all sums count the same, their own masks need not be applied.
        mask = torch.stack([each.mask for each in sums]).any(0)
        all_count = [torch.equal(each.mask, mask) for each in sums]
        size = max(1, CHUNK // rows.shape[-1])
        # One transfer for all chunks: asking each chunk for its count would make a GPU wait as often.
        counts = [int(part) for part in torch.stack([part.sum() for part in mask.split(size)]).tolist()]
        for index, count in enumerate(counts):
            part = slice(index * size, (index + 1) * size)
            where: Any = slice(None) if count == len(mask[part]) else mask[part]  # a view, if all of them count
            if gradient is not None and count < len(mask[part]):
                gradient[part] = 0
            if not count:
                continue
            own = rows[part][where].to(wide).detach()  # [count, classes], the only wide copy there is at a time
            with torch.set_grad_enabled(gradient is not None):
                own.requires_grad_(gradient is not None)
                values = [
                    each.value(own, part, where, all_count=own_all)
                    for each, own_all in zip(sums, all_count, strict=True)
                ]
                whole = sum(share * value for share, value in zip(shares, values, strict=True))
            if gradient is not None:
                gradient[part][where] = torch.autograd.grad(whole, own)[0].to(gradient.dtype)
            for total, value in zip(totals, values, strict=True):
                total += value.detach()
        ctx.gradient, ctx.shares = gradient, shares
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # let go of, so that autograd adds to it in place
        if gradient is None:
            raise RuntimeError("The gradient of these logits was used already: a second backward needs a new forward.")
        # The gradient holds each sum times its share. autograd says with what factor each really reached the loss (a
        # gradient scaler, accumulation): one common factor can still be multiplied in, different ones cannot.
        factors = torch.stack([output / share for output, share in zip(outputs, ctx.shares, strict=True)])
        if len(factors) > 1 and not torch.allclose(factors, factors[:1], rtol=1e-3):
            raise RuntimeError(f"These sums reached the loss with other shares than {ctx.shares}.")
        return gradient.mul_(factors[0]), None, None, None
