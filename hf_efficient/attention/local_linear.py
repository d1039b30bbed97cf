"""Softmax attention in a window and linear attention over all other keys, with one normaliser. O(n * window).

    weight_ij = exp(scaling q_i . k_j)         j in the window W(i), as in `local`
    weight_ij = mix_h phi(q_i) . phi(k_j)      every other key, causal: every earlier one
    out_i     = sum_j weight_ij v_j / sum_j weight_ij

(LoLCATs 2024, arXiv 2410.10254, section 3.2.) The mix is a learned positive number of each head. Unlike there, it is
not the softmax weights alone that are divided by the largest of the window for stability: all weights are, so they keep
the ratio of the formula whatever the scores.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> local_linear_attention(query, key, value, window=64).shape
    torch.Size([1, 12, 4096, 64])

How: queries are cut into blocks. A block's span, the blocks of keys that its windows reach, gets both kinds of weights,
each where it belongs; the keys before and after the span come as sums of phi(k)^T v over whole blocks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..errors import ConfigError
from .config import AttentionConfig
from .feature_maps import FEATURE_MAPS, FeatureMapAttention, MapWeights, check_map
from .full import check_positions, check_shapes, check_window, full_attention, section
from .linear import add_to_sums, drop_keys, features, fill_up, inverse_of, prepare, running_sums, without_autocast
from .pieces import Piece, pieces
from .variant import HeadShape, State


class LocalLinearAttention(FeatureMapAttention):
    """`local_linear_attention` with the window and the feature map of the config, and a learned mix for each head.

    The mix starts where the mean linear weight of standard normal queries and keys is that of softmax.
    """

    has_state = True

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.log_mix = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.constant_(self.log_mix, 0.5 - math.log(FEATURE_MAPS[self.config.feature_map].mean(self.shape.dim)))

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        options = {"window": self.config.window, "log_mix": self.log_mix, **self.map_options}
        return local_linear_attention(query, key, value, key_mask, **options, **kwargs)

    def decode(self, query, key, value, key_mask, state, *, scaling, bias):
        options = {"window": self.config.window, "log_mix": self.log_mix, **self.map_options}
        return local_linear_decode(query, key, value, key_mask, state, **options, scaling=scaling)

    def macs(self, length, causal):
        features, making = self.feature_macs()
        reach = self.config.window if causal else 2 * self.config.window + 1
        return making + 2 * min(length, reach) * self.shape.dim + 2 * features * (self.shape.dim + 1)


class _Layout(NamedTuple):
    """How queries and keys are cut: `count` blocks of queries of `size` positions. A block's span reaches `left` blocks
    back and `right` blocks ahead; `kept` of its keys lie before the first query. `far` are the parts of a span with
    keys out of the window of some query of the block; `scaling` is that of the scores."""

    size: int
    left: int
    right: int
    count: int
    kept: int
    far: tuple[slice, ...]
    scaling: float

    @property
    def span(self) -> int:
        """Keys in one span."""
        return (self.left + 1 + self.right) * self.size


def local_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    window: int,
    log_mix: Tensor | None = None,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax weights in a window and linear weights beyond; shapes as in `full_attention`.

    Parameters:
        window: bidirectional: keys with |i - j| <= window; causal: the last `window` keys including the token itself.
        log_mix: [H], logarithm of the factor on the linear weights of each head; None means 0.
        feature_map, map_weights: as in `linear_attention`.
        scaling: factor on the scores in the window, and what the feature map takes for it; None means D**-0.5.
        dropout: probability of dropping a key's contribution for all queries, as in `linear_attention`; in a window
            over everything without gradients, of dropping a weight.

    Returns:
        [B, H, T, Dv] in the dtype of query, computed in fp32 at least. Where the window covers everything, the same as
        `full_attention`. A query that may see no key gives zeros.

    Raises:
        ConfigError: an unknown feature map, weights or a mix that do not fit, or a window below 1.
        UnsupportedModelError: bidirectional with T != S (cross attention), or shapes that do not fit together.
    """
    _check(query, key, value, key_mask, window, log_mix, feature_map, map_weights)
    length, seen = query.shape[2], key.shape[2]
    check_positions(length, seen, causal)
    # With gradients, learned parts must take part, be it with gradients of 0.
    if not torch.compiler.is_exporting() and window >= seen and not torch.is_grad_enabled():
        return full_attention(query, key, value, key_mask, causal=causal, scaling=scaling, dropout=dropout)
    with without_autocast(query.device.type):
        inputs = _prepare(query, key, value, key_mask, feature_map, map_weights, log_mix, scaling)
        if dropout:
            inputs = inputs._replace(value=drop_keys(inputs.value, dropout))
        return _near_and_far(inputs, min(window, seen), causal, scaling, None).to(query.dtype)


def local_linear_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    state: State | None = None,
    *,
    window: int,
    log_mix: Tensor | None = None,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, State]:
    """Causal `local_linear_attention` of T new tokens after those that the state sums up.

    The state is the sums [B, K, M, Dv + 1] over the keys that left the window, as in `linear_decode`, and of those
    that the next token's window holds, keys, values and mask.

    Returns:
        [B, H, T, Dv] in the dtype of query, and the state after the new tokens.
    """
    _check(query, key, value, key_mask, window, log_mix, feature_map, map_weights)
    mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    sums = None
    if state is not None:
        sums, *kept = state
        key, value = (torch.cat(pair, 2) for pair in zip(kept[:2], (key, value), strict=True))
        mask = torch.cat([kept[2], mask], 1)
    with without_autocast(query.device.type):
        inputs = _prepare(query, key, value, mask, feature_map, map_weights, log_mix, scaling)
        out = _near_and_far(inputs, window, True, scaling, sums).to(query.dtype)
        leaving = max(key.shape[2] - (window - 1), 0)
        if leaving or sums is None:
            sums = add_to_sums(sums, inputs.phi_key[:, :, :leaving], inputs.value[:, :, :leaving])
    return out, (sums, key[:, :, leaving:], value[:, :, leaving:], mask[:, leaving:])


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    window: int,
    log_mix: Tensor | None,
    feature_map: str,
    map_weights: MapWeights | None,
) -> None:
    check_window(window)
    check_map(feature_map, map_weights, query, key)
    check_shapes(query, key, value, key_mask, None)
    if log_mix is not None and tuple(log_mix.shape) != (query.shape[1],):
        raise ConfigError(f"log_mix must be [heads = {query.shape[1]}], got {tuple(log_mix.shape)}.")


class _Inputs(NamedTuple):
    """query [B,H,T,D], key, value, phi of queries and of keys, all in the dtype of the sums, zero at padded keys; `mix`
    [H]; `real` [B or 1, S]."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_query: Tensor
    phi_key: Tensor
    mix: Tensor
    real: Tensor


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    map_weights: MapWeights | None,
    log_mix: Tensor | None,
    scaling: float | None,
) -> _Inputs:
    query, key, value = prepare(query, key, value, key_mask)
    phi = FEATURE_MAPS[feature_map]
    absolute = phi._replace(of_query=phi.phi)  # beside exp(q . k) it is not only ratios that count
    phi_query, phi_key = features(query, key, key_mask, absolute, map_weights, scaling)
    mix = query.new_ones(query.shape[1]) if log_mix is None else log_mix.to(query.dtype).exp()
    real = key.new_ones(1, key.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    return _Inputs(query, key, value, phi_query, phi_key, mix, real)


def _near_and_far(
    inputs: _Inputs, window: int, causal: bool, scaling: float | None, sums: Tensor | None
) -> Tensor:
    """[B,H,T,Dv]: softmax over the window, linear over the other keys and what `sums` holds of keys before."""
    length, seen = inputs.query.shape[2], inputs.key.shape[2]
    kv_heads, groups = inputs.key.shape[1], inputs.query.shape[1] // inputs.key.shape[1]
    layout = _lay_out(length, seen, window, causal, inputs.query.shape[-1] ** -0.5 if scaling is None else scaling)
    first = seen - length - layout.kept  # the keys before it are out of every window
    if first:
        sums = add_to_sums(sums, inputs.phi_key[:, :, :first], inputs.value[:, :, :first])
    values = F.pad(inputs.value, (0, 1), value=1.0)
    if sums is None:
        sums = values.new_zeros(*values.shape[:2], inputs.phi_key.shape[-1], values.shape[-1])
    lead, fill = layout.left * layout.size - layout.kept, layout.count * layout.size - length
    trail = fill + layout.right * layout.size
    query, phi_query = (_cut(x, fill, layout, kv_heads) for x in (inputs.query, inputs.phi_query))
    key, value, phi_key = (fill_up(x[:, :, first:], lead, trail) for x in (inputs.key, values, inputs.phi_key))
    mix = inputs.mix.view(kv_heads, 1, groups, 1).expand(-1, -1, -1, layout.size).flatten(2).unsqueeze(-1)
    masks = _masks(F.pad(inputs.real[:, first:], (lead, trail)), layout, window, causal, query.dtype)
    out = _Blocks.apply(query, phi_query, mix, key, value, phi_key, sums, *masks, layout)  # [B, K, N, G * size, Dv]
    out = out.unflatten(3, (groups, layout.size)).transpose(2, 3)
    return section(out.flatten(3, 4).flatten(1, 2), 2, 0, length)


def _lay_out(length: int, seen: int, window: int, causal: bool, scaling: float) -> _Layout:
    size = 64 if window <= 64 else 128  # larger blocks waste more pairs beyond the window, smaller ones run slower
    past = seen - length
    if not torch.compiler.is_exporting():  # an exported program keeps one size for all lengths
        size = size if length >= size else length
    count = (length + size - 1) // size
    reach = window - 1 if causal else window
    left = (reach + size - 1) // size
    right = 0 if causal else left
    if not torch.compiler.is_compiling():
        left = min(left, count - 1 + (past + size - 1) // size)
        right = min(right, count - 1)
    kept = min(past, left * size)
    return _Layout(size, left, right, count, kept, _far_parts(size, left, right, reach), scaling)


def _far_parts(size: int, left: int, right: int, reach: int) -> tuple[slice, ...]:
    """The first and the last blocks of a span, as far as they hold a key out of the window of some query."""
    span = range(-left, right + 1)  # keys of block b are from b * size - (size - 1) to b * size + size - 1 away
    back = sum(block * size - size + 1 < -reach for block in span) * size
    ahead = sum(block * size + size - 1 > reach for block in span) * size if right else 0
    total = len(span) * size
    if back + ahead >= total:
        return (slice(0, total),)
    return tuple(part for part in (slice(0, back), slice(total - ahead, total)) if part.stop > part.start)


def _cut(x: Tensor, fill: int, layout: _Layout, kv_heads: int) -> Tensor:
    """[B,H,T,D] -> [B,K,N,G*size,D]: the rows of all query heads that share a key/value head side by side."""
    blocks = fill_up(x, 0, fill).unflatten(2, (layout.count, layout.size))
    return blocks.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(3, 4)


def _masks(
    visible: Tensor, layout: _Layout, window: int, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """0 in the window and -inf elsewhere [B or 1, 1, N, 1, size, span]; 1 at keys beyond the window [size, span]."""
    place = torch.arange(layout.span, device=visible.device) - layout.left * layout.size
    distance = place - torch.arange(layout.size, device=visible.device)[:, None]  # of the key from the query
    if causal:
        near, far = (distance > -window) & (distance <= 0), distance <= -window
    else:
        near, far = distance.abs() <= window, distance.abs() > window
    spans = visible.unfold(1, layout.span, layout.size)  # [B or 1, N, span]
    hidden = ~(spans.unsqueeze(2) & near)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=visible.device).masked_fill_(hidden, float("-inf"))
    return mask[:, None, :, None], far.to(dtype)


class _Blocks(torch.autograd.Function):
    """Blocks of queries Q and features P [B,K,N,G*size,D] over keys, values with a last column of ones, and features
    of keys [B,K,(left+N+right)*size,D], and over `sums` [B,K,M,Dv+1] of keys before all. Gives [B,K,N,G*size,Dv].

    Of all weights only the logarithm of each query's sum is kept; the backward makes them anew. Powers are of 2: exp2
    has a fast kernel for all numbers, exp a very slow one for those that it maps to 0.
    """

    @staticmethod
    def forward(ctx, query, phi_query, mix, key, value, phi_key, sums, mask, far, layout):
        out = query.new_empty(*query.shape[:-1], value.shape[-1] - 1)
        log_total, factors = query.new_empty(2, *query.shape[:-1], 1)
        for place, blocks in _places(query, layout):
            states = _sum_outside(phi_key[place], value[place], sums[place], layout)
            for own in blocks:
                near = _scores(query[own], key, mask, own, layout)
                linear = _linear_weights(phi_query[own], phi_key, far, own, layout)
                outside = phi_query[own] @ states[:, :, own[2]]
                mass = sum((x.sum(-1, keepdim=True) for x in linear), outside[..., -1:]) * mix[own[1]]
                top = torch.maximum(near.amax(-1, keepdim=True), mass.log2())
                top = torch.where(top == -torch.inf, 0, top)  # no key at all
                factor = torch.where(mass == 0, 0, top.neg().exp2() * mix[own[1]])
                near.sub_(top).exp2_()
                for part, weights in zip(layout.far, linear, strict=True):
                    near[..., part].addcmul_(weights, factor)
                total = (near @ _spans(value, own, layout)).addcmul_(outside, factor)
                inverse = inverse_of(total[..., -1:])
                out[own] = total[..., :-1] * inverse
                log_total[own] = top - inverse.log2()
                factors[own] = factor * inverse
        inputs = query, phi_query, mix, key, value, phi_key, sums, mask, far
        ctx.save_for_backward(*inputs, out, log_total, factors)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx, grad):
        layout, saved = ctx.layout, ctx.saved_tensors  # read once: checkpointing unpacks them one time only
        inputs, (out, log_total, factors) = saved[:9], saved[9:]
        query, phi_query, mix, key, value, phi_key, sums, mask, far = inputs
        grads = [torch.zeros_like(x) for x in inputs[:7]]
        grad_query, grad_phi_query, grad_mix, grad_key, grad_value, grad_phi_key, grad_sums = grads
        for place, blocks in _places(query, layout):
            states = _sum_outside(phi_key[place], value[place], sums[place], layout)
            grad_states = torch.empty_like(states)
            for own in blocks:
                features = phi_query[own] * factors[own]
                linear = _linear_weights(features, phi_key, far, own, layout)
                near = _scores(query[own], key, mask, own, layout).sub_(log_total[own]).exp2_()
                upper = torch.cat([grad[own], -(grad[own] * out[own]).sum(-1, keepdim=True)], -1)
                pairs = upper @ _spans(value, own, layout).mT  # the gradient of all weights
                grad_scores = (near * pairs).mul_(layout.scaling)
                grad_query[own] = grad_scores @ _spans(key, own, layout)
                _add_to_spans(grad_key, own, grad_scores.mT @ query[own], layout)
                grad_features = upper @ states[:, :, own[2]].mT
                for part, weights in zip(layout.far, linear, strict=True):
                    near[..., part].add_(weights)
                    grad_linear = _only_far(pairs[..., part], far[:, part])
                    grad_features.add_(grad_linear @ _spans(phi_key, own, layout)[..., part, :])
                    _add_to_spans(grad_phi_key, own, grad_linear.mT @ features, layout, part)
                grad_phi_query[own] = grad_features * factors[own]
                grad_mix[own[1]].add_(features.mul(grad_features).sum(-1, keepdim=True).sum((0, 2)).unsqueeze(1))
                _add_to_spans(grad_value, own, near.mT @ upper, layout)
                grad_states[:, :, own[2]] = features.mT @ upper
            grad_sums[place] = _sum_outside_backward(
                grad_states, phi_key[place], value[place], grad_phi_key[place], grad_value[place], layout
            )
        grad_mix.div_(mix)
        return *grads, None, None, None


def _places(query: Tensor, layout: _Layout) -> Iterator[tuple[Piece, list[Piece]]]:
    """Pieces of the first two dimensions, with those of the first three inside each."""
    numbers = query.shape[3] * layout.span
    for place in pieces(query.shape[:2], numbers * layout.count, query):
        yield place, [(*place, *block) for block in pieces(query.shape[2:3], numbers, query)]


def _scores(query: Tensor, key: Tensor, mask: Tensor, own: Piece, layout: _Layout) -> Tensor:
    """[b,k,n,G*size,span]: log2(e) times the scaled scores of some blocks, -inf out of the window."""
    scores = (query * (layout.scaling / math.log(2))) @ _spans(key, own, layout).mT
    rows = own[0] if mask.shape[0] > 1 else slice(None)
    scores.unflatten(-2, (-1, layout.size)).add_(mask[rows, :, own[2]])
    return scores


def _linear_weights(features: Tensor, phi_key: Tensor, far: Tensor, own: Piece, layout: _Layout) -> list[Tensor]:
    """[b,k,n,G*size,keys] for each far part of the span: linear weights, 0 in the window."""
    spans = _spans(phi_key, own, layout)
    return [_only_far(features @ spans[..., part, :].mT, far[:, part]) for part in layout.far]


def _spans(x: Tensor, own: Piece, layout: _Layout) -> Tensor:
    """[B,K,blocks*size,D] -> [b,k,n,span,D]: what the chosen blocks reach; they overlap, and are no copy."""
    return x[own[:2]].unfold(2, layout.span, layout.size)[:, :, own[2]].mT


def _add_to_spans(grad: Tensor, own: Piece, terms: Tensor, layout: _Layout, part: slice = slice(0, None)) -> None:
    """The gradient of `_spans`: terms [b,k,n,part of the span,D] are added where they overlap."""
    blocks = grad[own[:2]].unflatten(2, (-1, layout.size))
    start = (own[2].start or 0) + part.start // layout.size
    for offset, block in enumerate(terms.unflatten(3, (-1, layout.size)).unbind(3)):
        blocks[:, :, start + offset : start + offset + terms.shape[2]].add_(block)


def _only_far(x: Tensor, far: Tensor) -> Tensor:
    """x [..,G*size,keys], set to 0 in the window."""
    x.unflatten(-2, (-1, far.shape[0])).mul_(far)
    return x


def _sum_outside(phi_key: Tensor, value: Tensor, sums: Tensor, layout: _Layout) -> Tensor:
    """[b,k,N,M,Dv+1]: sum_j phi(k_j)^T (v_j, 1) over the keys before and after the span of each block."""
    phi_key, value = (x.unflatten(2, (-1, layout.size)) for x in (phi_key, value))
    used = layout.count - 1 if not layout.right else phi_key.shape[2]
    terms = phi_key[:, :, :used].mT @ value[:, :, :used]
    states = running_sums(sums, terms[:, :, : layout.count - 1])
    if layout.right:
        states += running_sums(torch.zeros_like(sums), terms[:, :, layout.span // layout.size :].flip(2)).flip(2)
    return states


def _sum_outside_backward(
    grad: Tensor, phi_key: Tensor, value: Tensor, grad_phi_key: Tensor, grad_value: Tensor, layout: _Layout
) -> Tensor:
    """Adds to the gradients of features and values, given that of `_sum_outside`; gives that of its `sums`."""
    phi_key, value, grad_phi_key, grad_value = (
        x.unflatten(2, (-1, layout.size)) for x in (phi_key, value, grad_phi_key, grad_value)
    )
    nothing = torch.zeros_like(grad[:, :, 0])
    later = running_sums(nothing, grad.flip(2)).flip(2)
    terms = [(slice(0, layout.count - 1), later[:, :, 1:-1])]
    if layout.right:
        terms.append((slice(layout.span // layout.size, None), running_sums(nothing, grad)[:, :, 1:-1]))
    for some, grad_terms in terms:
        grad_phi_key[:, :, some].add_(value[:, :, some] @ grad_terms.mT)
        grad_value[:, :, some].add_(phi_key[:, :, some] @ grad_terms)
    return later[:, :, 0]
