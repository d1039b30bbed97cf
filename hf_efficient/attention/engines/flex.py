"""The block-sparse kinds on CUDA, by FlexAttention (Dong et al. 2024, arXiv 2412.05496).

    if use_flex(query, key, value, dropout):
        return flex_local_attention(query, key, value, key_mask, window=64, causal=True)

A fused kernel visits only the pairs of 128-token blocks of a `BlockMask`, and asks `mask_mod` about each pair of
tokens inside; the masks are built from the layout, never from n x n pairs. Numbers equal the functions of `local.py`
and its siblings, which stay the way for everything `use_flex` declines. HF_EFFICIENT_NO_FLEX=1 turns this file off.

Written where there was no GPU: the masks and flex's eager forward are tested on CPU, the fused kernels, their backward
and their speed have not been run. tests/attention/engines/test_flex.py tests them where there is CUDA.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .parts import Options, zero_padding

BLOCK = 128  # of the kernel
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_DIM = 16  # of a head: the kernel's
MAX_PROGRAMS = 32  # compiled kernels, one for each shape; further shapes take the plain way
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_shapes: set[tuple] = set()


def use_flex(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernels can serve: CUDA with Triton, T == S (training and prefill), one dtype of at most 32 bits
    that autocast leaves alone, no dropout, not inside torch.compile or torch.export."""
    if not query.is_cuda or dropout or not _HAS_TRITON or os.environ.get("HF_EFFICIENT_NO_FLEX") == "1":
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or query.shape[2] != key.shape[2]:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in (query, key, value)):
        return False
    if min(query.shape[-1], value.shape[-1]) < MIN_DIM:
        return False
    length = _padded_length(query.shape[2])  # does this shape have a program already, or may it get one?
    shape = (*query.shape[:2], length, query.shape[3], key.shape[1], value.shape[3], query.dtype, query.requires_grad)
    if shape not in _shapes and len(_shapes) < MAX_PROGRAMS:
        _shapes.add(shape)
    return shape in _shapes


def _padded_length(length: int) -> int:
    """The next power of two, so that texts of all lengths share few compiled programs; padding is never visited."""
    return max(BLOCK, 1 << (length - 1).bit_length())


def flex_local_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, window: int, options: Options
) -> Tensor:
    """`local_attention` for T == S without dropout; shapes and parameters as there."""
    layout = {"window": window, "global_tokens": options.global_tokens, "causal": options.causal}
    if key_mask is None:
        mask = _unpadded_local_mask(query.shape[2], device=query.device, **layout)
    else:
        mask = local_block_mask(query.shape[2], key_mask, device=query.device, **layout)
    return _run(query, key, value, key_mask, mask, options)


def flex_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    chosen: Tensor,
    block_size: int,
    options: Options,
) -> Tensor:
    """`block_attention` of `blocks.py` for T == S without dropout: each block of queries over chosen key blocks.

    Parameters:
        chosen: [B or 1, N, H or 1, k], the key blocks that each of N query blocks sees; a number of N or more: none.
            Blocks count the real tokens of a row.

    Returns:
        [B, H, T, Dv]; zeros for padded queries.
    """
    layout = {"block_size": block_size, "global_tokens": options.global_tokens, "causal": options.causal}
    mask = chosen_block_mask(query.shape[2], key_mask, chosen, **layout)
    return _run(query, key, value, key_mask, mask, options)


def _run(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, mask: BlockMask, options: Options
) -> Tensor:
    length = query.shape[2]
    extra = _padded_length(length) - length
    key, value = zero_padding(key, value, key_mask)
    query, key, value = (F.pad(x, (0, 0, 0, extra)) for x in (query, key, value))
    wishes: dict[str, Any] = {"scale": options.scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if options.bias is not None:
        wishes["score_mod"] = _toeplitz_mod(F.pad(options.bias[0], (extra, extra)), length + extra)
    if not query.is_cuda:
        return flex_attention(query, key, value, block_mask=mask, **wishes)[:, :, :length]
    with torch._dynamo.config.patch(recompile_limit=4 * MAX_PROGRAMS):  # beyond it, flex would make n x n scores
        return _compiled()(query, key, value, block_mask=mask, **wishes)[:, :, :length]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _toeplitz_mod(bias: Tensor, length: int) -> Callable:
    """Adds bias [H, 2 * length - 1] by distance."""

    def score_mod(score, b, h, q, k):
        return score + bias[h, k - q + length - 1]

    return score_mod


@lru_cache(maxsize=64)
def _unpadded_local_mask(length: int, **layout: Any) -> BlockMask:
    with torch.inference_mode(False):  # a tensor of inference mode would be of no use to a later training step
        return local_block_mask(length, None, **layout)


def local_block_mask(
    length: int, key_mask: Tensor | None, *, window: int, global_tokens: int, causal: bool, device: torch.device
) -> BlockMask:
    """The pairs that `local_attention` allows, for inputs filled up to `_padded_length`."""
    left, right = (window - 1, 0) if causal else (window, window)
    tokens = _Tokens(length, key_mask, global_tokens, causal, device)

    def near(b, h, q, k):
        return (q - k <= left) & (k - q <= right)

    ahead = BLOCK * (tokens.blocks - tokens.blocks[:, None])  # from the first query of a block to the first key
    # Tokens of two blocks are more than ahead - BLOCK and less than ahead + BLOCK apart: is any of that in reach?
    table = (ahead - BLOCK < right) & (ahead + BLOCK > -left)
    return tokens.block_mask(near, table[None, None])


def chosen_block_mask(
    length: int, key_mask: Tensor | None, chosen: Tensor, *, block_size: int, global_tokens: int, causal: bool
) -> BlockMask:
    """The pairs that `flex_block_attention` allows, for inputs filled up to `_padded_length`."""
    tokens = _Tokens(length, key_mask, global_tokens, causal, chosen.device, blind_padding=True)
    # [B or 1, N, H or 1, k] numbers -> [B or 1, H or 1, N+1, N+1]; the last block stands for none and sees nothing.
    chosen = chosen.transpose(1, 2)
    count = chosen.shape[2]
    seen = torch.zeros(*chosen.shape[:3], count + 1, dtype=torch.bool, device=chosen.device)
    seen = F.pad(seen.scatter(-1, chosen.clamp(max=count), True)[..., :count], (0, 1, 0, 1))
    owner = torch.where(tokens.real, (tokens.real.cumsum(-1) - 1) // block_size, seen.shape[-1] - 1)  # [B or 1, S]
    per_row, per_head, padded = seen.shape[0] > 1, seen.shape[1] > 1, key_mask is not None

    def is_chosen(b, h, q, k):
        row = b if padded else 0
        return seen[b if per_row else 0, h if per_head else 0, owner[row, q], owner[row, k]]

    # Which of our blocks a block of the kernel touches, 0 or 1: two products tell which of its blocks see each other.
    within = torch.zeros(*owner.shape[:1], len(tokens.blocks), seen.shape[-1], device=chosen.device)
    within = within.scatter(2, owner.unflatten(1, (-1, BLOCK)), 1.0).unsqueeze(1)  # [B or 1, 1, kernel's blocks, N+1]
    table = within @ seen.to(within.dtype) @ within.transpose(-1, -2) > 0
    return tokens.block_mask(is_chosen, table)


class _Tokens:
    """What every mask must know: where the text ends, which tokens are real, which are global, and what is ahead.
    With `blind_padding` a padded query sees nothing."""

    def __init__(
        self,
        length: int,
        key_mask: Tensor | None,
        global_tokens: int,
        causal: bool,
        device: torch.device,
        blind_padding: bool = False,
    ) -> None:
        self.global_tokens, self.causal, self.blind_padding = global_tokens, causal, blind_padding
        self.end = torch.tensor(length, device=device)  # not a number: the kernel is compiled with numbers in place
        filled = _padded_length(length)
        self.blocks = torch.arange(filled // BLOCK, device=device)
        position = torch.arange(filled, device=device)[None]
        self.padded = key_mask is not None
        self.real = position < length if key_mask is None else F.pad(key_mask, (0, filled - length))  # [B or 1, S]
        self.first = self.real & (self.real.cumsum(-1) <= global_tokens)

    def block_mask(self, visible: Callable, table: Tensor) -> BlockMask:
        """The mask of pairs that `visible` allows, inside the blocks of `table` [B or 1, H or 1, N, N], and of the
        global tokens' pairs."""
        table = self._table(table)  # [B, H, N, N], True where two blocks have a pair to look at
        counts = table.sum(-1, dtype=torch.int32)
        # The blocks to visit come first, in their order; the kernel reads `counts` of them.
        indices = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=self._mask_mod(visible))

    def _table(self, table: Tensor) -> Tensor:
        real, first = (x.unflatten(-1, (-1, BLOCK)).any(-1)[:, None] for x in (self.real, self.first))  # [B, 1, N]
        if self.global_tokens:
            table = table | first[:, :, None, :]
        if self.global_tokens and not self.causal:
            table = table | first[..., None]
        queries = real if self.blind_padding else self.blocks * BLOCK < self.end
        table = table & real[:, :, None, :] & queries[..., None]
        return table.tril() if self.causal else table

    def _mask_mod(self, visible: Callable) -> Callable:
        causal, global_tokens, padded, blind = self.causal, self.global_tokens, self.padded, self.blind_padding
        real, first, end = self.real, self.first, self.end

        def is_real(b, token):
            return real[b, token] if padded else token < end

        def is_first(b, token):
            return first[b, token] if padded else token < global_tokens

        def mask_mod(b, h, q, k):
            pair = visible(b, h, q, k)
            if global_tokens:
                pair = pair | is_first(b, k)
            if global_tokens and not causal:
                pair = pair | is_first(b, q)
            if causal:
                pair = pair & (k <= q)
            return pair & is_real(b, k) & (is_real(b, q) if blind else q < end)

        return mask_mod
