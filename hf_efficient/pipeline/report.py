"""The measured report of a run: its teacher and its result, side by side, with what a reader has to know.

report = measured(run, folder / "3-distill", records, exports)
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..reporting.schema import DatasetFacts, LayerStructure, Report, Size, StageRecord
from ..reporting.tables import format_export_change, is_fraction
from ..runtimes.export import NEAR, folder_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.stacks import ModelStack
    from ..recipes.recipe import Recipe
    from .run import Run


def measured(
    run: "Run", student_folder: Path, records: list[StageRecord], exports: list[tuple[Path, dict[str, Any]]]
) -> Report:
    import torch

    from ..data.bundled import upstream
    from ..data.tasks import TASKS
    from ..measurement.lengths import measure_lengths, usual_lengths
    from ..measurement.measure import measure
    from ..models.families import family_of
    from ..models.rebuild import is_portable
    from ..runtimes.runtime import measure_export
    from .run import TEACHER

    recipe, own = run.recipe, run.read_as(student_folder)
    teacher, student = run.load(run.folder / TEACHER), run.load(student_folder)
    prepared, original = own.data(), run.data(config=teacher.config)
    length = recipe.measure.sequence_length or recipe.data.max_length or 512
    baseline, warnings = _comparable(run, teacher, length)
    work: dict[str, Any] = {
        "dataset": prepared.test,
        "collator": prepared.collator,
        "task": recipe.task,
        "batch_size": recipe.measure.batch_size,
        "sequence_length": length,
        "repeats": recipe.measure.repeats,
        "pooling": recipe.pooling,
    }
    found = measure(
        student,
        **work,
        energy=recipe.measure.energy,
        threads=torch.get_num_threads(),
        baseline=baseline,
        folder=student_folder,
        baseline_folder=run.folder / TEACHER,
        baseline_dataset=original.test,
        baseline_collator=original.collator,
    )
    others = {"teacher_dataset": original.test, "teacher_collator": original.collator}
    exported = [measure_export(facts, folder, student, baseline, **work, **others) for folder, facts in exports]
    name = recipe.model.name_or_path or f"{family_of(student.config).model_type} trained from scratch"
    base_model, licence = upstream(os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name)
    return Report(
        student=found.alone(),
        teacher=found.baseline,
        comparison=found.comparison,
        base_model=base_model,
        licence=licence,
        auto_class=TASKS[recipe.task].auto_class,
        processor_class=run.processor_class,
        loads_with="portable" if is_portable(student) else "plugin",
        dataset=DatasetFacts(recipe.data.name_or_path, {"train": len(prepared.train), "test": len(prepared.test)}),
        stages=tuple(records),
        structure=structure(teacher, student),
        warnings=(
            *warnings,
            *_about_zeros(found.size),
            *_about_tokens(records),
            *_about_bits(records),
            *_about_memory(records),
            *_about_exports([facts for _, facts in exports]),
        ),
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        exports=tuple(exported),
        lengths=measure_lengths(
            student,
            baseline,
            recipe.measure.lengths or usual_lengths(length),
            batch_size=recipe.measure.batch_size,
            rounds=min(recipe.measure.repeats, 10),
            threads=torch.get_num_threads(),
        ),
    )


def _comparable(run: "Run", teacher: "PreTrainedModel", length: int) -> tuple["PreTrainedModel", tuple[str, ...]]:
    """The teacher for the length at which the student is timed, and what a reader of the numbers must know of it.

    A copy with a tiled table of positions answers for texts that fit as the teacher itself does.
    """
    import torch

    from ..conversion.positions import extend_positions
    from ..measurement.latency import compare_latency
    from ..models.families import token_limit
    from ..models.inputs import dummy_inputs

    limit, settings = token_limit(teacher.config, rotary=False), run.recipe.measure
    notes = []
    if limit is not None and (run.recipe.data.max_length or 0) > limit:
        notes.append(
            f"The teacher takes {limit} tokens: its quality is that on the first {limit} tokens of each text."
        )
    if limit is None or length <= limit:
        return teacher, tuple(notes)
    timing = compare_latency(
        {"teacher": teacher},
        lambda model: dummy_inputs(model, settings.batch_size, limit),
        rounds=settings.repeats,
        threads=torch.get_num_threads(),
    )
    notes.append(
        f"At {length} tokens the latency, MACs and memory of the teacher are those of a copy with more positions (its "
        f"table tiled). For {settings.batch_size} x {limit} tokens, all that it takes by itself, it needs "
        f"{timing.latencies['teacher'].median_ms:.3g} ms (median)."
    )
    return extend_positions(teacher, length), tuple(notes)


def _about_zeros(size: Size) -> tuple[str, ...]:
    if not size.is_sparse:
        return ()
    return (
        f"{size.sparsity:.0%} of the parameters are zero. Dense kernels multiply zeros like any number: they bring no "
        "speed-up, no fewer MACs and no smaller file.",
    )


def _about_tokens(records: list[StageRecord]) -> tuple[str, ...]:
    trimmed = next((record for record in records if record.name == "vocabulary"), None)
    if trimmed is None:
        return ()
    before, after = (trimmed.facts[f"tokens_{when}"] for when in ("before", "after"))
    which = "the most frequent" if trimmed.settings.get("max_tokens") else "those"
    return (
        f"The tokenizer has {after:,} of {before:,} tokens, {which} of the training texts: use the one that lies "
        "beside the model. Other texts are spelled in more pieces.",
    )


def _about_bits(records: list[StageRecord]) -> tuple[str, ...]:
    if not any(record.name == "quantize" for record in records):
        return ()
    return (
        "Weights of 8 or 4 bits by torchao: loading needs `pip install torchao`. On a CPU they save bytes, rarely "
        "time; an export to ONNX with quantize int8 saves both.",
    )


def _about_memory(records: list[StageRecord]) -> tuple[str, ...]:
    return tuple(
        f"Memory did not hold the batches of stage {record.name}: it was trained with "
        f"{record.facts['gradient_accumulation_steps']} accumulated batches of {record.facts['batch_size_used']} for "
        "each step, which gives the same gradient."
        for record in records
        if "batch_size_used" in record.facts
    )


def _about_exports(exports: list[dict[str, Any]]) -> tuple[str, ...]:
    """An export that predicts something else is no silent success."""
    return tuple(
        f"The export {folder_name(facts['format'], facts['quantize'])} predicts the same as the model itself in only "
        f"{facts['same_prediction']:.0%} of the outputs that were compared: see its own quality before you use it."
        for facts in exports
        if facts.get("same_prediction", 1.0) < NEAR
    )


def check_losses(recipe: "Recipe", report: Report) -> Report:
    """The report, if no export lost more to the teacher than its stage allows.

    Raises:
        UnsupportedModelError: one did.
    """
    from ..recipes.stages import ExportStage

    allowed = {
        stage.settings.folder: stage.settings.max_loss
        for stage in recipe.stages
        if isinstance(stage.settings, ExportStage) and stage.settings.max_loss is not None
    }
    for export in report.exports:
        main, most = export.quality.main, allowed.get(export.folder)
        lost = (
            export.quality_difference * (-1 if main.higher_is_better else 1) * (100 if is_fraction(main.name) else 1)
        )
        if most is not None and not lost <= most:
            raise UnsupportedModelError(
                f"The export {export.folder} changes {main.name} by {format_export_change(export)}, and max_loss is "
                f"{most:g}. The result is there all the same, with its report. Allow more, or prune and quantise less."
            )
    return report


def structure(teacher: "PreTrainedModel", student: "PreTrainedModel") -> tuple[LayerStructure, ...]:
    """What is left of each layer of the teacher; layers that the student dropped have nothing left."""
    from ..models.anatomy import Anatomy

    small, rows = Anatomy.of(student), []
    for dense in Anatomy.of(teacher).stacks:
        stack, attention = small.stack(dense.name), small.block.stack(dense.name).attention
        kept = small.block.kept_layers.get(dense.name, tuple(range(len(stack.layers))))
        for index in range(len(dense.layers)):
            before, after, kind = _counts(dense, index), (0, 0), "removed"
            if index in kept:
                place = kept.index(index)
                after = _counts(stack, place)
                kind = attention[place].kind if attention else "full"
            rows.append(LayerStructure(index, after[0], before[0], after[1], before[1], kind, dense.name))
    return tuple(rows)


def _counts(stack: "ModelStack", index: int) -> tuple[int, int]:
    """Query heads and neurons of a layer, as the linears that read them have it."""
    from ..models.linears import num_inputs

    layer = stack.layers[index]
    heads = num_inputs(layer.get_submodule(stack.entry.attention.output)) // stack.head_width
    return heads, num_inputs(layer.get_submodule(stack.down))
