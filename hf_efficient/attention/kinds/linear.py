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

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engines.feature_maps import FEATURE_MAPS, FeatureMap, FeatureMapAttention, MapWeights, check_map, usual_scale
from ..engines.fla import causal_by_kernels, use_fla
from ..engines.parts import check_positions, check_shapes, section, zero_padding
from ..engines.pieces import Piece, pieces
from ..engines.sums import (
    add_to_sums,
    drop_keys,
    fill_up,
    group_heads,
    inverse_of,
    running_sums,
    to_sum,
    without_autocast,
)
from ..variant import State

CHUNK = 64  # causal: the scores inside a chunk cost n * CHUNK * M, the states n / CHUNK * M * Dv


class LinearAttention(FeatureMapAttention):
    """`linear_attention` with the feature map of the config."""

    takes_cross = True
    has_state = True

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        return linear_attention(query, key, value, key_mask, **self.map_options, **kwargs)

    def decode(self, query, key, value, key_mask, state, *, scaling, bias):
        return linear_decode(query, key, value, key_mask, state, **self.map_options, scaling=scaling)

    def macs(self, length, causal):
        features, making = self.feature_macs()
        return making + 2 * features * (self.shape.dim + 1)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with weights phi(q) phi(k)^T; shapes as in `full_attention`.

    Parameters:
        feature_map: a name in `FEATURE_MAPS`.
        map_weights: what the map is made of for queries and for keys: `favor` a projection [M, D] for both, `hedgehog`
            matrices [H, D, D] and [K, D, D]; None for maps without.
        scaling: what softmax attention would use; None means D**-0.5.
        dropout: probability of dropping a key's contribution phi(k_j) v_j for all queries, the others scaled by
            1/(1-p), the normaliser left whole. This is dropout of attention weights with one mask shared by the
            queries of a head: the mean is the undropped output.

    Returns:
        [B, H, T, Dv] in the dtype of query; fp16 and bf16 are summed in fp32. No visible key gives zeros.

    Raises:
        ConfigError: an unknown feature map, or weights that do not fit it.
        UnsupportedModelError: shapes that do not fit together, or causal with more queries than keys.
    """
    check_map(feature_map, map_weights, query, key)
    check_shapes(query, key, value, key_mask, None)
    if causal:
        check_positions(query.shape[2], key.shape[2], causal)
    key, value = zero_padding(key, value, key_mask)
    with without_autocast(query.device.type):
        rows, keys, values = to_sum(query, key, value)
        phi_query, phi_key = features(rows, keys, key_mask, FEATURE_MAPS[feature_map], map_weights, scaling)
        if dropout:
            values = drop_keys(values, dropout)
        if causal and use_fla(query, key):
            return causal_by_kernels(phi_query, phi_key, values, query.dtype).to(query.dtype)
        return attend_features(phi_query, phi_key, values, causal=causal).to(query.dtype)


def attend_features(phi_query: Tensor, phi_key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """The values weighted by phi_query [B,H,T,M] times phi_key [B,K,S,M], which is 0 at padded keys: [B,H,T,Dv]."""
    length = phi_query.shape[2]
    phi_query = group_heads(phi_query, phi_key)
    if causal and length > 1:
        return _causal(phi_query, phi_key, value, None)
    # Not causal, positions do not matter: the G heads that share keys are G T rows of one product.
    rows = _Bidirectional.apply(phi_query.flatten(2, 3), phi_key, value)
    return rows.unflatten(2, (-1, length)).flatten(1, 2)


def linear_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    state: State | None = None,
    *,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, State]:
    """Causal `linear_attention` of T new tokens after those that the state sums up.

    The state is one tensor [B, K, M, Dv + 1] in float32 or better: sum_j phi(k_j)^T (v_j, 1).

    Returns:
        [B, H, T, Dv] in the dtype of query, and the state after the new tokens.
    """
    check_map(feature_map, map_weights, query, key)
    check_shapes(query, key, value, key_mask, None)
    key, value = zero_padding(key, value, key_mask)
    with without_autocast(query.device.type):
        rows, keys, values = to_sum(query, key, value)
        phi_query, phi_key = features(rows, keys, key_mask, FEATURE_MAPS[feature_map], map_weights, scaling)
        before = None if state is None else state[0]
        after = add_to_sums(before, phi_key, values)
        phi_query = group_heads(phi_query, phi_key)
        if query.shape[2] == 1:
            sums = phi_query[..., 0, :] @ after  # [B, K, G, Dv + 1]
            out = (sums[..., :-1] * inverse_of(sums[..., -1:])).unsqueeze(3).flatten(1, 2)
        else:
            out = _causal(phi_query, phi_key, values, before)
        return out.to(query.dtype), (after,)


def features(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    phi: FeatureMap,
    map_weights: MapWeights | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """phi(q) [B,H,T,M] and phi(k) [B,K,S,M], the latter zero at padded keys."""
    of_query, of_key = map_weights or (None, None)
    phi_query, phi_key = phi.of_query(usual_scale(query, scaling), of_query), phi.phi(key, of_key)
    if key_mask is not None:
        phi_key = phi_key.masked_fill(~key_mask[:, None, :, None], 0)  # phi(0) is not 0
    return phi_query, phi_key


class _Bidirectional(torch.autograd.Function):
    """r (P state) with state = K^T V, z = sum_j K_j, r = 1 / (P z); P [B,K,M,D], K [B,K,S,D], V [B,K,S,Dv].

    Memory traffic is what this costs, and autograd's own backward of the same lines makes twice the passes.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        state = keys.transpose(-1, -2) @ values  # [B, K, D, Dv]
        total = keys.sum(2, keepdim=True)  # [B, K, 1, D]
        inverse = inverse_of(rows @ total.transpose(-1, -2))  # [B, K, M, 1]
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


def _causal(phi_query: Tensor, phi_key: Tensor, value: Tensor, sums: Tensor | None) -> Tensor:
    """As `_Bidirectional` over j <= i: queries [B,K,G,T,M] at the last T of S positions, after `sums` of others, give
    [B,H,T,Dv]."""
    length, seen = phi_query.shape[3], phi_key.shape[2]
    past = seen - length
    size = CHUNK if torch.compiler.is_exporting() else min(CHUNK, length)
    extra = (length + size - 1) // size * size - length  # queries and keys of zeros, which give and add nothing
    # Chunks: [B, K, G, N, C, M] for queries, [B, K, N, C, M] for the keys at the same positions.
    rows = fill_up(phi_query, 0, extra).unflatten(3, (-1, size))
    keys = fill_up(phi_key[:, :, past:], 0, extra).unflatten(2, (-1, size))
    values = fill_up(F.pad(value[:, :, past:], (0, 1), value=1.0), 0, extra).unflatten(2, (-1, size))
    if past:  # keys before the first query are seen by all: no chunks are needed for them
        sums = add_to_sums(sums, phi_key[:, :, :past], value[:, :, :past])
    if sums is None:
        sums = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    out = _Causal.apply(rows, keys, values, sums)
    # Heads first: of a section it depends on the length whether flattening copies, and a compiler would ask.
    return section(out.flatten(3, 4).flatten(1, 2), 2, 0, length)


class _Causal(torch.autograd.Function):
    """r (tril(P K^T) V + P state) for chunks of queries P [B,K,G,N,C,M] and of keys K [B,K,N,C,M].

    V [B,K,N,C,Dv+1] ends with ones, so the last column of the sum is 1 / r. The state [B,K,M,Dv+1] starts as `sums`
    and takes up chunk after chunk; all states together are larger than the inputs, so none is kept.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, keys: Tensor, values: Tensor, sums: Tensor) -> Tensor:
        out = rows.new_empty(*rows.shape[:-1], values.shape[-1] - 1)
        inverse = rows.new_empty(*rows.shape[:-1], 1)
        state = sums.clone()
        for piece in _chunk_pieces(rows):
            states = running_sums(state[piece[:2]], keys[piece].mT @ values[piece])
            before, state[piece[:2]] = states[:, :, :-1], states[:, :, -1]
            for group in _groups(rows, piece):
                total = (rows[group] @ keys[piece].mT).tril_() @ values[piece]
                total += rows[group] @ before
                inverse[group] = inverse_of(total[..., -1:])
                out[group] = total[..., :-1].mul_(inverse[group])
        ctx.save_for_backward(rows, keys, values, sums, inverse, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        rows, keys, values, sums, inverse, out = ctx.saved_tensors
        grad_rows, grad_keys, grad_values = (torch.zeros_like(x) for x in (rows, keys, values))
        grad_total = torch.empty_like(F.pad(out, (0, 1)))
        state, cut = sums.clone(), _chunk_pieces(rows)
        for piece in cut:
            states = running_sums(state[piece[:2]], keys[piece].mT @ values[piece])
            before, state[piece[:2]] = states[:, :, :-1], states[:, :, -1]
            for group in _groups(rows, piece):
                upper = grad[group] * inverse[group]
                total = torch.cat([upper, -(upper * out[group]).sum(-1, keepdim=True)], -1)
                weights = (total @ values[piece].mT).tril_()
                grad_rows[group] = (weights @ keys[piece]).add_(total @ before.mT)
                grad_keys[piece].add_(weights.mT @ rows[group])
                grad_values[piece].add_((rows[group] @ keys[piece].mT).tril_().mT @ total)
                grad_total[group] = total
        state = torch.zeros_like(sums)
        for piece in reversed(cut):
            terms = sum(rows[group].mT @ grad_total[group] for group in _groups(rows, piece))
            states = running_sums(state[piece[:2]], terms.flip(2))
            after, state[piece[:2]] = states[:, :, :-1].flip(2), states[:, :, -1]
            grad_keys[piece].add_(values[piece] @ after.mT)
            grad_values[piece].add_(keys[piece] @ after)
        return grad_rows, grad_keys, grad_values, state


def _chunk_pieces(rows: Tensor) -> list[Piece]:
    batch, kv_heads, _, chunks, size, _ = rows.shape
    return list(pieces((batch, kv_heads, chunks), size * size, rows))


def _groups(rows: Tensor, piece: Piece) -> list[tuple]:
    """The piece in [B,K,G,N,...] for each of the query heads that share its keys."""
    return [(*piece[:2], group, piece[2]) for group in range(rows.shape[2])]
