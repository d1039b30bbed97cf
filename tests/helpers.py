"""What several tests share."""

import os
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis import settings

THOROUGH = "HF_EFFICIENT_THOROUGH"  # set in the environment before a test is imported


def random_examples(count: int, **options: Any) -> "settings":
    """So many random examples with `--thorough`, else a third of them, but 10 at least."""
    from hypothesis import settings  # not needed for the tests of `make gpu`, nor there where they run

    return settings(max_examples=count if THOROUGH in os.environ else max(count // 3, 10), deadline=None, **options)


def selected(jobs: Iterable[tuple], is_selected: Callable[..., bool]) -> list[Any]:
    """All jobs as parameters of a test; those that are not selected run with `--thorough` only."""
    return [job if is_selected(*job) else pytest.param(*job, marks=pytest.mark.thorough) for job in jobs]


def covering(rows: list[tuple], strength: int = 1) -> list[tuple]:
    """So many of the rows that every value of every column occurs.

    With strength 2 every two values of two columns occur together that do so in any row. Greedy: the row that adds
    most is next, the first of equals.
    """
    missing = {row: set(combinations(enumerate(row), min(strength, len(row)))) for row in rows}
    chosen = []
    while any(missing.values()):
        best = max(missing, key=lambda row: len(missing[row]))
        chosen.append(best)
        added = missing.pop(best)
        for others in missing.values():
            others -= added
    return chosen


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    """Largest absolute difference within `tolerance`; NaN fails. The mean tells one bad entry from a bad formula."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.detach().double()).abs()
    assert error.max().item() <= tolerance, (
        f"{what}: max error {error.max().item():.3e}, mean error {error.mean().item():.3e}, tolerance {tolerance:.1e}"
    )


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Fresh copies that collect gradients; None stays None."""
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def padding_mask(side: str | None, batch: int, length: int) -> Tensor | None:
    """[batch, length] bool with row r holding r * length // 3 padded tokens on `side`; None without padding."""
    if side is None:
        return None
    position = torch.arange(length).expand(batch, -1)
    padded = (torch.arange(batch) * length // 3)[:, None]
    return position >= padded if side == "left" else position < length - padded
