"""Softmax attention of rows of queries over keys that are gathered for each row, in one SDPA call.

    out = gathered_attention(blocks, key, value, rows, seeing)        # rows: which key blocks each query block sees

Keys and values are gathered token by token, by an index that skips padding and puts the global tokens in front. A key
is there once for each row that sees it. Written to fresh memory that costs more than the attention itself, so large
inputs are done in pieces: their keys go into one buffer again and again, which stays in the cache (`_ByPieces`). The
backward pass gathers anew, since keeping it all would take as many times the memory of the keys as blocks are seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from ..variant import Logits
from .parts import Options, match_heads, sdpa
from .sums import without_autocast

PIECE = {"cpu": 1 << 21, "cuda": 1 << 28}  # numbers in the keys gathered at a time; on CPU they stay in the cache


class Rows(NamedTuple):
    """What each of R query blocks may see, the blocks of all batch rows one after the other.

    batch: [R, 1], the batch row.
    chosen: [R, H or 1, k], numbers of key blocks; S for a missing one.
    rank, filled: [R, s], of the queries; see `Layout`.
    count: [R, 1], real tokens of the batch row.
    """

    batch: Tensor
    chosen: Tensor
    rank: Tensor
    filled: Tensor | None
    count: Tensor

    def part(self, begin: int, end: int) -> "Rows":
        return Rows(*(None if x is None else x[begin:end] for x in self))


class Seeing(NamedTuple):
    """What holds for all rows: tokens in a block, `order` of the layout, S of the keys; the options without the bias
    and the logits, which go their own ways for their gradients."""

    block: int
    order: Tensor | None
    seen: int
    options: Options


class _Learned(NamedTuple):
    """What has a gradient beside queries, keys and values: the bias as a `table` [S+T-1, H], the sinks [H]; and the
    cap of the scores, which has none."""

    table: Tensor | None
    sinks: Tensor | None
    softcap: float | None

    @property
    def logits(self) -> Logits | None:
        return None if self.sinks is None and self.softcap is None else Logits(self.softcap, self.sinks)


class _Source(NamedTuple):
    """Keys [B,K,S,D] and values as rows [B*K*S, D], and the steps between batch rows, heads and tokens there."""

    key: Tensor
    value: Tensor
    kv_heads: int
    batch_step: int
    head_step: int
    token_step: int


def positions(order: Tensor | None, batch: Tensor, count: Tensor, rank: Tensor) -> Tensor:
    """Of ranks in the key sequence. A rank that no token has becomes that of the last: no index leads to padding."""
    rank = torch.minimum(rank, (count - 1).clamp(min=0))
    return rank if order is None else order[batch, rank]


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B,h,S,D] at positions [B or 1, L]: [B,h,L,D], stored as [B,L,h,D]."""
    rows, batch_step, head_step, token_step = _token_rows(x, is_by_token(x))
    batch, head = torch.arange(x.shape[0], device=x.device), torch.arange(x.shape[1], device=x.device)
    at = index.unsqueeze(-1) * token_step + (batch * batch_step)[:, None, None] + head * head_step  # [B, L, h]
    return rows.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)


def is_by_token(x: Tensor) -> bool:
    """Whether [B,h,S,D] lies in memory as [B,S,h,D], as a projection gives it."""
    return not torch.compiler.is_compiling() and x.transpose(1, 2).is_contiguous()


def _token_rows(x: Tensor, by_token: bool) -> tuple[Tensor, int, int, int]:
    heads, seen = x.shape[1:3]
    if by_token:
        return x.transpose(1, 2).flatten(0, 2), heads * seen, 1, heads
    return x.flatten(0, 2), heads * seen, seen, 1


def gathered_attention(
    blocks: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    seeing: Seeing,
    bias: Tensor | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """Query blocks [B,H,N,s,D] over keys [B,K,S,D] and values [B,K,S,Dv]: [B,H,N*s,Dv], zeros where not filled.

    `bias` and `logits` are those of `full_attention`. The output is stored as [B,N*s,H,Dv], which is what the layers
    reshape to.
    """
    by_token = is_by_token(value)  # one index serves both, so keys are laid out as values are
    key_rows, *steps = _token_rows(key, by_token)
    source = _Source(key_rows, _token_rows(value, by_token)[0], key.shape[1], *steps)
    softcap, sinks = logits or Logits()
    learned = _Learned(None if bias is None else bias[0].t().contiguous(), sinks, softcap)
    limit = PIECE.get(blocks.device.type)
    blocks = blocks.permute(0, 2, 3, 1, 4)  # [B, N, s, H, D]
    size = _keys_in_row(rows, source, seeing) * max(key.shape[3], value.shape[3])
    if torch.compiler.is_compiling() or limit is None or rows.batch.shape[0] * size <= limit:
        index, rank = _find(rows, source, seeing)
        gathered = (x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in source[:2])
        out = _softmax(_to_rows(blocks), *gathered, learned, rank, rows, seeing)
        out = _from_rows(out, blocks.shape[0])
    else:
        step = max(limit // size, 1)
        work = _Work(source[2:], rows, seeing, step, softcap)
        out = _ByPieces.apply(blocks, source.key, source.value, *learned[:2], work)
    return out.flatten(1, 2).transpose(1, 2)


def _to_rows(blocks: Tensor) -> Tensor:
    """[B,N,s,H,D] -> [R,H,s,D]."""
    return blocks.flatten(0, 1).transpose(1, 2)


def _from_rows(x: Tensor, batch: int) -> Tensor:
    """[R,H,s,D] -> [B,N,s,H,D]."""
    return x.transpose(1, 2).unflatten(0, (batch, -1))


def _keys_in_row(rows: Rows, source: _Source, seeing: Seeing) -> int:
    heads, blocks = rows.chosen.shape[1:]
    return max(heads, source.kv_heads) * (seeing.options.global_tokens + blocks * seeing.block)


def _find(rows: Rows, source: _Source, seeing: Seeing) -> tuple[Tensor, Tensor]:
    """Which rows of `source` are the L keys of each row, [R, H or K, L], and their ranks [R, H or 1, L]."""
    device = rows.chosen.device
    rank = (rows.chosen.unsqueeze(-1) * seeing.block + torch.arange(seeing.block, device=device)).flatten(2)
    if seeing.options.global_tokens:
        first = torch.arange(seeing.options.global_tokens, device=device).expand(*rank.shape[:2], -1)
        rank = torch.cat([first, rank], -1)
    # Where query heads choose for themselves, each gathers from its key/value head; else the K heads go once.
    heads = rank.shape[1] if rank.shape[1] > 1 else source.kv_heads
    head = torch.arange(heads, device=device) * source.kv_heads // heads
    position = positions(seeing.order, rows.batch.unsqueeze(-1), rows.count.unsqueeze(-1), rank)
    start = rows.batch * source.batch_step + head * source.head_step  # [R, H or K]
    return position * source.token_step + start.unsqueeze(-1), rank


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, learned: _Learned, rank: Tensor, rows: Rows, seeing: Seeing
) -> Tensor:
    """[R,H,s,Dv] of query [R,H,s,D] over gathered key [R,h,L,D] and value [R,h,L,Dv]."""
    mask, table = None, learned.table
    if rows.filled is not None or seeing.options.causal or seeing.options.global_tokens:
        mask = _visible(rank, rows, seeing)
    if table is not None:  # the bias of the pairs, by their distance in the sequence
        key_at = positions(seeing.order, rows.batch, rows.count, rank[:, 0])
        query_at = positions(seeing.order, rows.batch, rows.count, rows.rank)
        offset = key_at.unsqueeze(1) - query_at.unsqueeze(2) + seeing.seen - 1  # [R, s, L]
        offset = offset.clamp(0, table.shape[0] - 1)
        scores = table.index_select(0, offset.flatten()).unflatten(0, offset.shape).movedim(-1, 1)  # [R, H, s, L]
        scores = scores.to(query.dtype)
        mask = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    empty = None if rows.filled is None else ~rows.filled[:, None, :, None]
    if empty is not None:
        query = query.masked_fill(empty, 0)
    key, value = match_heads(query, key, value)
    scaling, dropout = seeing.options.scaling, seeing.options.dropout
    out = sdpa(query, key, value, mask, scaling=scaling, dropout=dropout, logits=learned.logits)
    return out if empty is None else out.masked_fill(empty, 0)


def _visible(rank: Tensor, rows: Rows, seeing: Seeing) -> Tensor:
    """bool [R, H or 1, s or 1, L]: no key that is missing, lies ahead, or is in front as a global token already."""
    if seeing.options.causal:  # the same for all heads: what they chose lies before the own block
        visible = rank[:, :1, None, :] <= rows.rank[:, None, :, None]
    else:
        visible = (rank < rows.count.unsqueeze(-1)).unsqueeze(2)
    if not seeing.options.global_tokens:
        return visible
    # The first keys of a row are the global tokens; where a chosen block holds one again, it is hidden there.
    in_front = torch.arange(rank.shape[-1], device=rank.device) < seeing.options.global_tokens
    return visible & (in_front | (rank >= seeing.options.global_tokens)).unsqueeze(2)


class _ByPieces(torch.autograd.Function):
    """The same, a few query blocks at a time: [B,N,s,H,D] -> [B,N,s,H,Dv]."""

    @staticmethod
    def forward(ctx, blocks, key, value, table, sinks, work):
        ctx.save_for_backward(blocks, key, value, table, sinks)
        ctx.work = work
        seeing = work.seeing
        ctx.draws = (torch.get_rng_state(), *get_device_states(blocks)) if seeing.options.dropout else None
        out = blocks.new_empty(*blocks.shape[:4], value.shape[1])
        for at, piece, _, rank, gathered in _pieces(blocks, key, value, work):
            learned = _Learned(table, sinks, work.softcap)
            part = _softmax(_to_rows(blocks[at]), *gathered, learned, rank, piece, seeing)
            out[at] = _from_rows(part, out[at].shape[0])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        blocks, key, value, *extra = ctx.saved_tensors
        work, seeing = ctx.work, ctx.work.seeing
        sums = torch.promote_types(key.dtype, torch.float32)  # a key may be seen by every block
        grad_key, grad_value = (torch.zeros_like(x, dtype=sums) for x in (key, value))
        grad_blocks = torch.empty_like(blocks)
        wanted = [place for place in (0, 1) if ctx.needs_input_grad[3 + place]]  # of table and sinks
        grad_extra = [torch.zeros_like(x) if place in wanted else None for place, x in enumerate(extra)]
        extra = [None if x is None else x.detach().requires_grad_(i in wanted) for i, x in enumerate(extra)]
        with without_autocast(blocks.device.type), _same_draws(ctx.draws):
            for at, piece, index, rank, gathered in _pieces(blocks, key, value, work):
                leaves = [x.detach().requires_grad_() for x in (_to_rows(blocks[at]), *gathered)]
                with torch.enable_grad():
                    out = _softmax(*leaves, _Learned(*extra, work.softcap), rank, piece, seeing)
                parts = torch.autograd.grad(out, [*leaves, *(extra[i] for i in wanted)], _to_rows(grad[at]))
                grad_blocks[at] = _from_rows(parts[0], blocks[at].shape[0])
                # Tokens in the outer order, heads in the inner one, as `source` has them where projections made it.
                index = index.transpose(1, 2).flatten()
                for total, part in zip((grad_key, grad_value), parts[1:], strict=False):
                    total.index_add_(0, index, part.transpose(1, 2).flatten(0, 2).to(sums))
                for place, part in zip(wanted, parts[3:], strict=True):
                    grad_extra[place] += part
        return grad_blocks, grad_key.to(key.dtype), grad_value.to(value.dtype), *grad_extra, None


class _Work(NamedTuple):
    """What `_ByPieces` goes by: the steps of its `_Source`, `step`, the query blocks to do at a time, and the cap of
    the scores."""

    steps: tuple[int, ...]
    rows: Rows
    seeing: Seeing
    step: int
    softcap: float | None = None


def _pieces(blocks: Tensor, key: Tensor, value: Tensor, work: _Work) -> Iterator[tuple]:
    """At most `step` query blocks at a time: where they are in [B,N,...], their rows, what `_find` says of them, and
    their keys and values, in memory that the next piece will use again."""
    batch, count = blocks.shape[:2]
    steps, rows, seeing, step, _ = work
    source = _Source(key, value, *steps)
    buffers = [x.new_empty(step * _keys_in_row(rows, source, seeing), x.shape[1]) for x in source[:2]]
    several = max(step // count, 1)  # batch rows
    for first in range(0, batch, several):
        end = min(first + several, batch)
        for begin in range(0, count, step):
            stop = min(begin + step, count)
            # One after the other in `rows`: a part of one batch row, or several whole ones.
            piece = rows.part(first * count + begin, (end - 1) * count + stop)
            index, rank = _find(piece, source, seeing)
            gathered = []
            for x, buffer in zip(source[:2], buffers, strict=True):
                part = torch.index_select(x, 0, index.flatten(), out=buffer[: index.numel()])
                gathered.append(part.unflatten(0, index.shape))
            yield (slice(first, end), slice(begin, stop)), piece, index, rank, gathered


@contextmanager
def _same_draws(draws: tuple | None) -> Iterator[None]:
    """Draw once more the random numbers that were drawn after `draws`."""
    if draws is None:
        yield
        return
    state, devices, device_states = draws
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state)
        set_device_states(devices, device_states)
        yield
