"""T5's relative position bias without the n x n tensor.

T5 adds a learned bias b[bucket(j - i)] to the score of query i and key j (Raffel 2020, section 2.1). It depends on
j - i alone, so S + T - 1 numbers for each head say all: the *Toeplitz carrier* `[1, H, S + T - 1]`, whose entry r
belongs to j - i = r - (S - 1). Stock T5 builds the `[1, H, T, S]` tensor instead, which would cost n^2 memory.
"""

from functools import partial

import torch
from torch import nn

from .variant import hides_future


def toeplitz_bias(
    attention: nn.Module, query_length: int, key_length: int, device=None, past_seen_tokens: int | torch.Tensor = 0
) -> torch.Tensor:
    """Stands in for `T5Attention.compute_bias`; returns the carrier as `[1, H, 1, S + T - 1]`.

    S is the number of keys that are filled, `past_seen_tokens + query_length`, also when a static cache is longer.
    """
    weight = attention.relative_attention_bias.weight
    keys = int(past_seen_tokens) + query_length
    relative = torch.arange(1 - keys, query_length, device=device or weight.device)
    buckets = attention._relative_position_bucket(
        relative,
        bidirectional=not getattr(attention, "is_decoder", hides_future(attention)),  # Pix2Struct does not say it so
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).transpose(0, 1)[None, :, None]


def use_toeplitz_bias(module: nn.Module) -> None:
    """Make this attention module, the first of a T5 stack, compute the carrier for all layers of the stack."""
    module.compute_bias = partial(toeplitz_bias, module)
