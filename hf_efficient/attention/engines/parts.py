"""Dense softmax attention over SDPA, for the layers that stay `full`, and the small parts other variants share.

    out_i = sum_j softmax_j(scaling q_i . k_j + bias_(j-i)) v_j        (Vaswani 2017; `Logits` says what else)

    >>> import torch
    >>> query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8)     # 4 query heads share 2 key/value heads
    >>> full_attention(query, key, key, causal=True, window=3).shape
    torch.Size([2, 4, 10, 8])

Shapes everywhere: query [B,H,T,D], key [B,K,S,D], value [B,K,S,Dv] with K dividing H; query i stands at key position
S-T+i. key_mask [B,S] is True at real tokens, on either side; a padded key has no influence whatever it holds.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, UnsupportedModelError
from ..variant import Logits, identity_values


class Options(NamedTuple):
    """What the caller of an attention function asked for, gathered for the way down; see `full_attention` and
    `local_attention`."""

    causal: bool = False
    scaling: float | None = None
    dropout: float = 0.0
    bias: Tensor | None = None
    global_tokens: int = 0
    logits: Logits | None = None
    pairs: Tensor | None = None


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    logits: Logits | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """Softmax attention over all keys, or over a window of them by a dense mask.

    Parameters:
        window: causal: the last `window` keys including the token itself; else keys with |i - j| <= window (T == S).
        scaling: factor on the scores; None means D**-0.5.
        dropout: probability of dropping an attention weight.
        bias: [1, H, S+T-1], added to the score of query position p and key j at index (j-p) + (S-1).
        logits: a cap of the scores, and sinks.
        pairs: [B or 1, H or 1, T or 1, S], a mask of the caller's own: True where a pair may meet, or added scores.

    Returns:
        [B, H, T, Dv]. A query that may see no key gives zeros.

    Raises:
        UnsupportedModelError: shapes that do not fit together.
    """
    check_shapes(query, key, value, key_mask, bias)
    length, seen = query.shape[2], key.shape[2]
    if causal or window is not None:
        check_positions(length, seen, causal)
    key, value = zero_padding(key, value, key_mask)
    key, value = match_heads(query, key, value)
    if window is not None and window >= seen:
        window = None
    if causal and window is None and length == 1:
        causal = False  # a single query at the end sees every key
    is_plain = key_mask is None and bias is None and logits is None and pairs is None
    if causal and window is None and is_plain and length == seen:
        return sdpa(query, key, value, scaling=scaling, dropout=dropout, is_causal=True)
    allowed = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, S]
    if causal or window is not None:
        band = _band(length, seen, causal, window, query.device)  # [T, S]
        allowed = band[None, None] if allowed is None else allowed & band
    expanded = None if bias is None else toeplitz(bias, length, seen).to(query.dtype)  # [1, H, T, S]
    mask = join_masks(allowed, expanded, pairs)
    return sdpa(query, key, value, mask, scaling=scaling, dropout=dropout, logits=logits)


def full_weights(query: Tensor, key: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
    """The weights `[B,H,T,S]` of `full_attention`: its output for an identity matrix as the values."""
    return full_attention(query, key, identity_values(key), key_mask, **options)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    logits: Logits | None = None,
) -> Tensor:
    """torch's fused attention; fully masked rows give zeros and finite gradients.

    Sinks are one more key of zeros with a value of zeros, whose score comes by the mask. Where scores are capped the
    weights [B, H, T, S] are formed: no fused kernel of torch does that.
    """
    softcap, sinks = logits or Logits()
    if sinks is not None:
        key, value, mask = with_sinks(query, key, value, mask, sinks)
    if softcap is not None:
        return _capped(query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap)
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210  (compiled, it is symbolic)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=grouped
    )


def join_masks(allowed: Tensor | None, scores: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """One mask for `sdpa` of which pairs may meet, of added scores, and of a mask that is either."""
    if pairs is not None and pairs.dtype == torch.bool:
        allowed = pairs if allowed is None else allowed & pairs
    elif pairs is not None:
        scores = pairs if scores is None else scores + pairs
    if scores is None or allowed is None:
        return allowed if scores is None else scores
    return scores.masked_fill(~allowed, float("-inf"))


def with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value with one more row, and the mask of scores [B or 1, H, T or 1, S+1] that gives it its score."""
    score = sinks.to(query.dtype)[None, :, None, None]  # [1, H, 1, 1]
    if mask is None:
        mask = score.new_zeros(1, 1, 1, key.shape[2])
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    rows, places = mask.shape[0], mask.shape[2]
    mask = mask.expand(-1, query.shape[1], -1, -1)
    mask = torch.cat([mask, score.expand(rows, -1, places, -1)], -1)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), mask


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.mT
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # rows that see nothing
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return F.dropout(weights, dropout) @ value


def match_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key/value heads for their query heads, except on CPU, whose fused kernel shares them without a copy.

    Elsewhere the fused kernels that take a mask do not take shared heads, and the fallback is not fused.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or (query.device.type == "cpu" and not torch.compiler.is_exporting()):
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def zero_padding(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros at padded keys and values: a weight of 0 does not silence a NaN, and 0 has no gradient either."""
    if key_mask is None:
        return key, value
    padded = ~key_mask[:, None, :, None]  # [B, 1, S, 1]
    return key.masked_fill(padded, 0), value.masked_fill(padded, 0)


def real_keys(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """[B, S], or [1, S] of True where there is no padding."""
    return key.new_ones(1, key.shape[2], dtype=torch.bool) if key_mask is None else key_mask


def toeplitz(vector: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows+columns-1] -> [..., rows, columns] with entry (i, j) = vector[..., rows-1-i+j].

    Rows of one element more than the period, read back with the period, shift by one per row: no index tensor, and
    the gradient is a plain sum.
    """
    period = rows + columns - 1
    repeated = F.pad(vector, (0, 1)).unsqueeze(-2).expand(*vector.shape[:-1], rows, period + 1)
    shifted = repeated.flatten(-2)[..., rows - 1 : rows - 1 + rows * period]
    return shifted.unflatten(-1, (rows, period))[..., :columns]


def section(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """x from start to start + length along dim. Exported as a gather: a slice would tie the program to lengths that
    leave something over."""
    if torch.compiler.is_exporting():
        return x.index_select(dim, torch.arange(start, start + length, device=x.device))
    return x.narrow(dim, start, length)


def check_shapes(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> None:
    """Raise for shapes whose failure further down would not say what is wrong."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{heads} query heads cannot share {kv_heads} key/value heads. The query heads must be a multiple."
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.dim() != 2):
        raise UnsupportedModelError(
            f"key_mask must be bool [batch, keys], got {key_mask.dtype} {tuple(key_mask.shape)}. "
            "Pass the 2D padding mask, True at real tokens."
        )
    expected = key.shape[2] + query.shape[2] - 1
    if bias is not None and (bias.dim() != 3 or bias.shape[-1] != expected):
        raise UnsupportedModelError(
            f"bias must be [1, heads, keys + queries - 1 = {expected}], got {tuple(bias.shape)}. "
            "Pass the relative position bias by offset, not the expanded matrix."
        )


def check_positions(length: int, seen: int, causal: bool) -> None:
    """Raise when queries and keys do not share one sequence, so that no distance between them is defined."""
    if length > seen or (not causal and length != seen):
        needed = "at least as many keys as queries" if causal else "as many keys as queries"
        raise UnsupportedModelError(
            f"Attention by distance needs {needed}, got {length} queries and {seen} keys. "
            "Use kind='full' without a window for cross attention."
        )


def check_window(window: int) -> None:
    """Raise for a window that would hide every key."""
    if window < 1:
        raise ConfigError(f"window must be at least 1, got {window!r}.")


def _band(length: int, seen: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[T, S], True where the distance allows the pair."""
    position = torch.arange(seen - length, seen, device=device)[:, None]
    distance = torch.arange(seen, device=device) - position
    if window is None:
        return distance <= 0
    return (distance <= 0) & (distance > -window) if causal else distance.abs() <= window
