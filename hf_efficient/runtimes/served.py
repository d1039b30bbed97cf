"""Texts as they come in, through every program: teacher and student, in PyTorch and in each other runtime.

served = measure_serving(["short", "mixed"], student, teacher, [Programs("onnx", ours, theirs)], rounds=20)
served[0].programs[1].speedup             # the exported student over the exported teacher
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..measurement.serving import batches_of, per_second, time_batches
from ..reporting.timing import ServedProgram, Serving
from .runtime import Reader, Runtime

PYTORCH = "pytorch"


@dataclass(frozen=True)
class Programs:
    """The folders of the exported student and, where there is one, of the teacher exported alike."""

    format: str
    student: Path
    teacher: Path | None


def measure_serving(
    loads: Sequence[str], student: Reader, teacher: Reader, exports: Sequence[Programs], rounds: int
) -> tuple[Serving, ...]:
    """Every load of `reporting.timing.LOADS` that is named, all programs in turn on the same texts."""
    if not loads:
        return ()
    threads = torch.get_num_threads()
    readers: dict[tuple[str, str], tuple[Any, Any, Any]] = {}

    def add(name: str, who: str, reader: Reader, model: Any) -> None:
        readers[name, who] = model, reader.dataset, reader.collator

    add(PYTORCH, "teacher", teacher, teacher.model)
    add(PYTORCH, "student", student, student.model)
    for each in exports:
        name = each.student.name
        if each.teacher is not None:
            add(name, "teacher", teacher, Runtime(teacher.model, each.format, each.teacher, threads))
        add(name, "student", student, Runtime(student.model, each.format, each.student, threads))
    lengths = [len(teacher.dataset[row]["input_ids"]) for row in range(len(teacher.dataset))]
    return tuple(_served(load, batches_of(lengths, load, rounds), lengths, readers, rounds) for load in loads)


def _served(load: str, batches: list[list[int]], lengths: list[int], readers: dict, rounds: int) -> Serving:
    rounds = max(2, min(rounds, len(batches)))
    named = {f"{who} {name}": reader for (name, who), reader in readers.items()}
    timing = time_batches(named, batches, rounds=rounds, threads=torch.get_num_threads())
    dense, programs = f"teacher {PYTORCH}", []
    for name in dict.fromkeys(name for name, _ in readers):
        ours, theirs = f"student {name}", f"teacher {name}"
        there = theirs in named
        programs.append(
            ServedProgram(
                program=name,
                student=timing.latencies[ours],
                student_per_second=per_second(timing.seconds[ours], batches),
                over_pytorch=timing.paired_speedup(dense, ours),
                teacher=timing.latencies[theirs] if there else None,
                teacher_per_second=per_second(timing.seconds[theirs], batches) if there else None,
                speedup=timing.paired_speedup(theirs, ours) if there else None,
            )
        )
    rows = [row for batch in batches for row in batch]
    tokens = sum(lengths[row] for row in rows) / len(rows)
    return Serving(load, max(map(len, batches)), tokens, tuple(programs))
