"""An exported program in the place of the model that it was made of: timed and scored by the same code.

twin = Runtime(model, "onnx", "out/onnx", threads=2)
twin(**batch).logits
measure_export(facts, "out/onnx", student, teacher, work)           # an ExportRecord for the report
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measurement.generation import time_decoding
from ..measurement.latency import compare_latency
from ..measurement.quality import compare_quality, evaluate_quality
from ..models.inputs import dummy_inputs
from ..models.modes import evaluating, using_threads
from ..reporting.schema import ExportRecord
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
    """A model with the rows that it reads: two models of one run may have two tokenizers."""

    model: Any
    dataset: Any
    collator: Callable


@dataclass(frozen=True)
class Work:
    """What is scored and timed."""

    task: str
    batch_size: int
    sequence_length: int
    repeats: int
    pooling: str = "mean"


def measure_export(
    facts: dict[str, Any], folder: Path, student: Reader, teacher: Reader, work: Work, new_tokens: int | None = None
) -> ExportRecord:
    """The exported student in its runtime against the teacher in PyTorch, in turn, and on the same samples.

    Parameters:
        facts: of its stage: `format`, `quantize`, `cache`, `difference`.
        new_tokens: so many are written after a prompt, where it is a decoder with a cache.
    """
    threads = torch.get_num_threads()
    twin = Runtime(student.model, facts["format"], folder, threads)
    sources = {"teacher": teacher.model, "twin": student.model}  # the twin takes what its model takes
    inputs = {name: dummy_inputs(model, work.batch_size, work.sequence_length) for name, model in sources.items()}
    timing = compare_latency(
        {"teacher": teacher.model, "twin": twin},
        lambda model: inputs["twin" if model is twin else "teacher"],
        rounds=work.repeats,
        threads=threads,
    )
    writing, faster = None, None
    if facts.get("cache") and new_tokens is not None:
        ids = {name: given["input_ids"] for name, given in inputs.items()}
        with evaluating(teacher.model, twin):
            both = time_decoding({"teacher": teacher.model, "twin": twin}, ids, new_tokens, min(work.repeats, 5))
        writing, faster = both["twin"], both["teacher"].token_ms / both["twin"].token_ms
    with using_threads(threads):
        first = evaluate_quality(teacher.model, teacher.dataset, teacher.collator, work.task, pooling=work.pooling)
        second = evaluate_quality(twin, student.dataset, student.collator, work.task, pooling=work.pooling)
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
        writing=writing,
        writing_speedup=faster,
    )
