"""Local attention: softmax over a window of near keys, plus a few global tokens. O(n * window) time and memory.

    out_i = sum_{j in W(i)} softmax_j(scaling q_i . k_j + bias_(j-i)) v_j
    W(i) = {|i-j| <= window}                bidirectional (Longformer 2020, arXiv 2004.05150)
    W(i) = {i - window < j <= i}            causal (Mistral 2023, arXiv 2310.06825; transformers' `sliding_window`)

The first `global_tokens` real tokens are seen by all and, when not causal, see all.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> local_attention(query, key, value, window=64, global_tokens=1).shape
    torch.Size([1, 12, 4096, 64])

How: the queries are cut into blocks that become batch rows of one SDPA call. The keys that block b can see are a
window of the padded key sequence; these windows overlap and are a strided view, not a copy. Batch rows lie one after
the other in that sequence, so a window at an edge reads zeros or a neighbouring row's keys: masked either way.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engines.flex import flex_local_attention, use_flex
from ..engines.global_tokens import GlobalTokens, columns, find_globals, global_rows, meet_globals, no_globals, prepend
from ..engines.parts import (
    Options,
    check_positions,
    check_shapes,
    check_window,
    full_attention,
    join_masks,
    match_heads,
    real_keys,
    sdpa,
    section,
    toeplitz,
    zero_padding,
)
from ..engines.pieces import count_blocks, spare_block
from ..variant import AttentionVariant, Logits, State


class LocalAttention(AttentionVariant):
    """`local_attention` with the window and the global tokens of the config."""

    takes_bias = True
    takes_logits = True
    takes_pairs = True
    has_state = True
    keeps_keys = True

    def attend(self, query, key, value, key_mask, **kwargs):
        window, global_tokens = self.config.window, self.config.global_tokens
        return local_attention(query, key, value, key_mask, window=window, global_tokens=global_tokens, **kwargs)

    def decode(self, query, key, value, key_mask, state, **kwargs):
        window, global_tokens = self.config.window, self.config.global_tokens
        return local_decode(query, key, value, key_mask, state, window=window, global_tokens=global_tokens, **kwargs)

    def macs(self, length, causal):
        reach = self.config.window if causal else 2 * self.config.window + 1
        return 2 * min(length, reach + self.config.global_tokens) * self.shape.dim


class _Band(NamedTuple):
    """How far a query sees: `left` keys back, `right` keys ahead; and the queries per `block`."""

    left: int
    right: int
    block: int


class _Keys(NamedTuple):
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


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    window: int,
    global_tokens: int = 0,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """Softmax attention over a window; shapes and parameters as in `full_attention`.

    Parameters:
        window: bidirectional: keys with |i - j| <= window; causal: the last `window` keys including the token itself.
        global_tokens: the number of first real tokens (padding not counted) that all see and, if not causal, see all.

    Returns:
        [B, H, T, Dv]. Where the window covers everything, the same as `full_attention`.

    Raises:
        UnsupportedModelError: bidirectional with T != S (cross attention), or shapes that do not fit together.
    """
    check_window(window)
    check_shapes(query, key, value, key_mask, bias)
    length, seen = query.shape[2], key.shape[2]
    check_positions(length, seen, causal)
    options = Options(causal, scaling, dropout, bias, global_tokens, logits, pairs)
    band = _find_band(window, causal)
    if not torch.compiler.is_exporting():  # an exported program keeps one path for all lengths
        if window >= seen or (not global_tokens and seen <= sum(band)):
            plain = options._asdict()
            del plain["global_tokens"]
            return full_attention(query, key, value, key_mask, window=window, **plain)
        band = band._replace(block=min(band.block, length))
    if logits is None and pairs is None and use_flex(query, key, value, dropout):
        return flex_local_attention(query, key, value, key_mask, window, options)
    tokens, visible = None, real_keys(key, key_mask)
    if global_tokens:
        tokens, visible = find_globals(key, value, visible.expand(key.shape[0], -1), global_tokens)
    is_plain = bias is None and pairs is None and not dropout
    if length == seen and is_plain and torch.compiler.is_exporting():
        out = _exported(query, _Keys(key, value, visible, tokens, seen), band, options)
    else:
        if length != seen:  # decoding: of a long cache, touch only the keys in a window
            first = max(seen - length - band.left, 0)
            key, value, visible = key[:, :, first:], value[:, :, first:], visible[:, first:]
            key_mask = None if key_mask is None else key_mask[:, first:]
        key, value = zero_padding(key, value, key_mask)
        out = _windowed(query, _Keys(key, value, visible, tokens, seen), band, options)
    if tokens is not None and not causal:  # then there are as many keys as queries, and all of them are still there
        rows = global_rows(query, key, value, key_mask, tokens, options)
        out = out.scatter(2, tokens.index[:, None, :, None].expand_as(rows), rows)
    return out


def _find_band(window: int, causal: bool) -> _Band:
    block = 64 if window <= 64 else 128  # larger blocks waste more masked pairs, smaller ones run slower per pair
    return _Band(window - 1, 0, block) if causal else _Band(window, window, block)


def local_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: State | None,
    *,
    window: int,
    global_tokens: int = 0,
    scaling: float | None = None,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Causal `local_attention` of T new tokens after those whose window and global tokens are in `state`.

    Parameters:
        key, value, key_mask: those of the new tokens alone; `bias` spans all, as in `local_attention`.
        state: what the call before returned; None: there are no tokens before.

    Returns:
        [B, H, T, Dv], and the state: key [B,K,m,D], value [B,K,m,Dv] and visible [B,m] of the last m <= window - 1
        tokens; with global tokens also their key [B,K,g,D], value [B,K,g,Dv] and age [B,g] (see `meet_globals`).
    """
    check_window(window)
    check_shapes(query, key, value, key_mask, None)
    length = query.shape[2]
    visible = real_keys(key, key_mask).expand(key.shape[0], -1)
    global_state: State = ()
    if global_tokens:
        before = state[3:] if state else no_globals(key, value, global_tokens)
        global_state, visible = meet_globals(before, key, value, visible)
    if state is None:
        sees = {"window": window, "global_tokens": global_tokens, "causal": True}
        out = local_attention(
            query, key, value, key_mask, **sees, scaling=scaling, bias=bias, logits=logits, pairs=pairs
        )
    else:
        old_key, old_value, old_visible = state[:3]
        key, value = zero_padding(key, value, key_mask)
        key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        visible = torch.cat([old_visible, visible], 1)
        keys = _Keys(key, value, visible, None, key.shape[2])
        options = Options(True, scaling, bias=bias, logits=logits, pairs=pairs)
        if length == 1:
            out = _decode_one(query, keys, global_state, options)
        else:  # some of the kept keys may be out of the window of some new token
            if global_state:
                global_key, global_value, age = global_state
                index = key.shape[2] - age  # of an old one below 0
                keys = keys._replace(tokens=GlobalTokens(index, age > 0, global_key, global_value))
            band = _find_band(window, causal=True)
            out = _windowed(query, keys, band._replace(block=min(band.block, length)), options)
    first = max(key.shape[2] - window + 1, 0)
    key, value, visible = key[:, :, first:], value[:, :, first:], visible[:, first:]
    if state is None or length > 1:  # no view that would keep a whole prompt in memory
        key, value = zero_padding(key, value, visible)
        visible = visible.clone()
    return out, (key, value, visible, *global_state)


def _decode_one(query: Tensor, keys: _Keys, global_state: State, options: Options) -> Tensor:
    """[B,H,1,Dv]: one new token, in whose window all the kept keys are."""
    key, value, visible, _, _ = keys
    bias, scores = options.bias, None
    if bias is not None:
        scores = bias[..., -key.shape[2] :].expand(key.shape[0], -1, -1)  # [B, H, m+1]
    if global_state:
        global_key, global_value, age = global_state
        key, value = torch.cat([global_key, key], 2), torch.cat([global_value, value], 2)
        visible = torch.cat([age > 0, visible], 1)
        if bias is not None and scores is not None:
            to_globals = bias[0][:, (bias.shape[-1] - age).clamp(max=bias.shape[-1] - 1)].transpose(0, 1)  # [B, H, g]
            scores = torch.cat([to_globals, scores], -1)
    pairs = options.pairs
    if pairs is not None:  # of the kept tokens, the global ones first
        end = pairs.shape[3]
        place = torch.arange(end - keys.key.shape[2], end, device=key.device).expand(key.shape[0], -1)
        if global_state:
            place = torch.cat([(end - global_state[2]).clamp(max=end - 1), place], 1)
        pairs = columns(pairs, place)
    scores = None if scores is None else scores.unsqueeze(2).to(query.dtype)
    mask = join_masks(visible[:, None, None, :], scores, pairs)
    key, value = match_heads(query, key, value)
    return sdpa(query, key, value, mask, scaling=options.scaling, logits=options.logits)


def _windowed(query: Tensor, keys: _Keys, band: _Band, options: Options) -> Tensor:
    """[B,H,T,Dv]: every query over the keys of its window, and the global ones."""
    length, tokens, bias = query.shape[2], keys.tokens, options.bias
    key, value = match_heads(query, keys.key, keys.value)
    blocks = _cut(query, keys._replace(key=key, value=value), band)
    center = keys.seen if bias is None else bias.shape[-1] - length + 1  # the keys that bias spans
    pairs = None if options.pairs is None else _pairs_of_blocks(blocks, keys, options.pairs, length)
    mask = _mask(blocks, band, tokens, options, center, pairs)
    if tokens is not None:
        chosen = match_heads(query, tokens.key, tokens.value)
        blocks = blocks._replace(key=prepend(chosen[0], blocks.key), value=prepend(chosen[1], blocks.value))
    extra = {"scaling": options.scaling, "dropout": options.dropout, "logits": options.logits}
    out = sdpa(blocks.query, blocks.key, blocks.value, mask, **extra)
    # [B*N, H, block, Dv] -> [B, H, T, Dv], stored as [B, T, H, Dv], which is what the layers reshape to.
    out = out.unflatten(0, (query.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return section(out, 2, blocks.lead, length)


def _exported(query: Tensor, keys: _Keys, band: _Band, options: Options) -> Tensor:
    """[B,H,T,D]: `_windowed` for a program that leaves Python, without dropout and bias, over as many keys as queries.

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


def _joined(x: Tensor, count: int, band: _Band) -> list[Tensor]:
    """[B,K,S,D] -> what [B,K,N,span,D], the overlapping windows of N blocks, is joined of along the keys."""
    span = band.left + band.block + band.right
    parts = count_blocks(span, band.block)
    blocks = count + parts - 1
    filled = F.pad(x, (0, 0, band.left, blocks * band.block - band.left - x.shape[2]))
    filled = filled.unflatten(2, (blocks, band.block))
    windows = [section(filled, 2, first, count) for first in range(parts)]
    return [*windows[:-1], windows[-1][:, :, :, : span - (parts - 1) * band.block]]


def _cut(query: Tensor, keys: _Keys, band: _Band) -> _Blocks:
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


def _windows(x: Tensor, filled: int, band: _Band) -> Tensor:
    """[B,K,S,D] -> overlapping windows [B*N,K,span,D], a view of one padded copy."""
    extra = filled - x.shape[2]
    if x.shape[0] == 1:
        rows = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, band.left, extra + band.right))
    else:
        rows = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, extra)).flatten(0, 1)
        rows = F.pad(rows, (0, 0, 0, 0, band.left, band.right))
    return rows.unfold(0, band.left + band.block + band.right, band.block).transpose(2, 3)


def _allowed(
    visible: Tensor, position: Tensor, band: _Band, before: int, tokens: GlobalTokens | None, causal: bool, batch: int
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
    blocks: _Blocks, band: _Band, tokens: GlobalTokens | None, options: Options, seen: int, pairs: Tensor | None
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


def _pairs_of_blocks(blocks: _Blocks, keys: _Keys, pairs: Tensor, length: int) -> Tensor:
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
