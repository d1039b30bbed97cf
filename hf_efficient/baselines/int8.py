"""The teacher in 8 bits, which takes one call: in the runtime in which the recipe exports 8 bits, else in PyTorch.

In PyTorch that is dynamic quantisation of the linear layers (`torch.ao.quantization.quantize_dynamic`).
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..stages.base import Run
from ..stages.export import ExportStage
from .base import Baseline, Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized(model: "PreTrainedModel") -> tuple[Any, int]:
    """A copy with linear layers of 8 bits, and the bytes of its weights."""
    from ..measurement.size import count_weight_bytes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names torchao as its successor, which has no fast kernel on a CPU
        small = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    packed = [module for module in small.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    return small, count_weight_bytes(small) + sum(module.weight().numel() for module in packed)


class Int8(Baseline):
    """The teacher in 8 bits."""

    name = "int8"

    def make(self, run: Run, student: Path, target: Path) -> dict[str, Any]:
        stage = export_stage(run)
        if stage is None:
            return {"about": f"the teacher in 8 bits, torch {torch.__version__.split('+')[0]}"}
        facts = stage.run(run, run.teacher_folder, target)
        return {"about": f"the teacher in 8 bits, {facts['runtime']}"} | facts

    def reader(self, run: Run, folder: Path) -> Reader:
        from ..runtimes.formats import program_bytes
        from ..runtimes.runtime import Runtime

        stage, teacher = export_stage(run), run.load(run.teacher_folder)
        if stage is None:
            small, size = quantized(teacher)
            return reader_of(run, teacher, size, small)
        place = folder / stage.beside
        return reader_of(run, teacher, program_bytes(place), Runtime(teacher, stage.format, place))


def export_stage(run: Run) -> ExportStage | None:
    """The first export of the recipe in 8 bits, without what it demands of the result."""
    stages = [step.settings for step in run.recipe.stages if isinstance(step.settings, ExportStage)]
    eight = next((stage for stage in stages if stage.quantize == "int8"), None)
    return None if eight is None else ExportStage(eight.format, "int8")


INT8 = Int8()
