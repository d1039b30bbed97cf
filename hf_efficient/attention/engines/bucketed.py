"""Softmax over ranges of sorted keys, one range for each query and round: the evaluation of `lsh_attention`.

In round r query m sees the keys with low[r,m] <= rank[r,key] < high[r,m], where `rank` is the place of a key in the
round's sorted list. Sorted keys are cut into blocks. The queries whose ranges begin in the same block share one window
of keys, long enough for any of them; they are dealt out to query blocks of a fixed size, so that each query block
belongs to one window. At most M / QUERIES + S / KEYS query blocks can be needed, whatever the data: shapes are static.
Then all is matrix products, with a mask that compares ranks.

A pair that several rounds see is masked in all but the first of them. The rounds are merged by their running maximum
and sum (log-sum-exp), like the parts of any online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867). The backward
pass forms the weights again from the log-sum-exp of the whole, so that memory is O(n) and not O(n * block_size).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .parts import Options
from .sums import without_autocast

KEYS, QUERIES = 64, 32  # in a block: larger blocks see more masked pairs, smaller ones gather more
GATHERED = 1 << 21  # numbers of keys and values gathered at a time on a CPU, so that they stay in its cache

HIDDEN, FLOOR = -1e30, -1e29  # added to a hidden score; a row whose scores are all below FLOOR has no key
LOG2_E = math.log2(math.e)  # scores are kept in units of log 2: exp2 is much faster than exp, most so at hidden scores


class BucketOrder(NamedTuple):
    """Who sees whom, for R rounds and N rows (batch times key/value heads), of S keys and M queries each.

    rank [R,N,S]: the place of each key in the round's sorted list. low, high [R,N,M]: query m sees the keys with
    low <= rank < high. line [R,N,M]: the place of each query in an order in which low does not fall.
    """

    rank: Tensor
    low: Tensor
    high: Tensor
    line: Tensor


class _Plan(NamedTuple):
    """`BucketOrder` and the blocks: Q query blocks of `QUERIES` slots, L = Q * QUERIES.

    position [R,N,S]: of each sorted key, the inverse of rank. slot [R,N,M]: of each query. In each slot, query [R,N,L]
    and its range, slot_low and slot_high; an unused slot has any query and an empty range. window [R,N,Q]: the first
    sorted key of a query block's window.
    """

    rank: Tensor
    low: Tensor
    high: Tensor
    position: Tensor
    slot: Tensor
    query: Tensor
    slot_low: Tensor
    slot_high: Tensor
    window: Tensor


class _Settings(NamedTuple):
    """`length` T: with G query heads to a row M = G * T; `reach`: the longest range."""

    length: int
    reach: int
    scaling: float
    dropout: float


class _Rows(NamedTuple):
    """Some of the rows: query [N,M,D], both [N,S,D+Dv] (key and value), bias [N,G*(S+T-1)] or None, own_key [N,M]."""

    query: Tensor
    both: Tensor
    bias: Tensor | None
    own_key: Tensor
    plan: _Plan


class _Scores(NamedTuple):
    """Some of a round's blocks of C queries, with their windows of W keys; P of each row, N*P in all.

    scores [N*P,C,W]; queries [N*P,C,*] and both [N*P,W,D+Dv]: what was gathered; block [N,P]: of sorted keys, where
    the window begins; pairs [N,P*C*W]: the place in `bias`.
    """

    scores: Tensor
    queries: Tensor
    both: Tensor
    block: Tensor
    pairs: Tensor | None


def bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, order: BucketOrder, own_key: Tensor, reach: int, options: Options
) -> Tensor:
    """Attention over the union of all rounds' ranges; shapes as in `full_attention`.

    Parameters:
        own_key: [N, M] bool, queries that see the key at their own position beside what the ranges hold.
        reach: the longest range.
    """
    batch, heads, length, dim = query.shape
    bias, scaling = options.bias, options.scaling
    if bias is not None:
        bias = by_kv_head(bias.unsqueeze(-1).expand(batch, -1, -1, -1), key).squeeze(-1)
    settings = _Settings(length, reach, dim**-0.5 if scaling is None else scaling, options.dropout)
    rows = by_kv_head(query, key), key.flatten(0, 1), value.flatten(0, 1)
    out = _Bucketed.apply(*rows, bias, own_key, settings, *_make_plan(order))
    return out.view(batch, heads, length, value.shape[3])


def by_kv_head(x: Tensor, key: Tensor) -> Tensor:
    """[B,H,n,E] -> [B*K,G*n,E], a row for each key/value head with its G query heads one after the other."""
    kv_heads = key.shape[1]
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).flatten(2, 3).flatten(0, 1)


def _make_plan(order: BucketOrder) -> _Plan:
    """Deal the queries out to query blocks."""
    rank, low, high, line = order
    rounds, rows, seen = rank.shape
    length, device = low.shape[2], rank.device
    key_blocks = seen // KEYS + 2  # an empty range may begin behind the last key; and never 1, for any exported length
    block = low // KEYS
    count = rank.new_zeros(rounds, rows, key_blocks).scatter_add_(2, block, torch.ones_like(block))
    needed = (count + QUERIES - 1) // QUERIES
    end = needed.cumsum(-1)
    query_blocks = (length + QUERIES - 1) // QUERIES + key_blocks
    if in_parts(rank):
        query_blocks = int(end.max())
    begin = end - needed
    # `line` sorts the queries by `low`: those of one key block are neighbours, and fill its query blocks in turn.
    slot = line + (begin * QUERIES - count.cumsum(-1) + count).gather(-1, block)
    # A slot that no query fills keeps query 0 and the empty range from 0 to 0.
    unused = rank.new_zeros(rounds, rows, query_blocks * QUERIES)
    query = unused.scatter(2, slot, torch.arange(length, device=device).expand_as(slot))
    # The key block of a query block is the last that begins there or before; one without queries begins with the next.
    starts = rank.new_zeros(rounds, rows, query_blocks + 1).scatter_add_(2, begin, torch.ones_like(begin))
    window = (starts.cumsum(-1)[..., :query_blocks] - 1) * KEYS
    position = torch.empty_like(rank).scatter_(2, rank, torch.arange(seen, device=device).expand_as(rank))
    slot_low, slot_high = unused.scatter(2, slot, low), unused.scatter(2, slot, high)
    return _Plan(rank, low, high, position, slot, query, slot_low, slot_high, window)


def in_parts(x: Tensor) -> bool:
    """Whether sizes may follow the data and work be cut up: on a CPU, but not in a compiled or exported program."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _Bucketed(torch.autograd.Function):
    """query [N,M,D], key [N,S,D], value [N,S,Dv], bias and own_key as in `_Rows`, a `_Plan` -> [N,M,Dv]."""

    @staticmethod
    def forward(ctx, query, key, value, bias, own_key, settings, *plan):
        parts = []
        with without_autocast(query.device.type):
            for part in _cut(query, query.shape[0], _gathered(plan[-1].shape[2], key, value, settings)):
                parts.append(_forward(_rows(part, query, key, value, bias, own_key, _Plan(*plan)), settings))
        out, log_sum, keeps = zip(*parts, strict=True)
        out, log_sum = torch.cat(out), torch.cat(log_sum)
        ctx.save_for_backward(
            query, key, value, bias, own_key, out, log_sum, *plan, *(x for part in keeps for x in part)
        )
        ctx.settings = settings
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, bias, own_key, out, log_sum, *others = ctx.saved_tensors
        plan, keeps = _Plan(*others[: len(_Plan._fields)]), iter(others[len(_Plan._fields) :])
        grads = []
        with without_autocast(query.device.type):
            for part in _cut(query, query.shape[0], _gathered(plan.window.shape[2], key, value, ctx.settings)):
                rows = _rows(part, query, key, value, bias, own_key, plan)
                grads.append(_backward(rows, grad[part], out[part], log_sum[part], keeps, ctx.settings))
        grad_query, grad_both, grad_bias = (None if x[0] is None else torch.cat(x) for x in zip(*grads, strict=True))
        grad_key, grad_value = grad_both.to(key.dtype).split([key.shape[2], value.shape[2]], -1)
        if bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, grad_bias, None, None, *[None] * len(plan)


def _gathered(blocks: int, key: Tensor, value: Tensor, settings: _Settings) -> int:
    """How many numbers of keys and values the windows of so many query blocks hold."""
    return blocks * (KEYS + settings.reach) * (key.shape[2] + value.shape[2])


def _cut(like: Tensor, total: int, gathered: int) -> list[slice]:
    """Cut `total` things that gather so many numbers each into parts of about `GATHERED`, or not at all."""
    if not in_parts(like):
        return [slice(0, total)]
    at_once = max(1, GATHERED // gathered)
    return [slice(start, min(start + at_once, total)) for start in range(0, total, at_once)]


def _rows(
    part: slice, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, own_key: Tensor, plan: _Plan
) -> _Rows:
    """Some of the rows, in fp32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    both = torch.cat([key[part], value[part]], -1).to(dtype)
    of_bias = None if bias is None else bias[part].to(dtype) * LOG2_E
    return _Rows(query[part].to(dtype), both, of_bias, own_key[part], _Plan(*(x[:, part] for x in plan)))


def _forward(rows: _Rows, settings: _Settings) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The output [N,M,Dv], log2 of the sum of exponentials [N,M,1], and what dropout keeps."""
    top, _, value = _own_scores(rows, settings)
    top = top.clamp(min=FLOOR)
    total = rows.own_key.unsqueeze(-1).to(top.dtype)
    keeps = [_draw(total, settings)]
    out = _drop(total, keeps[0], settings) * value
    dim, sizes = rows.query.shape[2], [value.shape[2], 1, 1]
    for index in range(rows.plan.rank.shape[0]):
        parts = []
        for scores, _, both, _, _ in _scores(rows, index, rows.query, settings):
            peak = scores.amax(-1, keepdim=True).clamp_(min=FLOOR)
            weights = scores.sub_(peak).exp2_()
            keeps.append(_draw(weights, settings))
            sums = _drop(weights, keeps[-1], settings) @ both[..., dim:]
            new = torch.cat([sums, weights.sum(-1, keepdim=True), peak], -1)
            parts.append(new.view(top.shape[0], -1, sum(sizes)))
        sums, weight, peak = _take(torch.cat(parts, 1), rows.plan.slot[index]).split(sizes, -1)
        # Both sums are brought to the higher of their maxima, and only then added.
        higher = torch.maximum(top, peak)
        before, added = (top - higher).exp2_(), (peak - higher).exp2_()
        out = (out * before).addcmul_(sums, added)
        total, top = (total * before).addcmul_(weight, added), higher
    total = torch.where(total == 0, 1, total)
    return out / total, top + total.log2(), keeps


def _backward(
    rows: _Rows, grad: Tensor, out: Tensor, log_sum: Tensor, keeps: Iterator[Tensor | None], settings: _Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of query, both and bias. A score's is p (grad . value - grad . out), p = exp2(score - log_sum)."""
    dim, plan = rows.query.shape[2], rows.plan
    grad = grad.to(rows.query.dtype)
    drift = (grad * out).sum(-1, keepdim=True)
    grad_query, grad_both, grad_bias = _own_backward(rows, grad, log_sum, drift, next(keeps), settings)
    of_queries = torch.cat([rows.query, grad, log_sum, drift], -1)
    for index in range(plan.rank.shape[0]):
        to_query, to_both = [], _WindowSum(rows.both, KEYS + settings.reach)
        for scores, queries, both, block, pairs in _scores(rows, index, of_queries, settings):
            query, row_grad, row_sum, row_drift = queries.split([dim, grad.shape[2], 1, 1], -1)
            weights, keep = scores.sub_(row_sum).exp2_(), next(keeps)
            to_value = _drop(weights, keep, settings).transpose(1, 2) @ row_grad
            of_weights = _drop(row_grad @ both[..., dim:].transpose(1, 2), keep, settings)
            of_scores = of_weights.sub_(row_drift).mul_(weights)
            to_key = (of_scores.transpose(1, 2) @ query).mul_(settings.scaling)
            to_query.append((of_scores @ both[..., :dim]).view(grad.shape[0], -1, dim))
            to_both.add(torch.cat([to_key, to_value], -1), block)
            if grad_bias is not None and pairs is not None:
                grad_bias.scatter_add_(1, pairs, of_scores.view(pairs.shape))
        grad_query.add_(_take(torch.cat(to_query, 1), plan.slot[index]), alpha=settings.scaling)
        grad_both.add_(_take(to_both.by_rank(), plan.rank[index]))
    return grad_query, grad_both, grad_bias


class _WindowSum:
    """Adds up, for each sorted key, what overlapping windows hold for it: whole pieces of KEYS keys at a time."""

    def __init__(self, like: Tensor, span: int):
        rows, seen, width = like.shape
        self.pieces = (span + KEYS - 1) // KEYS
        self.blocks = seen // KEYS + 1 + self.pieces
        self.sums = like.new_zeros(rows * self.blocks, KEYS, width)

    def add(self, x: Tensor, block: Tensor) -> None:
        """x [N*P,W,E], the windows that begin at block [N,P]."""
        first = torch.arange(block.shape[0], device=x.device).unsqueeze(1) * self.blocks
        begin = (block + first).flatten()
        # Windows begin at whole blocks: piece p of them all goes p blocks on, and no index of single keys is needed.
        for piece in range(self.pieces):
            part = x[:, piece * KEYS : (piece + 1) * KEYS]
            self.sums[:, : part.shape[1]].index_add_(0, begin + piece, part)

    def by_rank(self) -> Tensor:
        """[N, at least S, E]"""
        return self.sums.view(-1, self.blocks * KEYS, self.sums.shape[2])


def _own_scores(rows: _Rows, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The score [N,M,1] of the key at the query's position, HIDDEN where `own_key` is not; that key; its value."""
    dim, length, seen = rows.query.shape[2], settings.length, rows.both.shape[1]
    groups = rows.own_key.shape[1] // length
    key, value = rows.both[:, seen - length :].repeat(1, groups, 1).tensor_split([dim], -1)
    score = (rows.query * key).sum(-1, keepdim=True) * (settings.scaling * LOG2_E)
    if rows.bias is not None:
        at_zero = rows.bias.unflatten(1, (groups, -1))[..., seen - 1 : seen]  # [N, G, 1]
        score = score + at_zero.repeat_interleave(length, 1)
    return score.masked_fill(~rows.own_key.unsqueeze(-1), HIDDEN), key, value


def _own_backward(
    rows: _Rows, grad: Tensor, log_sum: Tensor, drift: Tensor, keep: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the own keys give to the gradients of query, both and bias."""
    length, seen = settings.length, rows.both.shape[1]
    score, key, value = _own_scores(rows, settings)
    weight = (score - log_sum).exp2_()
    to_value = _drop(weight, keep, settings) * grad
    of_score = (_drop((grad * value).sum(-1, keepdim=True), keep, settings) - drift) * weight
    scaled = of_score * settings.scaling
    to_both = torch.cat([scaled * rows.query, to_value], -1).unflatten(1, (-1, length)).sum(1)
    grad_both = F.pad(to_both, (0, 0, seen - length, 0))
    if rows.bias is None:
        return scaled * key, grad_both, None
    to_bias = of_score.unflatten(1, (-1, length)).sum(2)  # [N, G, 1]
    return scaled * key, grad_both, F.pad(to_bias, (seen - 1, length - 1)).flatten(1)


def _scores(rows: _Rows, index: int, of_queries: Tensor, settings: _Settings) -> Iterator[_Scores]:
    """The masked scores of round `index`, some blocks at a time.

    `of_queries` [N,M,*] is what is gathered for the queries; its first part is the query.
    """
    plan, dim, seen, length = rows.plan, rows.query.shape[2], rows.both.shape[1], settings.length
    span = KEYS + settings.reach
    for part in _cut(rows.query, plan.window.shape[2], span * rows.both.shape[2]):
        slots = slice(part.start * QUERIES, part.stop * QUERIES)
        window, query = plan.window[index, :, part], plan.query[index, :, slots]
        place = window.unsqueeze(-1) + torch.arange(span, device=window.device)  # [N, P, W]
        position = plan.position[index].gather(1, place.clamp(max=seen - 1).flatten(1))  # [N, P*W]
        both = _take(rows.both, position).unflatten(1, place.shape[1:]).flatten(0, 1)
        queries = _take(of_queries, query).unflatten(1, (place.shape[1], QUERIES)).flatten(0, 1)
        hidden = _hidden(plan, index, slots, place, position, rows.query.dtype).flatten(0, 1)
        key = both[..., :dim].transpose(1, 2)
        scores = torch.baddbmm(hidden, queries[..., :dim], key, beta=HIDDEN, alpha=settings.scaling * LOG2_E)
        pairs = None
        if rows.bias is not None:
            # In `bias` head g's offset j - p lies at g (S+T-1) + j - p + S-1; query p of T stands at position S-T+p.
            of_query = query // length * (seen + length - 1) + length - 1 - query % length
            pairs = of_query.unflatten(1, (-1, QUERIES, 1)) + position.unflatten(1, (-1, 1, span))
            pairs = pairs.flatten(1)
            scores.add_(rows.bias.gather(1, pairs).view(scores.shape))
        yield _Scores(scores, queries, both, window // KEYS, pairs)


def _hidden(plan: _Plan, index: int, slots: slice, place: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """[N,P,C,W]: 0 where the query sees the key in round `index` and in no round before it, else 1 or more."""
    shape = (*place.shape[:2], QUERIES)
    low, high = (x[index, :, slots].reshape(shape) for x in (plan.slot_low, plan.slot_high))
    hidden = excess(place, low, high, dtype).clamp_(min=0)
    for earlier in range(index):
        low, high = (x[earlier].gather(1, plan.query[index, :, slots]).view(shape) for x in (plan.low, plan.high))
        rank = plan.rank[earlier].gather(1, position).view(place.shape)
        hidden.add_(excess(rank, low, high, dtype).neg_().add_(1).clamp_(min=0))
    return hidden


def excess(rank: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """[N,P,C,W]: at most 0 where low <= rank < high, else 1 or more; rank [N,P,W], low and high [N,P,C].

    By arithmetic, which is many times faster than comparisons that give bool.
    """
    twice, middle, width = (x.to(dtype) for x in (2 * rank, low + high - 1, high - low - 1))
    return (twice.unsqueeze(2) - middle.unsqueeze(3)).abs_().sub_(width.unsqueeze(3))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[N,m,E] and [N,l] -> [N,l,E], whole rows of E at a time."""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, x.shape[2])


def _draw(weights: Tensor, settings: _Settings) -> Tensor | None:
    """What dropout keeps, bool."""
    return torch.rand_like(weights) >= settings.dropout if settings.dropout else None


def _drop(weights: Tensor, keep: Tensor | None, settings: _Settings) -> Tensor:
    return weights if keep is None else weights * keep / (1 - settings.dropout)
