"""Attention between blocks: every block of queries sees a few whole blocks of keys.

    layout = lay_out(query, key, key_mask, block=64)
    chosen = ...                                   # [B or 1, N, H or 1, k]: the key blocks of each query block
    out = block_attention(query, key, value, key_mask, layout, chosen, Options(causal=False))

`strided` and `topk` differ in what they choose alone. Blocks count real tokens: the first begins at the first real
token of a row, wherever its padding is, so that a row gives the same alone and in any batch. The rank of a real token
is the number of real ones before it. What is computed stands in `gathered.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from .flex import flex_block_attention, use_flex
from .gathered import Rows, Seeing, gathered_attention, positions, take
from .parts import Options, full_attention, match_heads, real_keys, sdpa, section, zero_padding
from .pieces import count_blocks, spare_block
from .sums import without_autocast


class Layout(NamedTuple):
    """The real tokens of each row cut into blocks, and the N blocks of queries.

    block: tokens in a block; a query block has as many places, s, or one for a single query.
    count: [B or 1, 1], real tokens.
    rank: [B or 1, N, s], of the places for queries.
    filled: [B or 1, N, s], which places hold a real query; None: all.
    order: [B, S], the position of each rank in the key sequence; None where that is the rank itself.
    source: [B or 1, N*s], which query is in each place; None: they follow each other from the first.
    slot: [B or 1, T], in which place each query is; for a padded one, a place that is not filled.
    """

    block: int
    count: Tensor
    rank: Tensor
    filled: Tensor | None
    order: Tensor | None
    source: Tensor | None = None
    slot: Tensor | None = None

    @property
    def own_block(self) -> Tensor:
        """[B or 1, N]: the key block that each query block is."""
        return self.rank[..., 0] // self.block


def check_blocks(block_size: int, name: str, count: int, least: int, global_tokens: int) -> None:
    """Raise for sizes that make no blocks."""
    sizes = (("block_size", block_size, 1), (name, count, least), ("global_tokens", global_tokens, 0))
    for field, value, low in sizes:
        if value < low:
            raise ConfigError(f"{field} must be at least {low}, got {value!r}.")


def sees_all(seen: int, block: int, count: int, global_tokens: int) -> bool:
    """Whether `count` blocks, or the global tokens, are all there are. An exported program never says so: it keeps one
    path for all lengths."""
    return not torch.compiler.is_exporting() and (count >= count_blocks(seen, block) or global_tokens >= seen)


def known_mask(key_mask: Tensor | None) -> Tensor | None:
    """None for a mask without padding, where a look at it does not mean to wait for a device."""
    return None if _may_look(key_mask) and bool(key_mask.all()) else key_mask


def _may_look(key_mask: Tensor | None) -> bool:
    return key_mask is not None and key_mask.device.type == "cpu" and not torch.compiler.is_compiling()


def lay_out(query: Tensor, key: Tensor, key_mask: Tensor | None, block: int) -> Layout:
    """Blocks of the keys [B,K,S,D] and of the queries [B,H,T,D], which stand at the last T positions."""
    length, seen = query.shape[2], key.shape[2]
    real = real_keys(key, key_mask)
    is_query = section(real, 1, seen - length, length)
    count = real.sum(-1, keepdim=True)
    past = count - is_query.sum(-1, keepdim=True)
    order = _order(key_mask)
    if length == 1:
        rank = past.unsqueeze(-1)
        return Layout(block, count, rank, rank < count.unsqueeze(-1), order)
    # Queries that go on from a cache may begin in the middle of a block, and then reach into one block more.
    blocks = count_blocks(length, block) if length == seen else (length + block - 2) // block + 1
    blocks = blocks + spare_block()
    first = past // block * block
    rank = (first + torch.arange(blocks * block, device=key.device)).unflatten(1, (blocks, block))
    filled = (rank >= past.unsqueeze(-1)) & (rank < count.unsqueeze(-1))
    if length == seen and order is None:
        is_full = not torch.compiler.is_compiling() and key_mask is None and length % block == 0
        return Layout(block, count, rank, None if is_full else filled, None)
    batch = torch.arange(count.shape[0], device=key.device).unsqueeze(1)
    source = positions(order, batch, count, rank.flatten(1)) - (seen - length)
    # A padded query reads the place after the last real one, which is empty and gives zeros.
    slot = torch.where(is_query, past + is_query.cumsum(-1) - 1, count) - first
    return Layout(block, count, rank, filled, order, source.clamp(min=0), slot)


def _order(key_mask: Tensor | None) -> Tensor | None:
    """[B,S]: the positions of the real tokens, then zeros; None where all padding is known to be on the right."""
    if key_mask is None or (_may_look(key_mask) and bool((key_mask[:, 1:] <= key_mask[:, :-1]).all())):
        return None
    batch, seen = key_mask.shape
    # All padding writes to one place behind the others, which is cut off.
    rank = torch.where(key_mask, key_mask.cumsum(-1) - 1, seen)
    position = torch.arange(seen, device=key_mask.device).expand(batch, -1)
    return rank.new_zeros(batch, seen + 1).scatter(1, rank, position)[:, :seen]


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    layout: Layout,
    chosen: Tensor,
    options: Options,
) -> Tensor:
    """Softmax attention of every query block over its `chosen` key blocks and the global tokens.

    Parameters:
        layout: `lay_out(query, key, key_mask, block)`.
        chosen: [B or 1, N, H or 1, k] block numbers: a block's own first, none twice, and S for a missing one. If
            causal, the others lie before a block's own, and all heads miss the same places.

    Returns:
        [B, H, T, Dv]; zeros for padded queries.
    """
    if options.logits is None and use_flex(query, key, value, options.dropout):
        return flex_block_attention(query, key, value, key_mask, chosen, layout.block, options)
    globals_see = options.global_tokens > 0 and not options.causal
    # Indices lead to real keys alone, except in a row that has none; global tokens as queries look at all keys.
    every_row_is_real = key_mask is None or (_may_look(key_mask) and bool(key_mask.any(-1).all()))
    if globals_see or not every_row_is_real:
        key, value = zero_padding(key, value, key_mask)
    query, key, value = _autocast(query, key, value)
    blocks = _query_blocks(query, layout)
    seeing = Seeing(layout.block, layout.order, key.shape[2], options._replace(bias=None, logits=None))
    with without_autocast(query.device.type):
        rows = _rows(layout, chosen, query.shape[0])
        out = gathered_attention(blocks, key, value, rows, seeing, options.bias, options.logits)  # [B, H, N*s, Dv]
        if globals_see:
            first = _global_rows(blocks, key, value, key_mask, layout, options)
            out = _put_first(out, first)
    return section(out, 2, 0, query.shape[2]) if layout.slot is None else take(out, layout.slot)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, options: Options) -> Tensor:
    """What `block_attention` gives where all blocks are seen."""
    plain = options._asdict()
    del plain["global_tokens"]
    out = full_attention(query, key, value, key_mask, **plain)
    if key_mask is None:
        return out
    is_query = section(key_mask, 1, key.shape[2] - query.shape[2], query.shape[2])
    return out.masked_fill(~is_query[:, None, :, None], 0)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The cast that SDPA does under autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _query_blocks(query: Tensor, layout: Layout) -> Tensor:
    """[B,H,T,D] -> [B,H,N,s,D]; a place without a query holds any other, or zeros."""
    blocks, size = layout.rank.shape[1:]
    if layout.source is not None:
        query = take(query, layout.source)
    elif torch.compiler.is_compiling() or query.shape[2] != blocks * size:
        query = F.pad(query, (0, 0, 0, blocks * size - query.shape[2]))
    return query.unflatten(2, (blocks, size))


def _rows(layout: Layout, chosen: Tensor, batch: int) -> Rows:
    blocks = layout.rank.shape[1]
    row = torch.arange(batch, device=chosen.device)[:, None, None].expand(-1, blocks, -1)
    count = layout.count.unsqueeze(1).expand(-1, blocks, -1)
    fields = (row, chosen, layout.rank, layout.filled, count)
    return Rows(*(None if x is None else x.expand(batch, *x.shape[1:]).flatten(0, 1) for x in fields))


def _global_rows(
    blocks: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, layout: Layout, options: Options
) -> Tensor:
    """[B,H,g,Dv]: the first g real tokens as queries over all keys; zeros for missing ones."""
    count, seen = options.global_tokens, key.shape[2]
    query = blocks.flatten(2, 3)
    # Of g ranks, those beyond the last place (only an exported program has so few) stand for the last one.
    rank = torch.arange(count, device=key.device).clamp(max=query.shape[2] - 1)
    query = query.index_select(2, rank)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if options.bias is not None:
        batch = torch.arange(layout.count.shape[0], device=key.device).unsqueeze(1)
        at = positions(layout.order, batch, layout.count, rank.unsqueeze(0))
        offset = torch.arange(seen, device=key.device) - at.unsqueeze(-1) + seen - 1  # [B or 1, g, S]
        scores = options.bias[0][:, offset].movedim(0, 1).to(query.dtype)  # [B or 1, H, g, S]
        mask = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    missing = None
    if layout.filled is not None:
        missing = ~layout.filled.flatten(1)[:, None, rank, None]
        query = query.masked_fill(missing, 0)
    key, value = match_heads(query, key, value)
    out = sdpa(query, key, value, mask, scaling=options.scaling, dropout=options.dropout, logits=options.logits)
    return out if missing is None else out.masked_fill(missing, 0)


def _put_first(out: Tensor, rows: Tensor) -> Tensor:
    """`out` [B,H,L,Dv] with `rows` [B,H,g,Dv] in its first places."""
    count = rows.shape[2]
    if not torch.compiler.is_exporting():
        return out.slice_scatter(rows, 2, 0, count)
    place = torch.arange(out.shape[2], device=out.device)  # an exported program may have fewer than g of them
    return torch.where((place < count).unsqueeze(-1), rows.index_select(2, place.clamp(max=count - 1)), out)
