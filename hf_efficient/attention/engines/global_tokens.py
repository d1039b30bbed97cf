"""Global tokens: the first real tokens of each row, which all see and which, if not causal, see all.

`find_globals` looks for them in a whole sequence; `no_globals` and `meet_globals` follow them through decoding, where
their keys and values are kept after they have left the window.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..variant import State
from .parts import Options, join_masks, match_heads, sdpa, zero_padding


class GlobalTokens(NamedTuple):
    """The global tokens of each row: `index` [B,g] in the key sequence, `valid` [B,g] bool; key [B,K,g,D], value
    [B,K,g,Dv], zeros for missing ones; `added` [B,H,T,g] to their scores, if anything is."""

    index: Tensor
    valid: Tensor
    key: Tensor
    value: Tensor
    added: Tensor | None = None


def find_globals(key: Tensor, value: Tensor, real: Tensor, count: int) -> tuple[GlobalTokens, Tensor]:
    """The first `count` real tokens of each row, wherever the padding is; and which keys [B,S] are real, not global.

    The latter are what a window holds: the global ones come as keys of their own.
    """
    rank, index = _rank(real, count)
    valid = index < key.shape[2]
    # A missing token stands for the first one, so that what is written for it is what belongs there.
    index = torch.where(valid, index, index[:, :1]).clamp(max=key.shape[2] - 1)
    chosen = zero_padding(_take(key, index), _take(value, index), valid)
    return GlobalTokens(index, valid, *chosen), real & (rank > count)


def no_globals(key: Tensor, value: Tensor, count: int) -> State:
    """What is known of the global tokens before the first token."""
    batch, kv_heads, _, dim = key.shape
    empty = key.new_zeros(batch, kv_heads, count, dim), value.new_zeros(batch, kv_heads, count, value.shape[-1])
    return *empty, torch.zeros(batch, count, dtype=torch.long, device=key.device)


def meet_globals(before: State, key: Tensor, value: Tensor, real: Tensor) -> tuple[State, Tensor]:
    """Take the new tokens that are global into the kept ones.

    Returns:
        key, value and age [B,g] of the global tokens, where age counts the tokens from it to the last one, both
        included, and 0 means that it is still to come; and which new tokens [B,T] are real and not global.
    """
    old_key, old_value, age = before
    length, count = key.shape[2], age.shape[1]
    is_known = age > 0
    rank, index = _rank(real, count, is_known.sum(1, keepdim=True))
    comes = ~is_known & (index < length)
    new_key, new_value = (_take(x, index.clamp(max=length - 1)) for x in (key, value))
    chosen = comes[:, None, :, None]
    age = torch.where(comes, length - index, torch.where(is_known, age + length, 0))
    state = torch.where(chosen, new_key, old_key), torch.where(chosen, new_value, old_value), age
    return state, real & (rank > count)


def global_rows(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, tokens: GlobalTokens, options: Options
) -> Tensor:
    """[B,H,g,Dv]: the global tokens as queries over all keys."""
    seen, count = query.shape[2], tokens.index.shape[1]
    key, value = match_heads(query, key, value)
    rows = _take(query, tokens.index)
    allowed = None if key_mask is None else key_mask[:, None, None, :].expand(-1, -1, count, -1)
    scores, pairs = None, options.pairs
    if options.bias is not None:
        offset = torch.arange(seen, device=query.device) - tokens.index.unsqueeze(-1) + seen - 1  # [B, g, S]
        scores = options.bias[0][:, offset].movedim(0, 1).to(query.dtype)  # [B, H, g, S]
    if pairs is not None:
        pairs = pairs.expand(query.shape[0], -1, seen, -1)
        rows_of = tokens.index[:, None, :, None].expand(-1, pairs.shape[1], -1, pairs.shape[3])
        pairs = pairs.gather(2, rows_of)  # [B, H or 1, g, S]
    mask = join_masks(allowed, scores, pairs)
    out = sdpa(rows, key, value, mask, scaling=options.scaling, dropout=options.dropout, logits=options.logits)
    return torch.where(tokens.valid[:, None, :, None], out, out.detach())  # a missing token's row is a mere copy


def columns(pairs: Tensor, index: Tensor) -> Tensor:
    """A mask [B or 1, H or 1, T, S] for the keys at index [B,g]: [B, H or 1, T, g]."""
    index = index.clamp(0, pairs.shape[3] - 1)[:, None, None, :]
    pairs = pairs.expand(index.shape[0], -1, -1, -1)
    return pairs.gather(3, index.expand(-1, *pairs.shape[1:3], -1))


def prepend(chosen: Tensor, windows: Tensor) -> Tensor:
    """[B,K,g,D] and [B*N,K,span,D] -> [B*N,K,g+span,D]: the global keys before each block's own."""
    count = windows.shape[0] // chosen.shape[0]
    return torch.cat([chosen.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(0, 1), windows], 2)


def _rank(real: Tensor, count: int, before: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """The rank [B,S] of the real tokens, from `before` + 1; the index [B,g] of the first `count`, S where missing."""
    rank = real.cumsum(-1) + before
    wanted = torch.arange(1, count + 1, device=real.device)
    return rank, (rank.unsqueeze(1) < wanted.unsqueeze(1)).sum(-1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B,K,S,D] at index [B,g] -> [B,K,g,D]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
