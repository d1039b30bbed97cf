"""An exported program in the place of the model that it was made of: timed and scored by the same code.

twin = Runtime(model, "onnx", "out/onnx", threads=2)
twin(**batch).logits
measure_export(facts, "out/onnx", student, teacher, work, there=folder)       # an ExportRecord for the report

A speed-up over PyTorch is that of the runtime and of the smaller model in one number. So the teacher is timed in the
same runtime too, exported and quantised as the student was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measurement.generation import time_decoding
from ..measurement.latency import LatencyComparison, compare_latency
from ..measurement.quality import Evaluation, compare_quality, evaluate_quality
from ..models.inputs import dummy_inputs
from ..models.modes import evaluating, using_threads
from ..reporting.language import Decoding
from ..reporting.schema import ExportRecord
from ..reporting.timing import ExportedTeacher
from .formats import FORMATS, program_bytes, runtime_version


class Runtime(nn.Module):
    """The program in `folder`, called as `model` is; what it was not traced with is left out.

    Parameters:
        model: gives config and names, and is not called.
        threads: of the other runtime; default: as many as PyTorch has.
        exact: compute in float32 also where the runtime would choose bfloat16.
    """

    def __init__(self, model: Any, format: str, folder: str | Path, threads: int | None = None, exact: bool = False):
        super().__init__()
        self.config, self.main_input_name, self.dtype = model.config, model.main_input_name, model.dtype
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device inputs must be
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            self.prepare_decoder_input_ids_from_labels = model.prepare_decoder_input_ids_from_labels
        self.program, self.taken = FORMATS[format].load(Path(folder), threads or torch.get_num_threads(), exact)

    def forward(self, **inputs: Any) -> Any:
        names = {name: value for name, value in inputs.items() if name in self.taken}
        if "token_type_ids" in self.taken and "token_type_ids" not in names:  # as the stock models do
            names["token_type_ids"] = torch.zeros_like(names["input_ids"])
        return self.program(**names)


@dataclass(frozen=True)
class Reader:
    """A model with the rows that it reads: two models of one run may have two tokenizers.

    `evaluation`: what it made of them, where that is known.
    """

    model: Any
    dataset: Any
    collator: Callable
    evaluation: Evaluation | None = None

    def evaluated(self, work: "Work") -> Evaluation:
        if self.evaluation is not None:
            return self.evaluation
        return evaluate_quality(self.model, self.dataset, self.collator, work.task, pooling=work.pooling)


@dataclass(frozen=True)
class Work:
    """What is scored and timed."""

    task: str
    batch_size: int
    sequence_length: int
    repeats: int
    pooling: str = "mean"


def measure_export(
    facts: dict[str, Any],
    folder: Path,
    student: Reader,
    teacher: Reader,
    work: Work,
    new_tokens: int | None = None,
    there: Path | None = None,
) -> ExportRecord:
    """The exported student in its runtime against the teacher in PyTorch and in that runtime, in turn, and on the
    same samples.

    Parameters:
        facts: of its stage: `format`, `quantize`, `cache`, `difference`.
        new_tokens: so many are written after a prompt, where it is a decoder with a cache.
        there: the teacher's program, made in the same way.
    """
    threads = torch.get_num_threads()
    models = {"teacher": teacher.model, "twin": Runtime(student.model, facts["format"], folder, threads)}
    if there is not None:
        models["there"] = Runtime(teacher.model, facts["format"], there, threads)
    timing, writing = _timed(models, student.model, work, new_tokens if facts.get("cache") else None)
    with using_threads(threads):
        first = teacher.evaluated(work)
        second = replace(student, model=models["twin"], evaluation=None).evaluated(work)
        rounded = there is not None and facts["quantize"] is not None
        in_there = replace(teacher, model=models["there"], evaluation=None).evaluated(work) if rounded else first
    rival = None
    if there is not None:
        rival = ExportedTeacher(
            latency=timing.latencies["there"],
            speedup=timing.speedup("there", "twin"),
            bytes_on_disk=program_bytes(there),
            score=in_there.quality.main.value,
            standard_error=in_there.quality.main.standard_error,
            writing=writing.get("there"),
        )
    change = compare_quality(first, second)
    return ExportRecord(
        format=facts["format"],
        runtime=runtime_version(facts["format"]),
        quantize=facts["quantize"],
        folder=folder.name,
        bytes_on_disk=program_bytes(folder),
        difference=facts["difference"],
        latency=timing.latencies["twin"],
        speedup=timing.speedup("teacher", "twin"),
        quality=second.quality,
        quality_difference=change.difference,
        quality_difference_error=change.standard_error,
        cache=facts.get("cache") or None,  # runs of older versions say nothing of it
        writing=writing.get("twin"),
        writing_speedup=writing["teacher"].token_ms / writing["twin"].token_ms if writing else None,
        teacher=rival,
    )


def _timed(
    models: dict[str, Any], student: Any, work: Work, new_tokens: int | None
) -> tuple[LatencyComparison, dict[str, Decoding]]:
    """All of them in turn; a program takes what its model takes."""
    sources = {name: student if name == "twin" else models["teacher"] for name in models}
    inputs = {name: dummy_inputs(model, work.batch_size, work.sequence_length) for name, model in sources.items()}
    by_model, threads = {id(model): inputs[name] for name, model in models.items()}, torch.get_num_threads()
    timing = compare_latency(models, lambda model: by_model[id(model)], rounds=work.repeats, threads=threads)
    if new_tokens is None:
        return timing, {}
    ids = {name: given["input_ids"] for name, given in inputs.items()}
    with evaluating(*models.values()):
        return timing, time_decoding(models, ids, new_tokens, min(work.repeats, 5))
