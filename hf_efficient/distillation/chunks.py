"""Sums over the rows of large logits, some rows at a time, so that no copy of all of them is ever made.

    total = sum_rows(lambda own, label: F.cross_entropy(own, label, reduction="sum"), logits, (labels,), mask)

The obvious `f(logits[mask]).sum()` keeps several copies of n x V numbers until the backward: the chosen rows, their
softmax, what the divergence multiplies. For a vocabulary that is most of the memory of a step. Here the gradient of
each chunk is computed at once, while its rows are in the cache, and written into the one tensor that the backward
needs anyway (as Liger's fused losses do).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # numbers in one chunk; what has no more of them is not cut

RowLoss = Callable[..., Tensor]


def sum_rows(loss: RowLoss, logits: Tensor, others: Sequence[Tensor], mask: Tensor) -> Tensor:
    """`loss(logits[mask], *(other[mask] for other in others))`, which must be a sum over rows.

    The loss gets its logits in float32 or wider, and gradients go to them alone.

    Shapes: logits [..., classes] with mask [...]; the others begin with the shape of the mask.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() <= CHUNK:
        return loss(logits[mask].to(wide), *(other[mask] for other in others))
    rows = logits.flatten(0, mask.dim() - 1)
    flat = [other.flatten(0, mask.dim() - 1) for other in others]
    return _RowSum.apply(rows, loss, mask.flatten(), wide, *flat)


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: RowLoss, mask: Tensor, wide: torch.dtype, *others: Tensor) -> Tensor:
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide, device=rows.device)
        size = max(1, CHUNK // rows.shape[-1])
        counts = [int(part) for part in torch.stack([part.sum() for part in mask.split(size)]).tolist()]
        for index, count in enumerate(counts):
            part = slice(index * size, (index + 1) * size)
            where: Any = slice(None) if count == len(mask[part]) else mask[part]  # a view, if all of them count
            if gradient is not None and count < len(mask[part]):
                gradient[part] = 0
            if not count:
                continue
            own = rows[part][where].to(wide).detach()
            with torch.set_grad_enabled(gradient is not None):
                value = loss(own.requires_grad_(gradient is not None), *(other[part][where] for other in others))
            if gradient is not None:
                gradient[part][where] = torch.autograd.grad(value, own)[0].to(gradient.dtype)
            total += value.detach()
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # let go of, so that autograd adds to it in place
        if gradient is None:
            raise RuntimeError("The gradient of these logits was used already: a second backward needs a new forward.")
        return (gradient.mul_(output), *[None] * (len(ctx.needs_input_grad) - 1))
