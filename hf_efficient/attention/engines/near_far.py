"""Blocks of queries with two kinds of weights: those of softmax in a window, and linear ones for all other keys.

A block's span, the blocks of keys that its windows reach, gets both kinds of weights, each where it belongs; keys
before and after the span come as sums of phi(k)^T (v, 1) over whole blocks. `local_linear` says what it is for.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .pieces import Piece, count_blocks, pieces, spare_block
from .sums import fill_up, inverse_of, running_sums


class Layout(NamedTuple):
    """How queries and keys are cut: `blocks` blocks of queries of `size` positions. A block's span reaches `left`
    blocks back and `right` blocks ahead; `before` keys lie before the first query. `far` are the parts of a span with
    keys out of the window of some query of the block; `scaling` is that of the scores."""

    size: int
    left: int
    right: int
    blocks: int
    before: int
    far: tuple[slice, ...]
    scaling: float

    @property
    def span(self) -> int:
        """Keys in one span."""
        return (self.left + 1 + self.right) * self.size


def lay_out(length: int, seen: int, window: int, causal: bool, scaling: float) -> Layout:
    size = 64 if window <= 64 else 128  # larger blocks waste more pairs beyond the window, smaller ones run slower
    past = seen - length
    if not torch.compiler.is_exporting():  # an exported program keeps one size for all lengths
        size = size if length >= size else length
    count = count_blocks(length, size) + spare_block()
    reach = window - 1 if causal else window
    left = (reach + size - 1) // size  # the first query of a block looks back over so many blocks
    right = 0 if causal else left
    if not torch.compiler.is_compiling():
        left = min(left, count - 1 + (past + size - 1) // size)
        right = min(right, count - 1)
    before = min(past, left * size)  # what lies farther back is out of every window, and comes as sums
    # The far parts: the first and the last blocks of a span, as far as they hold a key out of some query's window.
    span = range(-left, right + 1)  # keys of block b are from b * size - (size - 1) to b * size + size - 1 away
    back = sum(block * size - size + 1 < -reach for block in span) * size
    ahead = sum(block * size + size - 1 > reach for block in span) * size if right else 0
    total = len(span) * size
    far: tuple[slice, ...] = (slice(0, total),)
    if back + ahead < total:
        far = tuple(part for part in (slice(0, back), slice(total - ahead, total)) if part.stop > part.start)
    return Layout(size, left, right, count, before, far, scaling)


def cut_queries(x: Tensor, fill: int, layout: Layout, kv_heads: int) -> Tensor:
    """[B,H,T,D] -> [B,K,N,G*size,D]: the rows of all query heads that share a key/value head side by side."""
    blocks = fill_up(x, 0, fill).unflatten(2, (layout.blocks, layout.size))
    return blocks.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(3, 4)


def make_masks(
    visible: Tensor, layout: Layout, window: int, causal: bool, dtype: torch.dtype
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


def common_scale(near: Tensor, mass: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from the near scores (powers of 2), and the factor on linear weights, whose sum is `mass`: so
    both are on one scale, on which the largest near weight, or the linear ones together, are 1."""
    top = torch.maximum(near.amax(-1, keepdim=True), (mass * mix).log2())
    top.masked_fill_(top == -torch.inf, 0)  # no key at all
    return top, top.neg().exp2_().mul(mix).masked_fill_(mass == 0, 0)


class NearAndFar(torch.autograd.Function):
    """Blocks of queries Q and features P [B,K,N,G*size,D] over keys, values with a last column of ones, and features
    of keys [B,K,(left+N+right)*size,D], and over `sums` [B,K,M,Dv+1] of keys before all. Gives [B,K,N,G*size,Dv].

    Of all weights only the logarithm of each query's sum is kept; the backward makes them anew. Powers are of 2: exp2
    has a fast kernel for all numbers, exp a very slow one for those that it maps to 0.
    """

    @staticmethod
    def forward(ctx, layout, mask, far, *inputs):
        query, phi_query, mix, key, value, phi_key, sums = inputs
        out = query.new_empty(*query.shape[:-1], value.shape[-1] - 1)
        log_total, factors = (query.new_empty(*query.shape[:-1], 1) for _ in range(2))
        for place, blocks in _places(query, layout):
            states = _sum_outside(phi_key[place], value[place], sums[place], layout)
            for piece in blocks:
                near = _scores(query[piece], key, mask, piece, layout)
                linear = _linear_weights(phi_query[piece], phi_key, far, piece, layout)
                outside = phi_query[piece] @ states[:, :, piece[2]]
                mass = sum((x.sum(-1, keepdim=True) for x in linear), outside[..., -1:])
                top, factor = common_scale(near, mass, mix[piece[1]])
                near.sub_(top).exp2_()
                for part, weights in zip(layout.far, linear, strict=True):
                    near[..., part].addcmul_(weights, factor)
                # Near weights are 0 where far ones are not: added up, they take one product with the values.
                total = (near @ _spans(value, piece, layout)).addcmul_(outside, factor)
                inverse = inverse_of(total[..., -1:])
                out[piece] = total[..., :-1] * inverse
                # Of base 2, on the scale of the scores: exp2(score - log_total) is a weight with the sum in it.
                log_total[piece] = top - inverse.log2()
                factors[piece] = factor * inverse
        ctx.save_for_backward(*inputs, mask, far, out, log_total, factors)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx, grad):
        layout, saved = ctx.layout, ctx.saved_tensors  # read once: checkpointing unpacks them one time only
        inputs, (mask, far, out, log_total, factors) = saved[:7], saved[7:]
        query, phi_query, mix, key, value, phi_key, sums = inputs
        grads = [torch.zeros_like(x) for x in inputs]
        grad_query, grad_phi_query, grad_mix, grad_key, grad_value, grad_phi_key, grad_sums = grads
        for place, blocks in _places(query, layout):
            states = _sum_outside(phi_key[place], value[place], sums[place], layout)
            grad_states = torch.empty_like(states)
            for piece in blocks:
                features = phi_query[piece] * factors[piece]
                linear = _linear_weights(features, phi_key, far, piece, layout)
                near = _scores(query[piece], key, mask, piece, layout).sub_(log_total[piece]).exp2_()
                # The last column of the values is 1, its sum the normaliser: out = a / z, dz = -(grad . out) / z.
                upper = torch.cat([grad[piece], -(grad[piece] * out[piece]).sum(-1, keepdim=True)], -1)
                pairs = upper @ _spans(value, piece, layout).mT  # the gradient of all weights
                grad_scores = (near * pairs).mul_(layout.scaling)
                grad_query[piece] = grad_scores @ _spans(key, piece, layout)
                _add_to_spans(grad_key, piece, grad_scores.mT @ query[piece], layout)
                grad_features = upper @ states[:, :, piece[2]].mT
                for part, weights in zip(layout.far, linear, strict=True):
                    near[..., part].add_(weights)
                    grad_linear = _only_far(pairs[..., part], far[:, part])
                    grad_features.add_(grad_linear @ _spans(phi_key, piece, layout)[..., part, :])
                    _add_to_spans(grad_phi_key, piece, grad_linear.mT @ features, layout, part)
                grad_phi_query[piece] = grad_features * factors[piece]
                # `features` hold the factor mix as well; the sum is divided by it at the end.
                grad_mix[piece[1]].add_(features.mul(grad_features).sum(-1, keepdim=True).sum((0, 2)).unsqueeze(1))
                _add_to_spans(grad_value, piece, near.mT @ upper, layout)
                grad_states[:, :, piece[2]] = features.mT @ upper
            grad_sums[place] = _sum_outside_backward(
                grad_states, phi_key[place], value[place], grad_phi_key[place], grad_value[place], layout
            )
        grad_mix.div_(mix)
        return None, None, None, *grads


def _places(query: Tensor, layout: Layout) -> Iterator[tuple[Piece, list[Piece]]]:
    """Pieces of the first two dimensions, with those of the first three inside each."""
    numbers = query.shape[3] * layout.span
    for place in pieces(query.shape[:2], numbers * layout.blocks, query):
        yield place, [(*place, *block) for block in pieces(query.shape[2:3], numbers, query)]


def _scores(query: Tensor, key: Tensor, mask: Tensor, piece: Piece, layout: Layout) -> Tensor:
    """[b,k,n,G*size,span]: log2(e) times the scaled scores of some blocks, -inf out of the window."""
    scores = (query * (layout.scaling / math.log(2))) @ _spans(key, piece, layout).mT
    rows = piece[0] if mask.shape[0] > 1 else slice(None)
    scores.unflatten(-2, (-1, layout.size)).add_(mask[rows, :, piece[2]])
    return scores


def _linear_weights(features: Tensor, phi_key: Tensor, far: Tensor, piece: Piece, layout: Layout) -> list[Tensor]:
    """[b,k,n,G*size,keys] for each far part of the span: linear weights, 0 in the window."""
    spans = _spans(phi_key, piece, layout)
    return [_only_far(features @ spans[..., part, :].mT, far[:, part]) for part in layout.far]


def _spans(x: Tensor, piece: Piece, layout: Layout) -> Tensor:
    """[B,K,blocks*size,D] -> [b,k,n,span,D]: what the chosen blocks reach; they overlap, and are no copy."""
    return x[piece[:2]].unfold(2, layout.span, layout.size)[:, :, piece[2]].mT


def _add_to_spans(grad: Tensor, piece: Piece, terms: Tensor, layout: Layout, part: slice = slice(0, None)) -> None:
    """The gradient of `_spans`: terms [b,k,n,part of the span,D] are added where they overlap."""
    blocks = grad[piece[:2]].unflatten(2, (-1, layout.size))
    start = (piece[2].start or 0) + part.start // layout.size
    for offset, block in enumerate(terms.unflatten(3, (-1, layout.size)).unbind(3)):
        blocks[:, :, start + offset : start + offset + terms.shape[2]].add_(block)


def _only_far(x: Tensor, far: Tensor) -> Tensor:
    """x [..,G*size,keys], set to 0 in the window."""
    x.unflatten(-2, (-1, far.shape[0])).mul_(far)
    return x


def _sum_outside(phi_key: Tensor, value: Tensor, sums: Tensor, layout: Layout) -> Tensor:
    """[b,k,N,M,Dv+1]: sum_j phi(k_j)^T (v_j, 1) over the keys before and after the span of each block."""
    phi_key, value = (x.unflatten(2, (-1, layout.size)) for x in (phi_key, value))
    # With `left` blocks in front, block n of the keys is where the span of query block n begins: the running sum
    # before entry n is all that lies before that span.
    if not layout.right:
        terms = phi_key[:, :, : layout.blocks].mT @ value[:, :, : layout.blocks]
        return running_sums(sums, terms)[:, :, : layout.blocks]
    terms = phi_key.mT @ value
    before = running_sums(sums, terms[:, :, : layout.blocks])[:, :, : layout.blocks]
    after = running_sums(torch.zeros_like(sums), terms[:, :, -layout.blocks :].flip(2))[:, :, : layout.blocks]
    return before + after.flip(2)


def _sum_outside_backward(
    grad: Tensor, phi_key: Tensor, value: Tensor, grad_phi_key: Tensor, grad_value: Tensor, layout: Layout
) -> Tensor:
    """Adds to the gradients of features and values, given that of `_sum_outside`; gives that of its `sums`."""
    phi_key, value, grad_phi_key, grad_value = (
        x.unflatten(2, (-1, layout.size)) for x in (phi_key, value, grad_phi_key, grad_value)
    )
    nothing = torch.zeros_like(grad[:, :, 0])
    later = running_sums(nothing, grad.flip(2)).flip(2)
    terms = [(slice(0, layout.blocks - 1), later[:, :, 1:-1])]
    if layout.right:
        terms.append((slice(layout.span // layout.size, None), running_sums(nothing, grad)[:, :, 1:-1]))
    for some, grad_terms in terms:
        grad_phi_key[:, :, some].add_(value[:, :, some] @ grad_terms.mT)
        grad_value[:, :, some].add_(phi_key[:, :, some] @ grad_terms)
    return later[:, :, 0]
