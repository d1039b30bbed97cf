"""The readable twin of every attention function: O(n^2), obvious, and what the tests compare with.

Each twin builds the full score or weight matrix, decides pair by pair what is allowed, and multiplies.

    naive_local_attention(query, key, value, window=64)   # == local_attention(query, key, value, window=64)

Shapes: query [B,H,T,D], key [B,K,S,D], value [B,K,S,Dv], key_mask [B,S] (True = real token), bias [1,H,S+T-1].
Query i stands at key position S-T+i. A query that may see nothing returns zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """softmax(scaling q k^T + bias) v over the allowed pairs (Vaswani 2017)."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    allowed = real[:, None, None, :]  # [B, 1, 1, S]
    if causal:
        allowed = allowed & (distance <= 0)
    if window is not None:
        allowed = allowed & (distance > -window if causal else distance.abs() <= window)
    return _softmax_attention(query, key, value, allowed, scaling, bias)


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
) -> Tensor:
    """Softmax over the window, plus the first `global_tokens` real tokens, which see all and are seen by all."""
    key, value, real = _prepare(query, key, value, key_mask)
    distance = _distance(query, key)
    is_global = real & (real.cumsum(-1) <= global_tokens)  # [B, S]
    if causal:
        allowed = ((distance > -window) | is_global[:, None, None, :]) & (distance <= 0)
    else:
        allowed = (distance.abs() <= window) | is_global[:, None, None, :] | is_global[:, None, :, None]
    return _softmax_attention(query, key, value, allowed & real[:, None, None, :], scaling, bias)


def naive_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """Weights phi(q) phi(k)^T, divided by their sum, times v (Katharopoulos 2020)."""
    phi = {"elu": lambda x: F.elu(x) + 1}[feature_map]
    key, value, real = _prepare(query, key, value, key_mask)
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    allowed = real[:, None, None, :]
    if causal:
        allowed = allowed & (_distance(query, key) <= 0)
    weights = (phi(query) @ phi(key).transpose(-1, -2)) * allowed  # [B, H, T, S]
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1, total)) @ value


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
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float | None, bias: Tensor | None
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + bias[:, :, _distance(query, key) + key.shape[2] - 1]  # [1, H, T, S]
    allowed = allowed.expand_as(scores)
    weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), -1)
    return (weights * allowed) @ value
