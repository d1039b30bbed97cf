"""The readable twin of every attention function: O(n^2), obvious, and what the tests compare with.

Each twin builds the full score or weight matrix, decides pair by pair what is allowed, and multiplies.

    naive_local_attention(query, key, value, window=64)   # == local_attention(query, key, value, window=64)

Shapes: query [B,H,T,D], key [B,K,S,D], value [B,K,S,Dv], key_mask [B,S] (True = real token), bias [1,H,S+T-1].
Query i stands at key position S-T+i. A query that may see nothing returns zeros.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .variant import Logits


def naive_full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k^T + bias) v over the allowed pairs (Vaswani 2017)."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    allowed = real[:, None, None, :]  # [B, 1, 1, S]
    if causal:
        allowed = allowed & (distance <= 0)
    if window is not None:
        allowed = allowed & (distance > -window if causal else distance.abs() <= window)
    return _softmax_attention(query, key, value, allowed, scaling, bias, logits, pairs)


def naive_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    window: int,
    global_tokens: int = 0,
    causal: bool = False,
    scaling: float | None = None,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax over the window, plus the first `global_tokens` real tokens, which see all and are seen by all; with
    `rotary`, cosines and sines [B or 1,S,D], from no farther than the end of the window behind them (Xiao 2023)."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    is_global = real & (real.cumsum(-1) <= global_tokens)  # [B, S]
    if causal:
        allowed = ((distance > -window) | is_global[:, None, None, :]) & (distance <= 0)
    else:
        allowed = (distance.abs() <= window) | is_global[:, None, None, :] | is_global[:, None, :, None]
    if rotary is not None:
        change = _near_query(query, rotary, is_global, window + global_tokens - 1) - query
        added = change @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        pairs = torch.where(is_global[:, None, None, :], added, 0)
    return _softmax_attention(query, key, value, allowed & real[:, None, None, :], scaling, bias, logits, pairs)


def _near_query(query: Tensor, rotary: tuple[Tensor, Tensor], is_global: Tensor, reach: int) -> Tensor:
    """Every query as it would be at most `reach` places behind the first global token, row by row."""
    rows = []
    for row, first in enumerate(is_global.int().argmax(-1)):
        cos, sin = (x.expand(len(query), -1, -1)[row].chunk(2, -1)[0] for x in rotary)
        phase = torch.complex(cos, sin)  # [S, D/2]
        place = torch.arange(len(phase)).clamp(max=int(first) + reach).clamp(max=len(phase) - 1)
        turned = torch.complex(*query[row].chunk(2, -1)) / phase * phase[place]  # [H, S, D/2]
        rows.append(torch.cat([turned.real, turned.imag], -1))
    return torch.stack(rows)


def naive_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    feature_map: str = "elu",
    map_weights: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """Weights phi(q) phi(k)^T, divided by their sum, times v (Katharopoulos 2020)."""
    key, value, real = _prepare(query, key, value, key_mask)
    allowed = real[:, None, None, :]
    if causal:
        allowed = allowed & (_distance(query, key) <= 0)
    weights = _linear_weights(query, key, feature_map, map_weights, scaling) * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total) @ value


def naive_local_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    window: int,
    log_mix: Tensor | None = None,
    feature_map: str = "elu",
    map_weights: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """Weights exp(scaling q k^T) in the window and exp(log_mix) phi(q) phi(k)^T beyond, divided by their sum, times v
    (LoLCATs 2024). In logarithms, since neither kind has a bound."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    near = (distance > -window) if causal else (distance.abs() <= window)
    allowed = real[:, None, None, :] & ((distance <= 0) | (not causal))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    linear = _linear_weights(query, key, feature_map, map_weights, scaling)
    mix = 0 if log_mix is None else log_mix[:, None, None]
    logarithms = torch.where(near, scores, linear.log() + mix)  # [B, H, T, S]
    weights = torch.softmax(logarithms.masked_fill(~allowed, torch.finfo(scores.dtype).min), -1)
    return (weights * allowed) @ value


def _linear_weights(
    query: Tensor,
    key: Tensor,
    feature_map: str,
    map_weights: tuple[Tensor, Tensor] | None,
    scaling: float | None,
) -> Tensor:
    """[B,H,T,S]: phi(q) phi(k)^T, the weights of a map given for queries and for the key/value heads."""
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    of_query, of_key = map_weights or (None, None)
    if feature_map == "hedgehog":
        assert of_key is not None
        of_key = of_key.repeat_interleave(query.shape[1] // of_key.shape[0], 0)
    phi_query, phi_key = _features(query, feature_map, of_query), _features(key, feature_map, of_key)
    return phi_query @ phi_key.transpose(-1, -2)


def _features(x: Tensor, feature_map: str, weight: Tensor | None) -> Tensor:
    """The four maps as their papers write them."""
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return F.relu(x) + 0.001
    if feature_map == "hedgehog":
        mapped = torch.einsum("hed,bhtd->bhte", weight, x)
        return torch.cat([torch.softmax(mapped, -1), torch.softmax(-mapped, -1)], -1)
    assert feature_map == "favor" and weight is not None
    x = x / x.shape[-1] ** 0.25
    return torch.exp(x @ weight.to(x.dtype).T - (x * x).sum(-1, keepdim=True) / 2) / len(weight) ** 0.5


def naive_lsh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    rotations: Tensor,
    block_size: int,
    causal: bool = False,
    scaling: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax over the own key and, of each round, the nearest keys of the query's bucket (Reformer 2020)."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    allowed = distance == 0
    for rotation in rotations.to(query.dtype):  # [D, buckets / 2]
        one = rotation.shape[1] == 0
        projected = (torch.ones_like(x[..., :1]) if one else x @ rotation for x in (query, key))
        of_query, of_key = (torch.cat([x, -x], -1).argmax(-1) for x in projected)
        same = (of_query.unsqueeze(-1) == of_key.unsqueeze(-2)) & real[:, None, None, :]  # [B, H, T, S]
        before, after = same & (distance <= 0), same & (distance > 0)
        allowed = allowed | (before & (before.flip(-1).cumsum(-1).flip(-1) <= block_size))
        if not causal:
            allowed = allowed | (after & (after.cumsum(-1) <= block_size))
    return _softmax_attention(query, key, value, allowed & real[:, None, None, :], scaling, bias)


def _prepare(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the padded keys and values (whatever they hold), and repeat each key/value head for its query heads."""
    groups = query.shape[1] // key.shape[1]
    real = key_mask if key_mask is not None else torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
    padded = ~real[:, None, :, None]
    key, value = key.masked_fill(padded, 0), value.masked_fill(padded, 0)
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), real


def _distance(query: Tensor, key: Tensor) -> Tensor:
    """[T, S]: key position minus query position; positive = the key lies in the future."""
    length, seen = query.shape[2], key.shape[2]
    position = torch.arange(seen - length, seen, device=query.device)
    return torch.arange(seen, device=query.device) - position[:, None]


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float | None,
    bias: Tensor | None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    softcap, sinks = logits or Logits()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias[:, :, _distance(query, key) + key.shape[2] - 1]  # [1, H, T, S]
    if pairs is not None and pairs.dtype == torch.bool:
        allowed = allowed & pairs
    elif pairs is not None:
        scores, allowed = scores + pairs.nan_to_num(neginf=0), allowed & (pairs > float("-inf"))
    allowed = allowed.expand_as(scores)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:  # one more score, of no value
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights * allowed) @ value


def naive_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    parts: tuple[Tensor, ...],
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """W_v (g_k * v_i) + r_q * q_i + r_v * sum_j b_j v_j, softmax-pooled g_q and g_k (Fastformer, Wu et al. 2021)."""
    query_score, key_score, value_map, query_gain, pooled_gain = parts  # [H,D], [H,D], [H,D,D], [H,D], [H,D]
    key, value, real = _prepare(query, key, value, key_mask)
    query = query.masked_fill(~real[:, None, :, None], 0)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    allowed = real[:, None, None, :] & (_distance(query, key) <= 0 if causal else True)

    def pool(scores: Tensor) -> Tensor:
        """[B,H,S] -> the weights [B,H,T,S] of what each position pools."""
        masked = scores.unsqueeze(2).masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return torch.softmax(masked.expand(-1, -1, query.shape[2], -1), -1) * allowed

    global_query = pool((query * query_score.unsqueeze(1)).sum(-1) * factor) @ query
    products = global_query * key
    weights = pool((products * key_score.unsqueeze(1)).sum(-1) * factor)
    mapped = (weights @ products * value) @ value_map.transpose(1, 2)
    return mapped + query_gain.unsqueeze(1) * query + pooled_gain.unsqueeze(1) * (weights @ value)


def naive_strided_attention(
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
    bias: Tensor | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """Softmax over the own block and up to `num_blocks` others, from the one before back to the farthest."""
    key, value, real = _prepare(query, key, value, key_mask)
    rank = real.cumsum(-1) - 1  # [B, S]
    sees = []  # [N, N] for each row
    for tokens in real.sum(-1).tolist():
        blocks = max(-(-tokens // block_size), 1)
        table = torch.eye(blocks, dtype=torch.bool)
        for i in range(blocks):
            others = i if causal else blocks - 1
            used = min(num_blocks, others)
            for m in range(used):
                table[i, (i - 1 - m * (others - 1) // max(used - 1, 1)) % blocks] = True
        sees.append(table)
    allowed = _between_blocks(query, rank // block_size, [table.unsqueeze(0) for table in sees])
    return _block_softmax(query, key, value, allowed, real, global_tokens, causal, scaling, bias, logits)


def naive_topk_attention(
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
    logits: Logits | None = None,
) -> Tensor:
    """Softmax over the own block and the top_k - 1 whose mean key has the largest product with the block's query."""
    key, value, real = _prepare(query, key, value, key_mask)
    rank = real.cumsum(-1) - 1
    sees = []  # [H, N, N] for each row
    for q, k, is_real in zip(query.detach(), key.detach(), real, strict=True):
        q_blocks, k_blocks = (x[:, is_real].split(block_size, 1) for x in (q, k))
        table = torch.eye(len(k_blocks), dtype=torch.bool).repeat(q.shape[0], 1, 1)
        for head, i in product(range(q.shape[0]), range(len(k_blocks))):
            scores = {}
            for j in range(i if causal else len(k_blocks)):
                if j != i:
                    asking = q_blocks[i][head, 0] if causal else q_blocks[i][head].mean(0)
                    scores[j] = float((asking @ k_blocks[j][head].mean(0)).float())
            table[head, i, sorted(scores, key=lambda j: (scores[j], j))[::-1][: top_k - 1]] = True
        sees.append(table)
    allowed = _between_blocks(query, rank // block_size, sees)
    return _block_softmax(query, key, value, allowed, real, global_tokens, causal, scaling, None, logits)


def _between_blocks(query: Tensor, block: Tensor, sees: list[Tensor]) -> Tensor:
    """[B,H,T,S] from the block of each token [B,S] and, for each row, which block sees which [H or 1, N, N]."""
    block = block.clamp(min=0)
    length = query.shape[2]
    pairs = [table[:, of[-length:]][:, :, of] for table, of in zip(sees, block, strict=True)]
    return torch.stack([table.expand(query.shape[1], -1, -1) for table in pairs])


def _block_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    real: Tensor,
    global_tokens: int,
    causal: bool,
    scaling: float | None,
    bias: Tensor | None,
    logits: Logits | None,
) -> Tensor:
    """Over the allowed pairs and those of global tokens; zeros for padded queries."""
    is_global = real & (real.cumsum(-1) <= global_tokens)  # [B, S]
    asking, length = real[:, None, -query.shape[2] :, None], query.shape[2]
    allowed = allowed | is_global[:, None, None, :]
    if causal:
        allowed = allowed & (_distance(query, key) <= 0)
    else:
        allowed = allowed | is_global[:, None, -length:, None]
    return _softmax_attention(query, key, value, allowed & real[:, None, None, :] & asking, scaling, bias, logits)


def naive_kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    kernel: str = "gaussian",
    log_width: Tensor,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """Weights c(j-i) phi(q_i).phi(k_j), divided by their sum, times v (Luo et al. 2021); nothing at padded queries."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    u = distance.abs() / log_width.exp()[:, None, None]  # [H, T, S]
    weights = {"gaussian": (-u.square() / 2).exp(), "exponential": (-u).exp(), "cauchy": 1 / (1 + u.square())}[kernel]
    if projection is not None:
        temperature = log_temperature.exp().repeat_interleave(groups)[:, None, None]
        unit_query, unit_key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
        phi_query, phi_key = ((temperature * (x @ projection.T)).exp() for x in (unit_query, unit_key))
        weights = weights * (phi_query @ phi_key.mT)
    allowed = real[:, None, None, :] & real[:, None, real.shape[1] - length :, None]
    if causal:
        allowed = allowed & (distance <= 0)
    weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1, total)) @ value
