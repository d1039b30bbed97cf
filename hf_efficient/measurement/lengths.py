"""Latency against length: the same pair of models at several lengths, each length in one interleaved run.

measure_lengths(student, teacher, [128, 256, 512], batch_size=1, rounds=10)
"""

from collections.abc import Sequence
from functools import partial

import torch

from ..models.inputs import dummy_inputs
from ..reporting.schema import LengthPoint
from .latency import compare_latency


def usual_lengths(longest: int) -> list[int]:
    """An eighth, a quarter, a half and all of it."""
    return sorted({max(2, longest // part) for part in (8, 4, 2, 1)})


def measure_lengths(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    rounds: int = 10,
    threads: int | None = None,
) -> tuple[LengthPoint, ...]:
    """Median times at each of `lengths` (tokens), in their order; none for a model that reads no tokens."""
    if student.main_input_name != "input_ids":
        return ()
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    points = []
    for length in lengths:
        inputs_of = partial(dummy_inputs, batch_size=batch_size, sequence_length=length)
        timing = compare_latency(models, inputs_of, rounds=rounds, warmup=1, threads=threads)
        times = {name: latency.median_ms for name, latency in timing.latencies.items()}
        points.append(LengthPoint(length, times["student"], times.get("teacher")))
    return tuple(points)
