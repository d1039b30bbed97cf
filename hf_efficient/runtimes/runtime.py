"""An exported program in the place of the model that it was made of: timed and scored by the same code.

twin = Runtime(model, "onnx", "out/onnx", threads=2)
twin(**batch).logits
measure_export(twin, model, teacher, ...)           # an ExportRecord for the report
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measurement.latency import compare_latency
from ..measurement.quality import compare_quality, evaluate_quality
from ..models.inputs import dummy_inputs
from ..models.modes import using_threads
from ..reporting.schema import ExportRecord
from .export import FORMATS, hushed, program_bytes, runtime_version


class Runtime(nn.Module):
    """The program in `folder`, called as `model` is; what it was not traced with is left out.

    Parameters:
        model: gives config and names, and is not called.
        threads: of the other runtime; default: as many as PyTorch has.
        exact: compute in float32 also where the runtime would choose bfloat16.
    """

    def __init__(self, model: Any, format: str, folder: str | Path, threads: int | None = None, exact: bool = False):
        super().__init__()
        from transformers.exporters import ExportedModel

        self.config, self.main_input_name, self.dtype = model.config, model.main_input_name, model.dtype
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device inputs must be
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            self.prepare_decoder_input_ids_from_labels = model.prepare_decoder_input_ids_from_labels
        options = _options(FORMATS[format].backend, threads or torch.get_num_threads(), exact)
        with hushed():
            self.program = ExportedModel.from_pretrained(folder, **options)
        [component] = self.program.components.values()
        self.taken = component.metadata.kwargs

    def forward(self, **inputs: Any) -> Any:
        given = {name: value for name, value in inputs.items() if name in self.taken}
        if "token_type_ids" in self.taken and "token_type_ids" not in given:  # as the stock models do
            given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        return self.program(**given)


def _options(backend: str, threads: int, exact: bool) -> dict[str, Any]:
    """As many threads as PyTorch has, for runtimes that take all cores by themselves."""
    if backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return {"session_options": options}
    if backend == "openvino":
        return {"config": {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": "f32"} if exact else {})}
    return {}


def measure_export(
    facts: dict[str, Any],
    folder: Path,
    student: Any,
    teacher: Any,
    *,
    dataset: Any,
    collator: Callable,
    teacher_dataset: Any,
    teacher_collator: Callable,
    task: str,
    batch_size: int,
    sequence_length: int,
    repeats: int,
    pooling: str = "mean",
) -> ExportRecord:
    """The exported student in its runtime against the teacher in PyTorch, in turn, and on the same samples.

    `facts`: of its stage: `format`, `quantize`, `difference`.
    """
    threads = torch.get_num_threads()
    twin = Runtime(student, facts["format"], folder, threads)
    inputs = {id(teacher): dummy_inputs(teacher, batch_size, sequence_length)}
    inputs[id(twin)] = dummy_inputs(student, batch_size, sequence_length)
    timing = compare_latency(
        {"teacher": teacher, "twin": twin}, lambda model: inputs[id(model)], rounds=repeats, threads=threads
    )
    with using_threads(threads):
        first = evaluate_quality(teacher, teacher_dataset, teacher_collator, task, pooling=pooling)
        second = evaluate_quality(twin, dataset, collator, task, pooling=pooling)
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
    )
