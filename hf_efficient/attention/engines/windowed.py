"""Windows of keys, computed as dense blocks: the queries are cut into blocks that become batch rows of one SDPA call.

The keys that block b can see are a window of the padded key sequence; these windows overlap and are a strided view,
not a copy. Batch rows lie one after the other in that sequence, so a window at an edge reads zeros or a neighbouring
row's keys: masked either way.

    windowed(query, Keys(key, value, visible, tokens, seen), find_band(window, causal=True), options)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..variant import Logits
from .global_tokens import GlobalTokens, columns, prepend
from .parts import Options, join_masks, match_heads, sdpa, section, toeplitz
from .pieces import count_blocks, spare_block
from .streaming import beside


class Band(NamedTuple):
    """How far a query sees: `left` keys back, `right` keys ahead; and the queries per `block`."""

    left: int
    right: int
    block: int


class Keys(NamedTuple):
    """What some queries may see: the last m of `seen` tokens, key [B,K,m,D], value [B,K,m,Dv] and which of them are
    `visible` [B or 1, m]; and the global tokens, which are keys of their own."""

    key: Tensor
    value: Tensor
    visible: Tensor
    tokens: GlobalTokens | None
    seen: int


class _Blocks(NamedTuple):
    """N blocks per batch row: query [B*N,H,block,D], key and value [B*N,K,span,D], `visible` keys [B or 1,N,span],
    `position` [N,block] of the queries in the key sequence, how many keys lie `before` a block's first query, and how
    many added queries `lead` the first block."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    position: Tensor
    before: int
    lead: int


def find_band(window: int, causal: bool) -> Band:
    block = 64 if window <= 64 else 128  # larger blocks waste more masked pairs, smaller ones run slower per pair
    return Band(window - 1, 0, block) if causal else Band(window, window, block)


def windowed(query: Tensor, keys: Keys, band: Band, options: Options) -> Tensor:
    """[B,H,T,Dv]: every query over the keys of its window, and the global ones."""
    length, tokens, bias = query.shape[2], keys.tokens, options.bias
    key, value = match_heads(query, keys.key, keys.value)
    added = None if tokens is None else tokens.added
    rows = query if added is None else torch.cat([query, added], -1)  # cut alike
    blocks = _cut(rows, keys._replace(key=key, value=value), band)
    center = keys.seen if bias is None else bias.shape[-1] - length + 1  # the keys that bias spans
    pairs = None if options.pairs is None else _pairs_of_blocks(blocks, keys, options.pairs, length)
    if added is not None:
        rows, added = blocks.query.tensor_split([query.shape[-1]], -1)
        blocks, pairs = blocks._replace(query=rows), beside(added, pairs, blocks.key.shape[2])
    mask = _mask(blocks, band, tokens, options, center, pairs)
    if tokens is not None:
        chosen = match_heads(query, tokens.key, tokens.value)
        blocks = blocks._replace(key=prepend(chosen[0], blocks.key), value=prepend(chosen[1], blocks.value))
    extra = {"scaling": options.scaling, "dropout": options.dropout, "logits": options.logits}
    out = sdpa(blocks.query, blocks.key, blocks.value, mask, **extra)
    # [B*N, H, block, Dv] -> [B, H, T, Dv], stored as [B, T, H, Dv], which is what the layers reshape to.
    out = out.unflatten(0, (query.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return section(out, 2, blocks.lead, length)


def exported(query: Tensor, keys: Keys, band: Band, options: Options) -> Tensor:
    """[B,H,T,D]: `windowed` for a program that leaves Python, without dropout and bias, over as many keys as queries.

    Other runtimes have no views: the heads stay outside of the blocks, so that no tensor changes its layout, and the
    windows are joined of whole blocks, in one copy. Masked scores are finite, so that a query without keys, always a
    padded one, gives some mean instead of NaN; then all padded keys are finite too, and need no zeros.
    """
    length, tokens = query.shape[2], keys.tokens
    key, value = match_heads(query, keys.key, keys.value)
    band = band._replace(block=32 if max(band.left, band.right) <= 32 else band.block)  # fewer masked pairs
    count = count_blocks(length, band.block) + spare_block()
    rows = F.pad(query, (0, 0, 0, count * band.block - length)).unflatten(2, (count, band.block))
    key_parts, value_parts = _joined(key, count, band), _joined(value, count, band)  # [B, H, N, some keys, D] each
    visible = torch.cat(_joined(keys.visible[:, None, :, None], count, band), 3)
    visible = visible.squeeze(-1).squeeze(1)  # [B or 1, N, span]
    position = torch.arange(count * band.block, device=query.device).unflatten(0, (count, band.block))
    allowed = _allowed(visible, position, band, band.left, tokens, options.causal, query.shape[0])
    if tokens is not None:
        chosen = match_heads(query, tokens.key, tokens.value)
        first = [x.unsqueeze(2).expand(-1, -1, count, -1, -1) for x in chosen]
        key_parts, value_parts = [first[0], *key_parts], [first[1], *value_parts]
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = rows @ torch.cat(key_parts, 3).mT * scaling
    softcap, sinks = options.logits or Logits()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, torch.finfo(scores.dtype).min / 2)
    scores = scores + hidden.unsqueeze(1)
    if sinks is not None:  # one more key for each head, of no value
        column = sinks.to(scores.dtype)[:, None, None, None].expand(*scores.shape[:-1], 1)
        scores, value_parts = (
            torch.cat([scores, column], -1),
            [*value_parts, torch.zeros_like(value_parts[0][..., :1, :])],
        )
    out = scores.softmax(-1) @ torch.cat(value_parts, 3)  # [B, H, N, block, D]
    return section(out.flatten(2, 3), 2, 0, length)


def _joined(x: Tensor, count: int, band: Band) -> list[Tensor]:
    """[B,K,S,D] -> what [B,K,N,span,D], the overlapping windows of N blocks, is joined of along the keys."""
    span = band.left + band.block + band.right
    parts = count_blocks(span, band.block)
    blocks = count + parts - 1
    filled = F.pad(x, (0, 0, band.left, blocks * band.block - band.left - x.shape[2]))
    filled = filled.unflatten(2, (blocks, band.block))
    windows = [section(filled, 2, first, count) for first in range(parts)]
    return [*windows[:-1], windows[-1][:, :, :, : span - (parts - 1) * band.block]]


def _cut(query: Tensor, keys: Keys, band: Band) -> _Blocks:
    """The blocks of queries with the keys that each may see."""
    key, value, visible, _, seen = keys
    length, width = query.shape[2], key.shape[2]
    if length == 1 or (not torch.compiler.is_exporting() and length <= band.block):
        position = torch.arange(seen - length, seen, device=query.device).unsqueeze(0)
        return _Blocks(query, key, value, visible.unsqueeze(1), position, width - length, 0)
    count = count_blocks(width, band.block) + spare_block()
    filled = count * band.block
    # Queries at the position of every key, so that query and key blocks line up; `lead` says how many to cut off.
    rows = F.pad(query, (0, 0, width - length, filled - width))
    rows = rows.unflatten(2, (count, band.block)).transpose(1, 2).flatten(0, 1)
    span = band.left + band.block + band.right
    visible = F.pad(visible, (band.left, filled - width + band.right)).unfold(1, span, band.block)
    position = torch.arange(seen - width, seen - width + filled, device=query.device).unflatten(0, (count, band.block))
    key, value = _windows(key, filled, band), _windows(value, filled, band)
    return _Blocks(rows, key, value, visible, position, band.left, width - length)


def _windows(x: Tensor, filled: int, band: Band) -> Tensor:
    """[B,K,S,D] -> overlapping windows [B*N,K,span,D], a view of one padded copy."""
    extra = filled - x.shape[2]
    if x.shape[0] == 1:
        rows = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, band.left, extra + band.right))
    else:
        rows = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, extra)).flatten(0, 1)
        rows = F.pad(rows, (0, 0, 0, 0, band.left, band.right))
    return rows.unfold(0, band.left + band.block + band.right, band.block).transpose(2, 3)


def _allowed(
    visible: Tensor, position: Tensor, band: Band, before: int, tokens: GlobalTokens | None, causal: bool, batch: int
) -> Tensor:
    """[B,N,block,keys]: what queries see of the global keys, then of the `visible` [B or 1,N,span] ones."""
    device, span, block = visible.device, visible.shape[2], position.shape[1]
    distance = torch.arange(span, device=device) - torch.arange(block, device=device)[:, None] - before
    inside = (distance >= -band.left) & (distance <= band.right)
    allowed = visible.unsqueeze(2) & inside  # [B or 1, N, block, span]
    allowed = allowed.expand(batch, -1, -1, -1)
    if tokens is None:
        return allowed
    seen_by = tokens.valid[:, None, None, :]  # [B, 1, 1, g]
    if causal:
        seen_by = seen_by & (tokens.index[:, None, None, :] <= position[..., None])
    return torch.cat([seen_by.expand(*allowed.shape[:3], -1), allowed], -1)


def _mask(
    blocks: _Blocks, band: Band, tokens: GlobalTokens | None, options: Options, seen: int, pairs: Tensor | None
) -> Tensor:
    """What the blocks' queries may see: bool [B*N,1,block,keys], or scores [B*N,H,block,keys] with a bias."""
    batch = blocks.query.shape[0] // blocks.visible.shape[1]
    block, span, bias = blocks.query.shape[2], blocks.key.shape[2], options.bias
    allowed = _allowed(blocks.visible, blocks.position, band, blocks.before, tokens, options.causal, batch)
    allowed = allowed.flatten(0, 1).unsqueeze(1)
    if bias is None:
        return join_masks(allowed, None, pairs)
    # [1, H, block, span]: bias[seen - 1] is distance 0; the ends are filled up where a block is longer than the input.
    first = blocks.before + block
    scores = F.pad(bias, (first, span))[..., seen : seen + block + span - 1]
    scores = toeplitz(scores, block, span)
    if tokens is not None:
        offset = tokens.index[:, None, None, :] - blocks.position[..., None] + seen - 1  # [B, N, block, g]
        to_globals = bias[0][:, offset.clamp(0, bias.shape[-1] - 1)].movedim(0, 2).flatten(0, 1)  # [B*N, H, block, g]
        scores = torch.cat([to_globals, scores.expand(to_globals.shape[0], -1, -1, -1)], -1)
    return join_masks(allowed, scores.to(blocks.query.dtype), pairs)


def _pairs_of_blocks(blocks: _Blocks, keys: Keys, pairs: Tensor, length: int) -> Tensor:
    """[B*N, H or 1, block, keys]: the mask [B or 1, H or 1, T or 1, S] for the keys of each block, the global ones
    first. Of what a block holds beyond the sequence any pair will do: it is not visible."""
    span, ahead = blocks.visible.shape[2], pairs.shape[3] - keys.seen  # tokens that are no longer among the keys
    batch = blocks.query.shape[0] // blocks.position.shape[0]
    pairs = pairs.expand(batch, -1, length, -1)
    row = (blocks.position - (keys.seen - length)).clamp(0, length - 1)  # [N, block]
    first = blocks.position[:, :1] - blocks.before + ahead
    column = (first + torch.arange(span, device=pairs.device)).clamp(0, pairs.shape[3] - 1)  # [N, span]
    parts = [pairs[:, :, row[:, :, None], column[:, None, :]]]  # [B, H or 1, N, block, span]
    if keys.tokens is not None:
        parts.insert(0, columns(pairs, keys.tokens.index + ahead)[:, :, row])
    return torch.cat(parts, -1).transpose(1, 2).flatten(0, 1)
