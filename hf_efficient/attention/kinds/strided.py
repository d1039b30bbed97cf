"""Strided attention: every block sees itself and a few others, spread evenly over the sequence. O(n * blocks).

    Block i of N sees itself and the blocks i - d_m (mod N), m = 0 .. c-1, c = min(num_blocks, E) of E others:
        d_m = 1 + floor(m (E - 1) / (c - 1)), for c = 1: d_0 = 1
    E = N - 1   bidirectional
    E = i       causal: no block after i, and nothing depends on what follows

(After Child et al. 2019, arXiv 1904.10509; in blocks as BigBird 2020, arXiv 2007.14062.) From two on, the nearest and
the farthest of the others are among them: the block before, and the one after; causal: the first. A stride that
divides N would leave every class of blocks to itself through all layers; the neighbours connect them. With num_blocks
>= N - 1 a block sees all. The first `global_tokens` real tokens are seen by all and, if not causal, see all. Blocks
count real tokens, and N is that of each row.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> strided_attention(query, key, value, block_size=64, num_blocks=7, global_tokens=1).shape
    torch.Size([1, 12, 4096, 64])
"""

import torch
from torch import Tensor

from ..engines.blocks import Layout, block_attention, check_blocks, dense_attention, known_mask, lay_out, sees_all
from ..engines.parts import Options, check_positions, check_shapes
from ..engines.pieces import count_blocks
from ..variant import AttentionVariant, Logits


class StridedAttention(AttentionVariant):
    """`strided_attention` with the blocks and the global tokens of the config."""

    takes_bias = True
    takes_logits = True

    def attend(self, query, key, value, key_mask, **kwargs):
        config = self.config
        blocks = {"block_size": config.block_size, "num_blocks": config.num_blocks}
        return strided_attention(query, key, value, key_mask, **blocks, global_tokens=config.global_tokens, **kwargs)

    def macs(self, length, causal):
        keys = (self.config.num_blocks + 1) * self.config.block_size + self.config.global_tokens
        return 2 * min(length, keys) * self.shape.dim


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    block_size: int,
    num_blocks: int,
    global_tokens: int = 0,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """Softmax attention over evenly spread blocks; shapes and parameters as in `full_attention`.

    Parameters:
        block_size: tokens in a block.
        num_blocks: the other blocks that a block sees, beside itself.
        global_tokens: the number of first real tokens (padding not counted) that all see and, if not causal, see all.

    Returns:
        [B, H, T, Dv]; zeros for padded queries. Where the blocks cover everything, the same as `full_attention`.

    Raises:
        ConfigError: a size out of range.
        UnsupportedModelError: bidirectional with T != S (cross attention), or shapes that do not fit together.
    """
    check_blocks(block_size, "num_blocks", num_blocks, 0, global_tokens)
    check_shapes(query, key, value, key_mask, bias)
    seen = key.shape[2]
    check_positions(query.shape[2], seen, causal)
    key_mask = known_mask(key_mask)
    options = Options(causal, scaling, dropout, bias, global_tokens, logits)
    if sees_all(seen, block_size, num_blocks + 1, global_tokens):
        return dense_attention(query, key, value, key_mask, options)
    layout = lay_out(query, key, key_mask, block_size)
    chosen = _spread(layout, num_blocks, causal, seen)
    return block_attention(query, key, value, key_mask, layout, chosen, options)


def _spread(layout: Layout, num_blocks: int, causal: bool, missing: int) -> Tensor:
    """[B or 1, N, 1, 1 + num_blocks]: the blocks that each query block sees, its own first; `missing` where it has
    fewer."""
    own_block = layout.own_block.unsqueeze(-1)  # [B or 1, N, 1]
    total = count_blocks(layout.count.unsqueeze(-1), layout.block)
    others = own_block if causal else (total - 1).clamp(min=0)
    used = others.clamp(max=num_blocks)
    number = torch.arange(num_blocks, device=own_block.device)
    back = 1 + number * (others - 1) // (used - 1).clamp(min=1)
    block = own_block - back if causal else (own_block - back) % total.clamp(min=1)
    block = torch.where(number < used, block, missing)
    return torch.cat([own_block, block.expand(*own_block.shape[:2], -1)], -1).unsqueeze(2)
