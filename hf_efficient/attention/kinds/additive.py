"""Additive attention: two learned vectors score every position, and softmax-weighted sums modulate each of them.

    g_q = sum_i softmax_i(w_q . q_i scaling) q_i                                      the global query
    g_k = sum_j b_j p_j,    p_j = g_q * k_j,    b_j = softmax_j(w_k . p_j scaling)    the global key
    out_i = W_v (g_k * v_i) + r_q * q_i + r_v * sum_j b_j v_j

(Fastformer, Wu et al. 2021, arXiv 2108.09084, sections 3.1 and 3.2; `*` is elementwise, and every head has learned
parts of its own.) O(n) time and memory. Causal: every sum runs over the positions so far, g_q of p_j over those up to
j; all that a sum needs of the past is one vector and its normaliser, so decoding carries a state of constant size.

    >>> import torch
    >>> attention = AdditiveAttention(AttentionConfig("additive"), HeadShape(heads=4, kv_heads=2, dim=64))
    >>> query, key = torch.randn(1, 4, 1000, 64), torch.randn(1, 2, 1000, 64)
    >>> additive_attention(query, key, key, parts=attention.parts()).shape
    torch.Size([1, 4, 1000, 64])

r_q = 1 and r_v = 0 are Fastformer. The last term is ours, so that a pretrained softmax model has somewhere to start:
at w_q = 0, w_k = 1, W_v = 0, r_q = 0, r_v = 1 every query is replaced by the mean query (causal: of the positions up
to a key) and the rest is softmax attention; where all queries are equal, it is softmax attention exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...errors import UnsupportedModelError
from ..config import AttentionConfig
from ..engines.parts import check_shapes
from ..engines.prefix import CHUNK, prefix_means
from ..engines.sums import drop_keys, without_autocast
from ..variant import AttentionVariant, HeadShape, State

TOKENS = 8192  # on CPU, of all heads that causal attention works on in one turn


class AdditiveParts(NamedTuple):
    """The learned parts: w_q, w_k, r_q and r_v [H,D]; W_v [H,D,D], from the second D to the first."""

    query_score: Tensor
    key_score: Tensor
    value_map: Tensor
    query_gain: Tensor
    pooled_gain: Tensor


class AdditiveAttention(AttentionVariant):
    """`additive_attention` with learned parts of its own."""

    takes_uneven = False
    has_weights = False
    has_state = True
    needs_training = True

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        heads, dim = shape.heads, shape.dim
        self.query_score = nn.Parameter(torch.zeros(heads, dim))
        self.key_score = nn.Parameter(torch.ones(heads, dim))
        self.value_map = nn.Parameter(torch.zeros(heads, dim, dim))
        self.query_gain = nn.Parameter(torch.zeros(heads, dim))
        self.pooled_gain = nn.Parameter(torch.ones(heads, dim))

    def reset_parameters(self):
        for part in (self.query_score, self.value_map, self.query_gain):
            init.zeros_(part)
        for part in (self.key_score, self.pooled_gain):
            init.ones_(part)

    def parts(self) -> AdditiveParts:
        return AdditiveParts(*(getattr(self, name) for name in AdditiveParts._fields))

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        return additive_attention(query, key, value, key_mask, parts=self.parts(), **kwargs)

    def decode(self, query, key, value, key_mask, state, *, scaling, bias=None):
        return additive_decode(query, key, value, key_mask, state, parts=self.parts(), scaling=scaling)

    def macs(self, length, causal):
        dim = self.shape.dim
        return dim * (dim + 6) + (3 * dim * min(CHUNK, length) if causal else 0)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    parts: AdditiveParts,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention through a global query and a global key; shapes as in `full_attention`, with T == S and Dv == D.

    Parameters:
        parts: the learned parts.
        scaling: factor on the scores of positions; None means D**-0.5.
        dropout: probability of dropping a value v_j wherever it appears, the others scaled by 1/(1-p). The output is
            linear in the values, so the mean is the undropped output.

    Returns:
        [B, H, T, D] in the dtype of query; fp16 and bf16 are summed in fp32. A padded position counts as a query of
        zeros, so without any visible key the result is zeros.

    Raises:
        UnsupportedModelError: shapes that do not fit together, or other queries than those at the keys' positions.
    """
    with without_autocast(query.device.type):
        inputs = _prepare(query, key, value, key_mask, parts, scaling)
        if dropout:
            inputs = inputs._replace(value=drop_keys(inputs.value, dropout))
        if causal:
            return _causal(inputs, None)[0].to(query.dtype)
        parts = (part.unflatten(0, (key.shape[1], -1)) for part in inputs.parts)  # [H, ..] -> [K, G, ..]
        out = _Bidirectional.apply(inputs.grouped_query(), inputs.key, inputs.value, inputs.real, *parts)
        return out.flatten(1, 2).to(query.dtype)


def additive_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: State | None,
    *,
    parts: AdditiveParts,
    scaling: float | None = None,
) -> tuple[Tensor, State]:
    """Causal attention of T new tokens after those in `state`, and the new state; see `additive_attention`.

    The state, all of the last position: for the queries, the log of the normaliser [B,H] and g_q [B,H,D]; for the
    keys, the log of the normaliser [B,H], g_k [B,H,D] and the pooled values [B,H,D].
    """
    with without_autocast(query.device.type):
        out, state = _causal(_prepare(query, key, value, key_mask, parts, scaling), state)
        return out.to(query.dtype), state


class _Inputs(NamedTuple):
    """Everything in the dtype of the sums, zeros at padded positions: query [B,H,T,D], key and value [B,K,T,D], the
    learned parts with `scaling` in both scores, and which positions are real [B,T] (None: all)."""

    query: Tensor
    key: Tensor
    value: Tensor
    parts: AdditiveParts
    real: Tensor | None

    def grouped_query(self) -> Tensor:
        return self.query.unflatten(1, (self.key.shape[1], -1))  # [B, K, G, T, D]


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, parts: AdditiveParts, scaling: float | None
) -> _Inputs:
    check_shapes(query, key, value, real, None)
    if not query.shape[2:] == key.shape[2:] == value.shape[2:]:
        raise UnsupportedModelError(
            "Additive attention pools queries and keys of the same tokens and modulates values by keys, so all must "
            f"be alike, got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. To continue a text, "
            "decode from its state; for cross attention, use another kind."
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    if real is not None:
        padded = ~real[:, None, :, None]
        query, key, value = (x.masked_fill(padded, 0) for x in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = AdditiveParts(*(part.to(dtype) for part in parts))
    parts = parts._replace(query_score=parts.query_score * factor, key_score=parts.key_score * factor)
    return _Inputs(query.to(dtype), key.to(dtype), value.to(dtype), parts, real)


class _Bidirectional(torch.autograd.Function):
    """Query [B,K,G,T,D], key and value [B,K,T,D], learned parts [K,G,D] and [K,G,D,D] -> [B,K,G,T,D].

    Memory traffic is what this costs, and autograd's own backward of the same lines makes twice the passes. Vectors of
    a head are rows [B,K,G,D] here, and what is pooled for all heads of a group is one product.
    """

    @staticmethod
    def forward(ctx, query, key, value, real, *parts):
        parts = AdditiveParts(*parts)
        out, *pooled = _pool_and_map(query, key, value, parts, real)
        ctx.save_for_backward(query, key, value, *parts, *pooled)
        return out

    @staticmethod
    def backward(ctx, grad):
        with without_autocast(grad.device.type):
            return _Bidirectional.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        query, key, value, *rest = ctx.saved_tensors
        query_score, key_score, value_map, query_gain, pooled_gain = rest[:5]
        query_weights, key_weights, global_query, pooled_key, pooled_value = rest[5:]
        global_key = pooled_key * global_query
        grad_maps = grad.mT @ value.unsqueeze(2)  # [B, K, G, D, D]
        grad_global_key = (grad_maps * value_map).sum(3)
        grad_sum = grad.sum(3)
        grad_pooled_key, grad_pooled_value = grad_global_key * global_query, grad_sum * pooled_gain
        grad_scores = _softmax_backward(key_weights, grad_pooled_key @ key.mT + grad_pooled_value @ value.mT)
        grad_rows = grad_scores @ key  # of w_k * g_q
        rows = torch.cat([grad_pooled_key, key_score * global_query], 2)
        grad_key = torch.cat([key_weights, grad_scores], 2).mT @ rows
        maps = (value_map * global_key.unsqueeze(3)).flatten(2, 3).flatten(0, 1)
        grad_value = (key_weights.mT @ grad_pooled_value).flatten(0, 1)
        grad_value = grad_value.baddbmm_(grad.transpose(2, 3).flatten(3).flatten(0, 1), maps).view(value.shape)
        grad_global_query = grad_global_key * pooled_key + grad_rows * key_score
        grad_scores = _softmax_backward(query_weights, (grad_global_query.unsqueeze(3) @ query.mT).squeeze(3))
        rows = torch.stack([grad_global_query, query_score.expand_as(global_query)], 3)
        grad_query = torch.stack([query_weights, grad_scores], 3).mT @ rows
        grad_query.addcmul_(grad, query_gain.unsqueeze(2))
        return (
            grad_query,
            grad_key,
            grad_value,
            None,
            (grad_scores.unsqueeze(3) @ query).squeeze(3).sum(0),
            (grad_rows * global_query).sum(0),
            (grad_maps * global_key.unsqueeze(3)).sum(0),
            (grad * query).sum((0, 3)),
            (grad_sum * pooled_value).sum(0),
        )


def _pool_and_map(
    query: Tensor, key: Tensor, value: Tensor, parts: AdditiveParts, real: Tensor | None
) -> tuple[Tensor, ...]:
    """The output [B,K,G,T,D], the weights of queries and keys [B,K,G,T], and g_q, sum_j b_j k_j, sum_j b_j v_j."""
    query_weights = _softmax((parts.query_score.unsqueeze(2) @ query.mT).squeeze(3), real)
    global_query = (query_weights.unsqueeze(3) @ query).squeeze(3)
    key_weights = _softmax((parts.key_score * global_query) @ key.mT, real)
    pooled_key, pooled_value = key_weights @ key, key_weights @ value
    maps = parts.value_map * (pooled_key * global_query).unsqueeze(3)  # W_v (g_k * v) = (W_v diag(g_k)) v
    start = (parts.pooled_gain * pooled_value).unsqueeze(2)
    out = torch.addcmul(start, query.transpose(2, 3), parts.query_gain.unsqueeze(1))  # [B, K, T, G, D]
    out = out.flatten(3).flatten(0, 1).baddbmm_(value.flatten(0, 1), maps.flatten(2, 3).flatten(0, 1).mT)
    out = out.unflatten(0, value.shape[:2]).unflatten(3, parts.query_gain.shape[1:]).transpose(2, 3)
    return out, query_weights, key_weights, global_query, pooled_key, pooled_value


def _softmax(scores: Tensor, real: Tensor | None) -> Tensor:
    """[B,K,G,T]: softmax over the real positions; any weights where there is none, for there all is 0."""
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)


def _softmax_backward(weights: Tensor, grad: Tensor) -> Tensor:
    return weights * (grad - (weights * grad).sum(-1, keepdim=True))


def _causal(inputs: _Inputs, state: State | None) -> tuple[Tensor, State]:
    """[B,H,T,D] and the state after it; on CPU a few heads at a time, whose sums stay in the cache."""
    query = inputs.grouped_query()
    batch, kv_heads, groups, length, _ = query.shape
    step = kv_heads
    if not torch.compiler.is_compiling() and query.device.type == "cpu" and query.is_contiguous():
        step = max(1, TOKENS // (batch * groups * length))  # not where heads lie interleaved
    turns = [_causal_heads(inputs, state, slice(first, first + step)) for first in range(0, kv_heads, step)]
    if len(turns) == 1:
        return turns[0]
    outs, states = zip(*turns, strict=True)
    return torch.cat(outs, 1), tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))


def _causal_heads(inputs: _Inputs, state: State | None, chosen: slice) -> tuple[Tensor, State]:
    """`_causal` for the chosen key/value heads and their query heads."""
    kv_heads = inputs.key.shape[1]
    groups = inputs.query.shape[1] // kv_heads

    def split(x: Tensor, dim: int) -> Tensor:  # [.., H, ..] -> [.., K, G, ..]
        return x.unflatten(dim, (kv_heads, groups))[(slice(None),) * dim + (chosen,)]

    query = split(inputs.query, 1)  # [B, K, G, T, D]
    key, value = (x[:, chosen].unsqueeze(2) for x in (inputs.key, inputs.value))  # [B, K, 1, T, D]
    parts = AdditiveParts(*(split(part, 0).unsqueeze(2) for part in inputs.parts))  # [K, G, 1, D]
    past = None if state is None else tuple(split(part, 1) for part in state)
    real = None if inputs.real is None else inputs.real[:, None, None]  # [B, 1, 1, T]

    scores = (parts.query_score @ query.mT).squeeze(-2)  # [B, K, G, T]
    query_total, (global_query,) = prefix_means(scores, (query,), real, past and past[:2])
    products = global_query * key
    scores = (parts.key_score @ products.mT).squeeze(-2)
    key_total, (global_key, pooled) = prefix_means(scores, (products, value), real, past and past[2:])
    out = (global_key * value) @ parts.value_map.squeeze(2).mT
    out = out.addcmul_(query, parts.query_gain).addcmul_(pooled, parts.pooled_gain)
    after = (
        query_total[..., -1],
        global_query[..., -1, :],
        key_total[..., -1],
        global_key[..., -1, :],
        pooled[..., -1, :],
    )
    return out.flatten(1, 2), tuple(part.flatten(1, 2).clone() for part in after)
