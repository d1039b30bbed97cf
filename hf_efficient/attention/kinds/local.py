"""Local attention: softmax over a window of near keys, plus a few global tokens. O(n * window) time and memory.

    out_i = sum_{j in W(i)} softmax_j(scaling q_i . k_j + bias_(j-i)) v_j
    W(i) = {|i-j| <= window}                bidirectional (Longformer 2020, arXiv 2004.05150)
    W(i) = {i - window < j <= i}            causal (Mistral 2023, arXiv 2310.06825; transformers' `sliding_window`)

The first `global_tokens` real tokens are seen by all and, when not causal, see all.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> local_attention(query, key, value, window=64, global_tokens=1).shape
    torch.Size([1, 12, 4096, 64])

How: `engines.windowed` cuts the queries into blocks, each with the window of keys that it can see; `engines.streaming`
keeps the global tokens near in rotary models.
"""

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ..engines.flex import flex_local_attention, use_flex
from ..engines.global_tokens import GlobalTokens, columns, find_globals, global_rows, meet_globals, no_globals
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
    zero_padding,
)
from ..engines.streaming import Places, beside, near_tokens
from ..engines.windowed import Keys, exported, find_band, windowed
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
        if self.config.streaming and (query.shape[2] != key.shape[2] or not kwargs["causal"]):
            raise UnsupportedModelError(
                "streaming=True is for causal attention over the tokens of one call, or from a cache that the model "
                "itself has filled, in eval mode and not compiled. Leave streaming out."
            )
        return local_attention(query, key, value, key_mask, window=window, global_tokens=global_tokens, **kwargs)

    def decode(self, query, key, value, key_mask, state, **kwargs):
        window, global_tokens = self.config.window, self.config.global_tokens
        return local_decode(query, key, value, key_mask, state, window=window, global_tokens=global_tokens, **kwargs)

    def macs(self, length, causal):
        reach = self.config.window if causal else 2 * self.config.window + 1
        return 2 * min(length, reach + self.config.global_tokens) * self.shape.dim


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
    rotary: Places | None = None,
) -> Tensor:
    """Softmax attention over a window; shapes and parameters as in `full_attention`.

    Parameters:
        window: bidirectional: keys with |i - j| <= window; causal: the last `window` keys including the token itself.
        global_tokens: the number of first real tokens (padding not counted) that all see and, if not causal, see all.
        rotary: cosines and sines of the places of the tokens: the global ones are kept near (`engines.streaming`).

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
    band = find_band(window, causal)
    if not torch.compiler.is_exporting():  # an exported program keeps one path for all lengths
        if window >= seen or (not global_tokens and seen <= sum(band)):
            plain = {name: value for name, value in options._asdict().items() if name != "global_tokens"}
            return full_attention(query, key, value, key_mask, window=window, **plain)
        band = band._replace(block=min(band.block, length))
    if logits is None and pairs is None and rotary is None and use_flex(query, key, value, dropout):
        return flex_local_attention(query, key, value, key_mask, window, options)
    tokens, visible = None, real_keys(key, key_mask)
    if global_tokens:
        tokens, visible = find_globals(key, value, visible.expand(key.shape[0], -1), global_tokens)
        tokens = tokens if rotary is None else tokens._replace(added=_nearer(query, tokens, rotary, window, scaling))
    is_plain = bias is None and pairs is None and rotary is None and not dropout
    if length == seen and is_plain and torch.compiler.is_exporting():
        out = exported(query, Keys(key, value, visible, tokens, seen), band, options)
    else:
        if length != seen:  # decoding: of a long cache, touch only the keys in a window
            first = max(seen - length - band.left, 0)
            key, value, visible = key[:, :, first:], value[:, :, first:], visible[:, first:]
            key_mask = None if key_mask is None else key_mask[:, first:]
        key, value = zero_padding(key, value, key_mask)
        out = windowed(query, Keys(key, value, visible, tokens, seen), band, options)
    if tokens is not None and not causal:  # then there are as many keys as queries, and all of them are still there
        rows = global_rows(query, key, value, key_mask, tokens, options)
        out = out.scatter(2, tokens.index[:, None, :, None].expand_as(rows), rows)
    return out


def _nearer(query: Tensor, tokens: GlobalTokens, rotary: Places, window: int, scaling: float | None) -> Tensor:
    """[B,H,T,g]: what the scores of the global tokens change by where they are kept near."""
    distance = torch.arange(query.shape[2], device=query.device) - tokens.index[:, :1]
    return near_tokens(rotary, distance, window, tokens.index.shape[1]).scores(query, tokens.key, scaling)


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
    rotary: Places | None = None,
) -> tuple[Tensor, State]:
    """Causal `local_attention` of T new tokens after those whose window and global tokens are in `state`.

    Parameters:
        key, value, key_mask: those of the new tokens alone; `bias` spans all, as in `local_attention`.
        state: what the call before returned; None: there are no tokens before.

    Returns:
        [B, H, T, Dv], and the state: key [B,K,m,D], value [B,K,m,Dv] and visible [B,m] of the last m <= window - 1
        tokens; with global tokens also their key [B,K,g,D], value [B,K,g,Dv] and age [B,g] (see `meet_globals`), and
        with `rotary` the cosines and sines [B,R] of the place from which they are seen.
    """
    check_window(window)
    check_shapes(query, key, value, key_mask, None)
    length = query.shape[2]
    visible = real_keys(key, key_mask).expand(key.shape[0], -1)
    global_state, edge, added = (), (), None
    if global_tokens:
        before = state[3:6] if state else no_globals(key, value, global_tokens)
        global_state, visible = meet_globals(before, key, value, visible)
        if rotary is not None:
            distance = global_state[2][:, :1] - length + torch.arange(length, device=key.device)  # of the new tokens
            near = near_tokens(rotary, distance, window, global_tokens, state[6:] if state else ())
            added, edge = near.scores(query, global_state[0], scaling), near.edge
    if state is None:
        sees = {"window": window, "global_tokens": global_tokens, "causal": True}
        out = local_attention(
            query, key, value, key_mask, **sees, scaling=scaling, bias=bias, logits=logits, pairs=pairs, rotary=rotary
        )
    else:
        old_key, old_value, old_visible = state[:3]
        key, value = zero_padding(key, value, key_mask)
        key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        visible = torch.cat([old_visible, visible], 1)
        keys = Keys(key, value, visible, None, key.shape[2])
        options = Options(True, scaling, bias=bias, logits=logits, pairs=pairs)
        if length == 1:
            out = _decode_one(query, keys, (*global_state, added), options)
        else:
            out = _decode_some(query, keys, (*global_state, added), options, window)
    first = max(key.shape[2] - window + 1, 0)
    key, value, visible = key[:, :, first:], value[:, :, first:], visible[:, first:]
    if state is None or length > 1:  # no view that would keep a whole prompt in memory
        key, value = zero_padding(key, value, visible)
        visible = visible.clone()
    return out, (key, value, visible, *global_state, *edge)


def _decode_some(query: Tensor, keys: Keys, globals_: tuple, options: Options, window: int) -> Tensor:
    """[B,H,T,Dv]: as `_decode_one` for several: some of the kept keys may be out of the window of some new token."""
    *global_state, added = globals_
    if global_state:
        global_key, global_value, age = global_state
        index = keys.key.shape[2] - age  # of an old one below 0
        keys = keys._replace(tokens=GlobalTokens(index, age > 0, global_key, global_value, added))
    band = find_band(window, causal=True)
    return windowed(query, keys, band._replace(block=min(band.block, query.shape[2])), options)


def _decode_one(query: Tensor, keys: Keys, globals_: tuple, options: Options) -> Tensor:
    """[B,H,1,Dv]: one new token, in whose window all the kept keys are. `globals_`: key, value and age of the global
    tokens, if there are any, and what their scores change by."""
    key, value, visible, _, _ = keys
    bias, scores, (*global_state, added) = options.bias, None, globals_
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
    if added is not None:
        pairs = beside(added, pairs, keys.key.shape[2])
    scores = None if scores is None else scores.unsqueeze(2).to(query.dtype)
    mask = join_masks(visible[:, None, None, :], scores, pairs)
    key, value = match_heads(query, key, value)
    return sdpa(query, key, value, mask, scaling=options.scaling, logits=options.logits)
