"""Work on large tensors piece by piece, so that what lies between two steps stays in the processor's cache.

    for piece in pieces((batch, heads, blocks), numbers_of_one_block):
        out[piece] = (query[piece] @ key[piece].mT).softmax(-1) @ value[piece]

Intermediate results as large as the whole take longer to write, and to get from the system, than to compute.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

NUMBERS = 1 << 18  # in one piece of an intermediate result: 1 MB in float32, the cache of one core

Piece = tuple[slice, ...]


def count_blocks(tokens: int, block: int) -> int:
    """How many blocks hold so many tokens."""
    return (tokens + block - 1) // block


def spare_block() -> int:
    """1 more block in an exported program, so that it has two at least: made for one it takes no more, and made for
    several it refuses one."""
    return int(torch.compiler.is_exporting())


def pieces(sizes: tuple[int, ...], numbers: int, like: Tensor) -> Iterator[Piece]:
    """Slices of the first dimensions, which have these sizes; one index of all of them stands for `numbers` numbers.

    Only one piece, of all, on devices other than CPU, and when traced: a loop would be written out.
    """
    if torch.compiler.is_compiling() or like.device.type != "cpu":
        return iter([(slice(None),) * len(sizes)])
    cut = []
    for size in reversed(sizes):
        step = max(min(NUMBERS // max(numbers, 1), size), 1)
        cut.append([slice(start, start + step) for start in range(0, size, step)])
        numbers *= size
    return product(*reversed(cut))
