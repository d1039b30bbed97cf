"""Top-k attention: every block sees the key blocks that fit its content. O(n * top_k * block + (n / block)^2).

    Block I sees itself and the top_k - 1 blocks J of the largest  p_I . mean_{j in J} k_j
    p_I = mean of the queries of I              bidirectional
    p_I = first query of I, J before I          causal: what the choice is made of lies in the past of every query

(Blocks by their mean key: MoBA 2025, arXiv 2502.13189, and NSA 2025, arXiv 2502.11089; choosing by content: Routing
Transformer 2021, arXiv 2003.05997.) Every query head chooses for itself. The choice has no gradient: queries and keys
learn from the attention over what was chosen. Scores are compared as float32; among equal ones the later block wins.
The first `global_tokens` real tokens are seen by all and, if not causal, see all. Blocks count real tokens.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> topk_attention(query, key, value, block_size=64, top_k=8).shape
    torch.Size([1, 12, 4096, 64])
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedModelError
from ..engines.blocks import Layout, block_attention, check_blocks, dense_attention, known_mask, lay_out, sees_all
from ..engines.gathered import is_by_token, take
from ..engines.parts import Options, check_positions, check_shapes
from ..engines.pieces import count_blocks
from ..engines.sums import without_autocast
from ..variant import AttentionVariant, Logits, State


class TopkAttention(AttentionVariant):
    """`topk_attention` with the blocks and the global tokens of the config."""

    takes_logits = True
    has_state = True
    keeps_keys = True

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        return topk_attention(query, key, value, key_mask, **self._sizes(), **kwargs)

    def decode(self, query, key, value, key_mask, state, *, bias=None, **kwargs):
        return topk_decode(query, key, value, key_mask, state, **self._sizes(), **kwargs)

    def macs(self, length, causal):
        config, dim = self.config, self.shape.dim
        keys = min(length, config.top_k * config.block_size + config.global_tokens)
        return 2 * keys * dim + count_blocks(length, config.block_size) * dim // config.block_size

    def _sizes(self):
        config = self.config
        return {"block_size": config.block_size, "top_k": config.top_k, "global_tokens": config.global_tokens}


class _State(NamedTuple):
    """After S tokens: key [B,K,S,D], value [B,K,S,Dv], mask [B,S], the sum of the keys of each block [B,K,M,D] in
    float32 or more, and the first query of the last block [B,H,D]."""

    key: Tensor
    value: Tensor
    mask: Tensor
    sums: Tensor
    first: Tensor


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    block_size: int,
    top_k: int,
    global_tokens: int = 0,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    logits: Logits | None = None,
) -> Tensor:
    """Softmax attention over the best blocks; shapes and parameters as in `full_attention`.

    Parameters:
        block_size: tokens in a block.
        top_k: the blocks that a block sees, itself included.
        global_tokens: the number of first real tokens (padding not counted) that all see and, if not causal, see all.

    Returns:
        [B, H, T, Dv]; zeros for padded queries. Where top_k covers all blocks, the same as `full_attention`.

    Raises:
        ConfigError: a size out of range.
        UnsupportedModelError: T != S (cross attention, or decoding from a cache of keys), or shapes that do not fit
            together.
    """
    check_blocks(block_size, "top_k", top_k, 1, global_tokens)
    check_shapes(query, key, value, key_mask, None)
    seen = key.shape[2]
    _check_whole(query.shape[2], seen, causal)
    key_mask = known_mask(key_mask)
    options = Options(causal, scaling, dropout, global_tokens=global_tokens, logits=logits)
    if sees_all(seen, block_size, top_k, global_tokens):
        return dense_attention(query, key, value, key_mask, options)
    layout = lay_out(query, key, key_mask, block_size)
    with torch.no_grad(), without_autocast(query.device.type):
        blocks, owner = layout.rank.shape[1], _owners(key, key_mask, block_size)
        sums = _sums(key, owner, blocks)
        probes = _first_queries(query, layout) if causal else _sums(query, owner, blocks)
    chosen = _choose(probes, sums, layout, top_k, causal, seen)
    return block_attention(query, key, value, key_mask, layout, chosen, options)


def _check_whole(length: int, seen: int, causal: bool) -> None:
    if causal and length < seen:
        raise UnsupportedModelError(
            f"Top-k attention chooses keys by the first query of a block, which a cache of keys does not hold: got "
            f"{length} queries and {seen} keys. Decode with `topk_decode`, or without a cache."
        )
    check_positions(length, seen, causal)


def topk_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: State | None,
    *,
    block_size: int,
    top_k: int,
    global_tokens: int = 0,
    scaling: float | None = None,
    logits: Logits | None = None,
) -> tuple[Tensor, State]:
    """Causal `topk_attention` of T new tokens after those in `state`.

    Parameters:
        key, value, key_mask: those of the new tokens alone.
        state: what the call before returned (see `_State`); None: there are no tokens before.
    """
    check_blocks(block_size, "top_k", top_k, 1, global_tokens)
    check_shapes(query, key, value, key_mask, None)
    before = _no_tokens(query, key, value) if state is None else _State(*state)
    real = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    mask = torch.cat([before.mask, real], 1)
    whole_key, whole_value = torch.cat([before.key, key], 2), torch.cat([before.value, value], 2)
    seen, known = mask.shape[1], known_mask(mask)
    layout = lay_out(query, whole_key, known, block_size)
    options = Options(True, scaling, global_tokens=global_tokens, logits=logits)
    with torch.no_grad(), without_autocast(query.device.type):
        owner = _owners(key, real, block_size, before.mask.sum(-1, keepdim=True))
        blocks = count_blocks(seen, block_size)
        sums = F.pad(before.sums, (0, 0, 0, blocks - before.sums.shape[2])) + _sums(key, owner, blocks)
        first = _first_queries(query, layout, before.first)
    if sees_all(seen, block_size, top_k, global_tokens):
        out = dense_attention(query, whole_key, whole_value, known, options)
    else:
        chosen = _choose(first, sums, layout, top_k, True, seen)
        out = block_attention(query, whole_key, whole_value, known, layout, chosen, options)
    last = ((layout.count - 1) // block_size - layout.own_block[:, :1]).clamp(min=0)[:, None, :, None]
    first = first.gather(2, last.expand(*first.shape[:2], -1, first.shape[-1])).squeeze(2)
    return out, (whole_key, whole_value, mask, sums, first)


def _no_tokens(query: Tensor, key: Tensor, value: Tensor) -> _State:
    no_mask = key.new_zeros(key.shape[0], 0, dtype=torch.bool)
    sums = key.new_zeros(*key.shape[:2], 0, key.shape[3], dtype=torch.promote_types(key.dtype, torch.float32))
    return _State(key[:, :, :0], value[:, :, :0], no_mask, sums, torch.zeros_like(query[:, :, 0]))


def _owners(key: Tensor, key_mask: Tensor | None, block: int, past: Tensor | int = 0) -> Tensor:
    """[B or 1, S]: the block of each token, -1 at padding; `past` real tokens lie before."""
    if key_mask is None:
        return torch.arange(key.shape[2], device=key.device).unsqueeze(0) // block
    return torch.where(key_mask, (past + key_mask.cumsum(-1) - 1) // block, -1)


def _sums(x: Tensor, owner: Tensor, blocks: int) -> Tensor:
    """[B,h,S,D] -> [B,h,blocks,D]: the sum of each block, in float32 or more."""
    batch, heads, _, dim = x.shape
    row = torch.arange(batch, device=x.device)[:, None, None] * heads + torch.arange(heads, device=x.device)[:, None]
    at = row * (blocks + 1) + owner.unsqueeze(1) + 1  # [B, h, S]; the first of blocks + 1 sums takes the padding
    if is_by_token(x):
        x, at = x.transpose(1, 2), at.transpose(1, 2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = x.new_zeros(batch * heads * (blocks + 1), dim).index_add(0, at.flatten(), x.flatten(0, 2))
    return sums.unflatten(0, (batch, heads, blocks + 1))[:, :, 1:]


def _first_queries(query: Tensor, layout: Layout, before: Tensor | None = None) -> Tensor:
    """[B,H,N,D]: the first query of each block; `before` [B,H,D] that of a block which began earlier."""
    blocks, size = layout.rank.shape[1:]
    if layout.source is None:
        index = (torch.arange(blocks, device=query.device) * size).clamp(max=query.shape[2] - 1).unsqueeze(0)
    else:
        index = layout.source.unflatten(1, (blocks, size))[..., 0]
    first = take(query, index)
    if before is None:
        return first
    is_new = layout.rank[..., 0] % layout.block == 0
    if layout.filled is not None:
        is_new = is_new & layout.filled[..., 0]
    return torch.where(is_new[:, None, :, None], first, before.unsqueeze(2))


def _choose(probes: Tensor, sums: Tensor, layout: Layout, top_k: int, causal: bool, missing: int) -> Tensor:
    """[B,N,H,top_k]: each block's own number, then the best others; `missing` where there are fewer.

    probes [B,H,N,D]: what the blocks choose by, at any scale; sums [B,K,M,D].
    """
    with torch.no_grad(), without_autocast(sums.device.type):
        ranked = _rank(probes, sums, layout, causal)
    if torch.compiler.is_exporting():  # an exported program may meet fewer blocks
        ranked = F.pad(ranked, (0, top_k - 1), value=float("-inf"))
    best = ranked.topk(top_k - 1)
    others = torch.where(best.values == float("-inf"), missing, best.indices)
    own_block = layout.own_block[:, None, :, None].expand(*others.shape[:3], -1)
    return torch.cat([own_block, others], -1).transpose(1, 2)


def _rank(probes: Tensor, sums: Tensor, layout: Layout, causal: bool) -> Tensor:
    """[B,H,N,M]: how well key block M fits; -inf where it is the own one, has no tokens or, causal, is a later one."""
    block, own_block = layout.block, layout.own_block.unsqueeze(-1)  # [B or 1, N, 1]
    number = torch.arange(sums.shape[2], device=sums.device)
    tokens = (layout.count - number * block).clamp(1, block)  # [B or 1, M]
    means = sums / tokens[:, None, :, None]
    grouped = probes.to(sums.dtype).unflatten(1, (sums.shape[1], -1))  # [B, K, H/K, N, D]
    scores = (grouped @ means.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    candidate = number < own_block if causal else (number * block < layout.count.unsqueeze(-1)) & (number != own_block)
    return _distinct(scores).masked_fill_(~candidate.unsqueeze(1), float("-inf"))


def _distinct(scores: Tensor) -> Tensor:
    """Float32 scores [..., M] as float64 ones in the same order, equal ones in the order of their blocks.

    What is added is smaller than the distance between two float32 numbers. Otherwise equal scores would be sorted by
    how many there are, and a row would not give the same in a batch, or token by token.
    """
    scores = scores.float()
    number = torch.arange(scores.shape[-1], device=scores.device)
    return scores.double().abs_().mul_(2.0**-45).add_(2.0**-180).mul_(number).add_(scores)
