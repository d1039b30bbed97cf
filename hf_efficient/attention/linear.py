"""Linear attention: a feature map in place of the softmax, so that the sums over keys are shared by all queries.

    out_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) . sum_j phi(k_j)),   phi(x) = elu(x) + 1

(Katharopoulos et al. 2020, arXiv 2006.16236.) O(n) time and memory. Causal: the sums run over j <= i, by chunks: exact
products inside a chunk, one running state [D, Dv] between chunks.

    >>> import torch
    >>> query, key, value = torch.randn(3, 2, 4, 1000, 64)
    >>> linear_attention(query, key, value, causal=True).shape
    torch.Size([2, 4, 1000, 64])

The paper maps q as it is, so q is multiplied by scaling * sqrt(D) first: the usual scaling D**-0.5 gives the paper's
formula, and a model that uses another one (T5: 1.0) keeps the ratio to it that softmax saw.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown_name
from .full import check_positions, check_shapes, section, zero_padding
from .variant import AttentionVariant

CHUNK = 128  # causal: the scores inside a chunk cost n * CHUNK, the states n / CHUNK * D * Dv


class LinearAttention(AttentionVariant):
    """`linear_attention` with the feature map of the config."""

    takes_cross = True
    needs_training = True

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        return linear_attention(query, key, value, key_mask, feature_map=self.config.feature_map, **kwargs)

    def macs(self, length, causal):
        return 2 * self.shape.dim * (self.shape.dim + 1)


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1 whose gradient comes from its output, min(out, 1), without a second exponential."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = F.elu(x).add_(1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return out.clamp(max=1).mul_(grad)


FEATURE_MAPS = {"elu": _EluPlusOne.apply}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with weights phi(q) phi(k)^T; shapes as in `full_attention`.

    Parameters:
        feature_map: a name in `FEATURE_MAPS`.
        scaling: what softmax attention would use; None means D**-0.5.
        dropout: probability of dropping a key's contribution phi(k_j) v_j for all queries, the others scaled by
            1/(1-p), the normaliser left whole. This is dropout of attention weights with one mask shared by the
            queries of a head: the mean is the undropped output.

    Returns:
        [B, H, T, Dv] in the dtype of query; fp16 and bf16 are summed in fp32. No visible key gives zeros.

    Raises:
        ConfigError: an unknown feature map.
        UnsupportedModelError: shapes that do not fit together, or causal with more queries than keys.
    """
    if feature_map not in FEATURE_MAPS:
        raise unknown_name("feature_map", feature_map, FEATURE_MAPS)
    check_shapes(query, key, value, key_mask, None)
    length, seen = query.shape[2], key.shape[2]
    if causal:
        check_positions(length, seen, causal)
    with _without_autocast(query.device.type):
        dtype = torch.promote_types(query.dtype, torch.float32)
        phi_query, phi_key, summed = _features(query, key, value, key_mask, feature_map, scaling, dtype)
        kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        phi_query = phi_query.unflatten(1, (kv_heads, groups))  # [B, K, G, T, D]
        dropped = summed
        if dropout:
            dropped = summed * F.dropout(torch.ones_like(summed[..., :1]), dropout)
        if causal and length > 1:
            out = _causal(phi_query, phi_key, dropped)
        else:
            rows = _Bidirectional.apply(phi_query.flatten(2, 3), phi_key, dropped)
            out = rows.unflatten(2, (groups, length))
        return out.flatten(1, 2).to(query.dtype)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast would round the sums to half precision. Nothing to leave on devices that have none (meta)."""
    active = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def _features(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    scaling: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """phi(q), phi(k) and v in the dtype of the sums, phi(k) and v zero at padded keys."""
    phi = FEATURE_MAPS[feature_map]
    key, value = zero_padding(key, value, key_mask)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    phi_query, phi_key = phi(query), phi(key)
    if key_mask is not None:
        phi_key = phi_key.masked_fill(~key_mask[:, None, :, None], 0)  # phi(0) is not 0
    return phi_query, phi_key, value


class _Bidirectional(torch.autograd.Function):
    """r (P state) with state = K^T V, z = sum_j K_j, r = 1 / (P z); P [B,K,M,D], K [B,K,S,D], V [B,K,S,Dv].

    Memory traffic is what this costs, and autograd's own backward of the same lines makes twice the passes.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        state = keys.transpose(-1, -2) @ values  # [B, K, D, Dv]
        total = keys.sum(2, keepdim=True)  # [B, K, 1, D]
        inverse = _inverse(rows @ total.transpose(-1, -2))  # [B, K, M, 1]
        out = (rows @ state).mul_(inverse)
        ctx.save_for_backward(rows, keys, values, state, total, inverse, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys, values, state, total, inverse, out = ctx.saved_tensors
        grad = grad * inverse  # of P state
        grad_norm = (grad * out).sum(-1, keepdim=True).neg_()  # of P z, [B, K, M, 1]
        grad_rows = (grad @ state.transpose(-1, -2)).addcmul_(grad_norm, total)
        grad_state = rows.transpose(-1, -2) @ grad
        grad_total = grad_norm.transpose(-1, -2) @ rows  # [B, K, 1, D]
        grad_keys = (values @ grad_state.transpose(-1, -2)).add_(grad_total)
        return grad_rows, grad_keys, keys @ grad_state


def _causal(phi_query: Tensor, phi_key: Tensor, value: Tensor) -> Tensor:
    """As `_Bidirectional` over j <= i, for queries at the last T of S positions."""
    length, seen = phi_query.shape[3], phi_key.shape[2]
    past = seen - length
    size = CHUNK if torch.compiler.is_exporting() else min(CHUNK, length)
    extra = (length + size - 1) // size * size - length
    # Chunks: [B, K, G, N, C, D] for queries, [B, K, N, C, D] for the keys at the same positions.
    rows = F.pad(phi_query, (0, 0, 0, extra)).unflatten(3, (-1, size))
    keys = F.pad(phi_key[:, :, past:], (0, 0, 0, extra)).unflatten(2, (-1, size))
    values = F.pad(value[:, :, past:], (0, 0, 0, extra)).unflatten(2, (-1, size))
    state = keys.transpose(-1, -2) @ values  # [B, K, N, D, Dv]
    total = keys.sum(-2).unsqueeze(-1)  # [B, K, N, D, 1]
    state, total = _before(state), _before(total)
    if past:
        old = phi_key[:, :, :past]
        state = state + (old.transpose(-1, -2) @ value[:, :, :past]).unsqueeze(2)
        total = total + old.sum(2)[:, :, None, :, None]
    weights = (rows @ keys.unsqueeze(2).transpose(-1, -2)).tril_()  # [B, K, G, N, C, C]
    numerator = weights @ values.unsqueeze(2) + rows @ state.unsqueeze(2)
    denominator = weights.sum(-1, keepdim=True) + rows @ total.unsqueeze(2)
    return section((numerator * _inverse(denominator)).flatten(3, 4), 3, 0, length)


def _before(sums: Tensor) -> Tensor:
    """The sum of all earlier chunks along dim 2."""
    return F.pad(sums, (0, 0, 0, 0, 1, -1)).cumsum(2)


def _inverse(total: Tensor) -> Tensor:
    """1 / total; 1 where no key is visible and the total is 0, for zeros and finite gradients there."""
    return torch.where(total == 0, 1, total).reciprocal_()
