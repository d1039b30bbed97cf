"""LSH attention: softmax over the keys that hash to the query's bucket, by position the nearest. O(n log n) time.

    b(x) = argmax [x R; -x R]                  one of num_buckets; a fixed random R for each round
    out_i = sum_{j in U(i)} softmax_j(scaling q_i . k_j + bias_(j-i)) v_j
    U(i) = {i} and, of each round, the keys j with b(k_j) = b(q_i): the last `block_size` ones with j <= i and, if not
           causal, the first `block_size` ones with j > i

(Reformer 2020, arXiv 2001.04451; queries and keys hashed apart as in SMYRF 2020, arXiv 2010.05315.) Only real keys
count. A key that several rounds find counts once, so the result is softmax over the union.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> rotations = draw_rotations(num_hashes=2, dim=64, num_buckets=32, seed=0)
    >>> lsh_attention(query, key, value, rotations=rotations, block_size=64).shape
    torch.Size([1, 12, 4096, 64])

Reformer cuts the sorted sequence into chunks that see each other. There a new key moves the borders of all chunks
after it, so that padding and, when causal, the future change what is seen. The rank of a key in its bucket depends on
the keys before it alone. `bucketed.py` tells how this is evaluated in blocks all the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from ...errors import ConfigError, UnsupportedModelError
from ..config import AttentionConfig
from ..engines.bucketed import BucketOrder, bucketed_attention, by_kv_head, excess, in_parts
from ..engines.parts import (
    Options,
    check_positions,
    check_shapes,
    full_attention,
    match_heads,
    sdpa,
    toeplitz,
    zero_padding,
)
from ..engines.sums import without_autocast
from ..variant import AttentionVariant, HeadShape

DENSE = 512 * 512  # up to so many pairs of a head, a dense mask is faster than blocks
PROJECTIONS = 1 << 18  # at a time on a CPU, so that they stay in its cache


class LshAttention(AttentionVariant):
    """`lsh_attention` with rotations drawn once, from the seed of the config."""

    takes_bias = True

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.register_buffer("rotations", torch.empty(config.num_hashes, shape.dim, config.num_buckets // 2))
        self.reset_parameters()

    def reset_parameters(self):
        config = self.config
        init.copy_(self.rotations, draw_rotations(config.num_hashes, self.shape.dim, config.num_buckets, config.seed))

    def attend(self, query, key, value, key_mask, **kwargs):
        options = {"rotations": self.rotations, "block_size": self.config.block_size, **kwargs}
        return lsh_attention(query, key, value, key_mask, **options)

    def macs(self, length, causal):
        reach = self.config.block_size * (1 if causal else 2)
        hashing = self.config.num_buckets // 2 * (1 + self.shape.kv_heads / self.shape.heads)
        return int(self.config.num_hashes * (2 * min(length, reach) + hashing) * self.shape.dim)


def draw_rotations(num_hashes: int, dim: int, num_buckets: int, seed: int) -> Tensor:
    """[num_hashes, dim, num_buckets // 2] standard normal, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_hashes, dim, num_buckets // 2, generator=generator, device="cpu")


def lsh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    rotations: Tensor,
    block_size: int,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over keys that share a bucket; shapes and parameters as in `full_attention`.

    Parameters:
        rotations: [rounds, D, buckets / 2] of `draw_rotations`; a last dimension of 0 means one bucket for all.
        block_size: how many keys of its bucket a query sees at and before its own position, and after it as many
            unless causal.

    Returns:
        [B, H, T, Dv] in the dtype of query; fp16 and bf16 are computed in fp32. With one bucket and a block_size that
        covers all keys, the same as `full_attention`. Hashing has no gradient, and no second derivative is defined.

    Raises:
        ConfigError: block_size below 1.
        UnsupportedModelError: bidirectional with T != S (cross attention), or shapes that do not fit together.
    """
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {block_size!r}.")
    check_shapes(query, key, value, key_mask, bias)
    options = Options(causal, scaling, dropout, bias)
    length, seen = query.shape[2], key.shape[2]
    check_positions(length, seen, causal)
    if rotations.dim() != 3 or rotations.shape[1] != query.shape[-1]:
        raise UnsupportedModelError(
            f"rotations must be [rounds, {query.shape[-1]}, buckets / 2], got {tuple(rotations.shape)}."
        )
    key, value = key.to(query.dtype), value.to(query.dtype)
    exporting = torch.compiler.is_exporting()  # an exported program keeps one path for all lengths
    with without_autocast(query.device.type):
        if not exporting and rotations.shape[2] == 0 and block_size >= seen:
            return full_attention(
                query, key, value, key_mask, causal=causal, scaling=scaling, dropout=dropout, bias=bias
            )
        key, value = zero_padding(key, value, key_mask)
        order = _bucket_order(query.detach(), key.detach(), key_mask, rotations, block_size, causal)
        own_key = _own_key(order, query, key, key_mask)
        if length == 1 or (not exporting and length * seen <= DENSE):
            return _dense(query, key, value, order, own_key, options)
        reach = block_size if causal else 2 * block_size
        return bucketed_attention(query, key, value, order, own_key, reach, options)


def hash_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """The bucket of every vector: [B,H,n,D] -> [rounds,B,H,n], integers below 2 * rotations.shape[2]."""
    rounds, _, half = rotations.shape
    if half == 0:
        return x.new_zeros(1, *x.shape[:3], dtype=torch.long)  # one bucket needs one round
    if not in_parts(x):
        return _hash(x, rotations)
    heads = max(1, PROJECTIONS // (x.shape[0] * x.shape[2] * rounds * half))
    return torch.cat([_hash(part, rotations) for part in x.split(heads, 1)], 2)


def _hash(x: Tensor, rotations: Tensor) -> Tensor:
    """argmax [x R; -x R] as `hash_buckets` gives it."""
    rounds, _, half = rotations.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    projected = rotations.to(dtype).transpose(1, 2).flatten(0, 1) @ x.to(dtype).transpose(2, 3)
    projected = projected.unflatten(2, (rounds, half))  # [B, H, rounds, half, n]
    # A pooled maximum finds its index ten times faster than argmax, on a CPU.
    planes = projected.abs().flatten(0, 2).unsqueeze(2).permute(0, 3, 1, 2)
    index = F.max_pool2d(planes, (half, 1), return_indices=True)[1].view_as(projected[:, :, :, :1])
    negative = projected.gather(3, index) < 0
    return (index + half * negative).squeeze(3).movedim(2, 0)


def _bucket_order(
    query: Tensor, key: Tensor, key_mask: Tensor | None, rotations: Tensor, block_size: int, causal: bool
) -> BucketOrder:
    """Sort keys and queries together by (bucket, position), a key before a query; padded keys go to the end."""
    seen, length, buckets = key.shape[2], query.shape[2], max(2 * rotations.shape[2], 1)
    of_key, of_query = hash_buckets(key, rotations), hash_buckets(query, rotations)
    if key_mask is not None:
        of_key = of_key.masked_fill(~key_mask[:, None, :], buckets)
    of_key, of_query = of_key.flatten(1, 2), by_kv_head(of_query.movedim(0, -1), key).movedim(-1, 0)
    position = torch.arange(seen, device=key.device)
    query_position = position[seen - length :].repeat(query.shape[1] // key.shape[1])
    codes = torch.cat([(of_key * seen + position) * 2, (of_query * seen + query_position) * 2 + 1], -1)
    row = torch.arange(codes.shape[0] * codes.shape[1], device=key.device).view(*codes.shape[:2], 1)
    # One flat sort of all rows: integers of one dimension have a radix sort.
    codes, index = (codes + row * (2 * seen * (buckets + 1))).flatten().sort(stable=True)
    place = torch.empty_like(index).scatter_(0, index, torch.arange(index.shape[0], device=key.device))
    sizes = [seen, of_query.shape[2]]
    keys_up_to = (1 - codes % 2).cumsum(0).index_select(0, place).view(*row.shape[:2], sum(sizes)) - row * seen
    rank, insertion = keys_up_to.split(sizes, -1)
    line = place.view_as(keys_up_to)[..., seen:] - row * sum(sizes) - insertion
    count = of_key.new_zeros(*row.shape[:2], buckets + 1).scatter_add_(2, of_key, torch.ones_like(of_key))
    end = count.cumsum(-1)
    low = torch.maximum(insertion - block_size, (end - count).gather(-1, of_query))
    high = insertion if causal else torch.minimum(insertion + block_size, end.gather(-1, of_query))
    return BucketOrder(rank - 1, low, high, line)


def _own_key(order: BucketOrder, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
    """[N, M] bool: queries to be given the key at their own position, since no round finds it for them."""
    length, seen = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    rank = order.rank[..., seen - length :].repeat(1, 1, groups)
    own_key = ~((order.low <= rank) & (rank < order.high)).any(0)
    if key_mask is None:
        return own_key
    return own_key & key_mask[:, None, seen - length :].expand(-1, key.shape[1], -1).flatten(0, 1).repeat(1, groups)


def _dense(query: Tensor, key: Tensor, value: Tensor, order: BucketOrder, own_key: Tensor, options: Options) -> Tensor:
    """[B,H,T,Dv] by a mask over all pairs: for short sequences, and for one new token."""
    length, seen = query.shape[2], key.shape[2]
    allowed = excess(order.rank, order.low, order.high, torch.float32).amin(0) <= 0  # [N, M, S]
    allowed = allowed.view(*query.shape[:3], seen)
    diagonal = torch.eye(length, dtype=torch.bool, device=query.device)
    own_key = own_key.view(*query.shape[:3], 1) & diagonal
    allowed = allowed | F.pad(own_key, (seen - length, 0))
    key, value = match_heads(query, key, value)
    if options.bias is not None:
        scores = toeplitz(options.bias, length, seen).to(query.dtype)
        allowed = scores.masked_fill(~allowed, float("-inf"))
    return sdpa(query, key, value, allowed, scaling=options.scaling, dropout=options.dropout)
