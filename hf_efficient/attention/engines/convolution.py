"""Sums over positions weighted by a kernel of their distance, in O(n) for every width and every smooth kernel.

    y_i = sum_j c(j - i) (f_i . g_j) x_j

This is a convolution for each entry of the features f and g, which FFTs would do in O(n log n). Here it is a fast
multipole method on a line (Greengard & Rokhlin 1987; with Chebyshev nodes: Fong & Darve 2009), all of it products of
matrices, which run many times as fast, do not round early rows by the size of late ones, and export to ONNX:

  - Pairs in the same or in adjacent blocks of BLOCK positions are weighed one by one.
  - Between blocks farther apart, c is so smooth that a polynomial through a few nodes of each block gives it to
    rounding. A block sums up its x_j at its nodes (`moments`), the weights act between nodes, and every position
    reads off what arrives at the nodes of its block (the `field`).
  - Blocks far apart in turn do so as blocks of double size, and so on, so that a block has few partners.

Causal sums leave out every later block and, inside a block, every later position: nothing of the future is touched.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import toeplitz
from .pieces import count_blocks, spare_block
from .sums import without_autocast

BLOCK = 64
NODES = {torch.float32: 10, torch.float64: 22}  # the error of a weight is below 5e-7, 1e-14 of the largest
TOP = 8  # blocks among which all pairs are dense
TRACED_LEVELS = 2  # of blocks, when compiled or exported
TOKENS = 1 << 18  # of all heads in one turn; on CPU a single head, whose moments stay in the cache

Kernel = Callable[[Tensor], Tensor]


class Tables(NamedTuple):
    """The kernel at all distances that occur, for heads [K,G]; `right` is None if causal.

    near [K,G,C,2C or 3C]: from the block before, the block itself (and, not causal, the one after) to its positions.
    left, right [K,G,L,2r,2r]: on each level, from the nodes of the pair of blocks before, or after, to a pair's.
    top [K,G,P r,P r]: between the nodes of the largest blocks.
    """

    near: Tensor
    left: Tensor
    right: Tensor | None
    top: Tensor

    def of_group(self, group: int) -> "Tables":
        right = None if self.right is None else self.right[:, group]
        return Tables(self.near[:, group], self.left[:, group], right, self.top[:, group])


class _Grid(NamedTuple):
    """r nodes in (-1, 1), the ends of a block; `basis` [C,r] from nodes to positions, `halves` [2r,r] to the nodes of
    both halves. A row holds the values of the r polynomials that are 1 at one node and 0 at the others."""

    nodes: Tensor
    basis: Tensor
    halves: Tensor


def make_tables(kernel: Kernel, length: int, causal: bool, dtype: torch.dtype, device: torch.device) -> Tables:
    """The tables for `length` positions of a kernel from distances [...] to weights [K,G,...]."""
    offset = torch.arange(1 - 2 * BLOCK, BLOCK if causal else 2 * BLOCK, device=device)  # key minus query
    near = kernel(offset.abs().to(dtype))
    if causal:
        near = near.masked_fill(offset > 0, 0)
    near = toeplitz(near, BLOCK, 2 * BLOCK if causal else 3 * BLOCK)

    nodes = _nodes(dtype).to(device, dtype)
    blocks, pairs = _cut(length)
    levels, blocks = len(pairs), pairs[-1] if pairs else blocks
    pair = _in_halves(nodes)  # in blocks, around the middle of a pair
    apart = pair[:, None] - (pair - 2)  # [2r, 2r]: from the pair before it
    # The first block of a pair and the last of the pair before are adjacent: their pairs are weighed one by one.
    second = torch.arange(len(pair), device=device) >= len(nodes)
    adjacent = ~second[:, None] & second
    size = (BLOCK * 2 ** torch.arange(levels, device=device))[:, None, None]
    left = kernel(apart * size).masked_fill(adjacent, 0)
    right = None if causal else kernel(apart.T * size).masked_fill(adjacent.T, 0)

    index = torch.arange(blocks, device=device)[:, None].expand(-1, len(nodes))
    place = (index + nodes / 2).flatten()
    gap = index.reshape(-1, 1) - index.flatten()
    top = kernel((place[:, None] - place).abs() * (BLOCK * 2**levels))
    return Tables(near, left, right, top.masked_fill((gap if causal else gap.abs()) < 2, 0))


def convolve(query: Tensor | None, key: Tensor | None, x: Tensor, tables: Tables) -> Tensor:
    """query [B,K,G,S,M], key [B,K,S,M] (None: features of 1) and x [B,K,S,E] -> y [B,K,G,S,E]."""
    if torch.compiler.is_compiling():
        return _convolve(query, key, x, tables)
    return _InTurns.apply(query, key, x, *tables)


def convolution_macs(features: int, width: int, causal: bool) -> int:
    """Multiply-accumulates for one position, in float32: x of `width` numbers, 0 features for features of 1."""
    nodes, sides, numbers = NODES[torch.float32], 1 if causal else 2, max(features, 1) * width
    near = (1 + sides) * BLOCK * (features + width)
    ends = 2 * nodes * numbers  # moments of a block, and reading off its field
    between = (4 * sides + 4) * nodes**2 * numbers // BLOCK  # partners of a pair, up and down; all levels make two
    return near + ends + between


class _InTurns(torch.autograd.Function):
    """`_convolve` of a few heads at a time; again in the backward pass, for the moments are many times the inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        x, groups = inputs[2], inputs[3].shape[1]
        out = x.new_empty(*x.shape[:2], groups, *x.shape[2:])
        for turn in _turns(x):
            query, key, x, *tables = _take(inputs, turn)
            out[turn] = _convolve(query, key, x, Tables(*tables))
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = [None if x is None else torch.zeros_like(x) for x in inputs]
        for turn in _turns(inputs[2]):
            with torch.enable_grad(), without_autocast(grad.device.type):
                leaves = [None if x is None else x.detach().requires_grad_() for x in _take(inputs, turn)]
                query, key, x, *tables = leaves
                out = _convolve(query, key, x, Tables(*tables))
                tensors = [x for x in leaves if x is not None]
                parts = torch.autograd.grad(out, tensors, grad[turn], allow_unused=True)
            totals = [total for total in _take(grads, turn) if total is not None]
            for total, part in zip(totals, parts, strict=True):
                if part is not None:
                    total += part
        return tuple(grads)


def _turns(x: Tensor) -> list[tuple[slice, slice]]:
    """Slices of rows and key/value heads."""
    batch, heads, length = x.shape[:3]
    together = 1 if x.device.type == "cpu" else max(TOKENS // length, 1)
    some_heads, some_rows = min(together, heads), max(together // heads, 1)
    return [
        (slice(row, row + some_rows), slice(head, head + some_heads))
        for row in range(0, batch, some_rows)
        for head in range(0, heads, some_heads)
    ]


def _take(inputs, turn: tuple[slice, slice]) -> list:
    """The part of the inputs of `convolve` [B,K,...] and of the tables [K,...]."""
    which = (turn, turn, turn, *[turn[1]] * len(Tables._fields))
    return [None if x is None else x[index] for x, index in zip(inputs, which, strict=True)]


def _convolve(query: Tensor | None, key: Tensor | None, x: Tensor, tables: Tables) -> Tensor:
    length = x.shape[2]
    blocks, pairs = _cut(length)
    extra = blocks * BLOCK - length
    nodes = _nodes(x.dtype)
    points = (2 * torch.arange(BLOCK, dtype=nodes.dtype) + 1) / BLOCK - 1  # the positions of a block, from -1 to 1
    bases = _basis(points, nodes), _basis(_in_halves(nodes), nodes)
    grid = _Grid(*(part.to(x) for part in (nodes, *bases)))
    # A pair of blocks of zeros before and after: partners of the first and the last pair.
    x = F.pad(x, (0, 0, 2 * BLOCK, 2 * BLOCK + extra))
    # A moment for each node and feature: with r nodes and M features a block is r M rows of E numbers.
    moments = x.unflatten(2, (blocks + 4, BLOCK))  # [B, K, 2+N+2, C, E]
    if key is None:
        moments = grid.basis.mT @ moments  # [B, K, 2+N+2, r, E]
    else:
        key = F.pad(key, (0, 0, 2 * BLOCK, 2 * BLOCK + extra))
        moments = _features(key.unflatten(2, (blocks + 4, BLOCK)), grid.basis).mT @ moments  # [B, K, 2+N+2, r M, E]
        moments = moments.unflatten(3, (len(grid.nodes), -1)).flatten(4)
    if query is not None:
        query = F.pad(query, (0, 0, 0, extra)).unflatten(3, (blocks, BLOCK))  # [B, K, G, N, C, M]
    out = []
    for group in range(tables.near.shape[1]):
        of_group, rows = tables.of_group(group), None if query is None else query[:, :, group]
        y = _near(rows, key, x, of_group.near, blocks)  # [B, K, N, C, E]
        field = _far(moments, of_group, pairs, grid)
        if rows is None:
            y = _add_product(y, grid.basis, field)
        else:
            y = _add_product(y, _features(rows, grid.basis), field.unflatten(4, (rows.shape[-1], -1)).flatten(3, 4))
        out.append(y.flatten(2, 3)[:, :, :length])
    return torch.stack(out, 2)


def _near(query: Tensor | None, key: Tensor | None, x: Tensor, near: Tensor, blocks: int) -> Tensor:
    """[B,K,N,C,E]: from positions in the same and in adjacent blocks."""
    weights, span = near.unsqueeze(1), near.shape[-1]
    if query is not None and key is not None:
        weights = (query @ key.unfold(2, span, BLOCK)[:, :, 1 : 1 + blocks]).mul_(weights)
    return weights @ x.unfold(2, span, BLOCK)[:, :, 1 : 1 + blocks].mT


def _far(moments: Tensor, tables: Tables, pairs: tuple[int, ...], grid: _Grid) -> Tensor:
    """Moments [B,K,2+N+2,r,F] -> the field [B,K,N,r,F] at the nodes of each block, from all but adjacent blocks."""
    if not pairs:  # the largest blocks, all with all
        inner = moments[:, :, 2:-2]
        return (tables.top @ inner.flatten(2, 3)).view(inner.shape)
    count, level = pairs[0], tables.left.shape[1] - len(pairs)
    paired = moments.unflatten(2, (count + 2, 2)).flatten(3, 4)  # [B, K, 1+N/2+1, 2r, F]
    field = tables.left[:, None, level] @ paired[:, :, :-2]
    if tables.right is not None:
        field = _add_product(field, tables.right[:, None, level], paired[:, :, 2:])
    # Pairs farther apart are the next level's, where a pair is one block: its nodes collect those of its halves.
    parents = grid.halves.mT @ paired[:, :, 1:-1]
    missing = 2 * pairs[1] - count if len(pairs) > 1 else 0
    coarse = _far(F.pad(parents, (0, 0, 0, 0, 2, 2 + missing)), tables, pairs[1:], grid)
    field = _add_product(field, grid.halves, coarse[:, :, :count])
    return field.unflatten(3, (2, -1)).flatten(2, 3)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in the place of `total`."""
    left = left.expand(*total.shape[:-1], -1)
    return total.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3)).view(total.shape)


def _features(phi: Tensor, basis: Tensor) -> Tensor:
    """[..,C,M] -> [..,C,r M]: the features times the share of each node."""
    return (phi.unsqueeze(-2) * basis.unsqueeze(-1)).flatten(-2)


def _cut(length: int) -> tuple[int, tuple[int, ...]]:
    """The blocks of a sequence, and how many pairs they make on each level, those of the level above being its blocks.

    Compiled, the number of levels must not depend on the length.
    """
    if torch.compiler.is_compiling():
        top = count_blocks(length, BLOCK * 2**TRACED_LEVELS) + spare_block()
        return top * 2**TRACED_LEVELS, tuple(top * 2**level for level in reversed(range(TRACED_LEVELS)))
    blocks, pairs = count_blocks(length, BLOCK), []
    count = blocks
    while count > TOP:
        count = (count + 1) // 2
        pairs.append(count)
    return 2 * pairs[0] if pairs else blocks, tuple(pairs)  # filled up, so that every block has its pair


def _nodes(dtype: torch.dtype) -> Tensor:
    """[r] Chebyshev nodes for that precision, in float64 themselves."""
    count = NODES[dtype]
    return torch.cos((2 * torch.arange(count, dtype=torch.float64) + 1) * (math.pi / (2 * count)))


def _in_halves(nodes: Tensor) -> Tensor:
    """[2r]: the nodes of both halves of a block."""
    return torch.cat([nodes - 1, nodes + 1]) / 2


def _basis(points: Tensor, nodes: Tensor) -> Tensor:
    """[n,r]: 1/r + 2/r sum_(k=1)^(r-1) T_k(node) T_k(point), T_k(cos t) = cos(k t) (Fong & Darve 2009, equation 4)."""
    order = torch.arange(1, len(nodes), dtype=nodes.dtype)
    at_points, at_nodes = (torch.cos(x.acos()[:, None] * order) for x in (points, nodes))
    return (1 + 2 * at_points @ at_nodes.T) / len(nodes)
