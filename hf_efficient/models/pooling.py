"""One vector for each example, from the hidden states of a model without a head."""

from typing import TYPE_CHECKING

from ..errors import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS = ("mean", "cls", "last", "weighted_mean")


def pool(states: "Tensor", mask: "Tensor", kind: str = "mean") -> "Tensor":
    """The mean of an example's tokens, its first (`cls`) or its last one, or the mean in which the first token counts
    once, the second twice, and so on (`weighted_mean`, Muennighoff 2022, SGPT).

    Shapes: states [batch, positions, width]; mask [batch, positions], or [batch] for images, whose positions all
    count; gives [batch, width]. An example without any token gives zeros.
    """
    import torch  # here, since a recipe is checked by the names alone

    if kind not in POOLINGS:
        raise unknown_name("pooling", kind, POOLINGS)
    where = mask if mask.dim() == 2 else mask[:, None].expand(-1, states.shape[1])
    wide = states.to(torch.promote_types(states.dtype, torch.float32)).masked_fill(~where[..., None], 0)
    if kind == "mean":
        return wide.sum(1) / where.sum(1, keepdim=True).clamp_min(1)
    if kind == "weighted_mean":
        weights = (where.long().cumsum(1) * where)[..., None].to(wide.dtype)
        return (wide * weights).sum(1) / weights.sum(1).clamp_min(1)
    ends = where.long() if kind == "cls" else where.long().cumsum(1)  # argmax gives the first of equals
    return wide[torch.arange(len(wide), device=wide.device), ends.argmax(1)]
