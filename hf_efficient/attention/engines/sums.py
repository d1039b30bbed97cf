"""Sums over keys that attention without a softmax shares between queries, and the care that they take.

    state = sum_j phi(k_j)^T (v_j, 1)        [B,K,M,Dv+1]: numerator and, in the last column, normaliser, side by side

Sums are in float32 at least, whatever the inputs and autocast say: half precision loses the small terms of a long one.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast would round the sums to half precision. Nothing to leave on devices that have none (meta)."""
    active = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def to_sum(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the sums: fp16 and bf16 are summed in fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def group_heads(phi_query: Tensor, phi_key: Tensor) -> Tensor:
    """[B,H,T,M] -> [B,K,G,T,M]: the G query heads of each key/value head."""
    kv_heads = phi_key.shape[1]
    return phi_query.unflatten(1, (kv_heads, phi_query.shape[1] // kv_heads))


def drop_keys(value: Tensor, dropout: float) -> Tensor:
    """[B,K,S,Dv] with whole keys at 0, the others scaled up."""
    return value * F.dropout(torch.ones_like(value[..., :1]), dropout)


def add_to_sums(sums: Tensor | None, phi_key: Tensor, value: Tensor) -> Tensor:
    """[B,K,M,Dv+1]: sum_j phi(k_j)^T (v_j, 1) over these keys, and those before."""
    value = F.pad(value, (0, 1), value=1.0)
    if sums is None:
        return phi_key.mT @ value
    if phi_key.shape[2] == 1:
        return torch.addcmul(sums, phi_key.mT, value)
    return sums + phi_key.mT @ value


def running_sums(first: Tensor, terms: Tensor) -> Tensor:
    """[B,K,N+1,...]: `first`, and `first` with one more of the terms [B,K,N,...] each time."""
    sums = torch.cat([first.unsqueeze(2), terms], 2)
    if torch.compiler.is_compiling():
        return sums.cumsum(2)
    parts = sums.unbind(2)  # several times as fast as cumsum, for a few large terms
    for before, after in pairwise(parts):
        after += before
    return sums


def inverse_of(total: Tensor) -> Tensor:
    """1 / total; 1 where no key is visible and the total is 0, for zeros and finite gradients there."""
    return total.masked_fill(total == 0, 1).reciprocal_()


def fill_up(x: Tensor, first: int, last: int) -> Tensor:
    """Zeros before and after the positions, the last dimension but one; no copy where there is nothing to add."""
    if torch.compiler.is_compiling() or first or last:
        return F.pad(x, (0, 0, first, last))
    return x
