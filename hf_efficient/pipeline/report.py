"""The measured report of a run: its teacher and its result, side by side, with what a reader has to know.

report = measured(run, folder / "3-distill", records, exports)
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.doubts import describe_guessing, describe_waiting
from ..reporting.language import Domain, Generation
from ..reporting.schema import DatasetFacts, LayerStructure, Measurement, Report, StageRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.preparation import PreparedData
    from ..models.stacks import ModelStack
    from ..recipes.recipe import Recipe
    from ..runtimes.runtime import Reader, Work
    from .run import Run


def measured(
    run: "Run", student_folder: Path, records: list[StageRecord], exports: list[tuple[Path, dict[str, Any]]]
) -> Report | None:
    """`exports`: the folder of each, and the facts of its stage."""
    import torch

    from ..baselines.base import timed_length
    from ..measurement.lengths import measure_lengths, usual_lengths
    from ..measurement.measure import measure
    from ..measurement.scores import load_metrics
    from ..runtimes.runtime import Reader, Work
    from ..training.ranks import alone, is_main

    recipe, reader, threads = run.recipe, run.read_as(student_folder), torch.get_num_threads()
    teacher, student = run.load(run.teacher_folder), run.load(student_folder)
    prepared, original = reader.data(), run.data(config=teacher.config)
    settings, length = recipe.measure, timed_length(recipe, student.config)
    baseline, warnings = _comparable(run, teacher, length)
    work = Work(recipe.task, settings.batch_size, length, settings.repeats, run.pooling)
    both = measure(
        student,
        dataset=prepared.test,
        collator=prepared.collator,
        **asdict(work),
        energy=settings.energy,
        metrics=load_metrics(settings.metrics or [], trusted=recipe.model.trust_remote_code),
        threads=threads,
        baseline=baseline,
        folder=student_folder,
        baseline_folder=run.teacher_folder,
        baseline_dataset=original.test,
        baseline_collator=original.collator,
    )
    if not is_main():  # which has scored its part of the samples
        return None
    rounds = {"batch_size": settings.batch_size, "rounds": min(settings.repeats, 10), "threads": threads}
    with alone():
        small = Reader(student, prepared.test, prepared.collator)
        dense = Reader(baseline, original.test, original.collator)
        in_runtimes, notes = _in_runtimes(run, exports, small, dense, work)
        lengths = measure_lengths(student, baseline, settings.lengths or usual_lengths(length), **rounds)
        language = _of_language(run, reader, teacher, student, length)
    return Report(
        student=both.alone(),
        teacher=both.baseline,
        comparison=both.comparison,
        **_origin(recipe, student),
        **_reception(run, student),
        dataset=DatasetFacts(recipe.data.name_or_path, {"train": len(prepared.train), "test": len(prepared.test)}),
        stages=tuple(records),
        structure=structure(teacher, student),
        warnings=(*warnings, *(run.modules.notes if run.modules else ()), *_notes(recipe, records, both), *notes),
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        lengths=lengths,
        **in_runtimes,
        **language,
    )


def _in_runtimes(
    run: "Run", exports: list[tuple[Path, dict[str, Any]]], student: "Reader", teacher: "Reader", work: "Work"
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a report on other runtimes and on texts as they come in, and notes for its reader."""
    from ..runtimes.runtime import measure_export
    from ..runtimes.served import Programs, measure_serving
    from .teachers import exported_teacher

    settings, made, programs, notes = run.recipe.measure, [], [], []
    if exports:
        teacher = replace(teacher, evaluation=teacher.evaluated(work))
    for folder, facts in exports:
        there, note = exported_teacher(run, teacher.model, facts) if settings.teacher_exports else (None, "")
        notes += [note] if note else []
        made.append(measure_export(facts, folder, student, teacher, work, settings.new_tokens, there))
        programs.append(Programs(facts["format"], folder, there))
    serving = measure_serving(settings.serving or [], student, teacher, programs, settings.repeats)
    return {"exports": tuple(made), "serving": serving}, notes


def _of_language(
    run: "Run", reader: "Run", teacher: "PreTrainedModel", student: "PreTrainedModel", length: int
) -> dict[str, Any]:
    """The fields of a report on further texts, and on writing."""
    return {
        "domains": _domains(run, reader, teacher, student),
        "generation": _generation(run, reader, teacher, student, length),
    }


def _domains(run: "Run", reader: "Run", teacher: "PreTrainedModel", student: "PreTrainedModel") -> tuple[Domain, ...]:
    """The main score of both on the test part of further data sets, and with the first numbers of their vectors."""
    from ..measurement.retrieval import first_numbers

    measure, rows = run.recipe.measure, []
    for name in measure.other_data or ():
        before, after = run.other(name, teacher.config), reader.other(name)
        rows.append(_domain(name, run, (teacher, before), (student, after)))
    if measure.truncate_dims:
        before, after = run.data(config=teacher.config), reader.data()
        for width in measure.truncate_dims:
            with first_numbers(teacher, width), first_numbers(student, width):
                rows.append(_domain(f"the first {width} numbers", run, (teacher, before), (student, after)))
    return tuple(rows)


def _domain(name: str, run: "Run", *sides: tuple["PreTrainedModel", "PreparedData"]) -> Domain:
    """Teacher and student, each with its rows."""
    from ..measurement.quality import compare_quality, evaluate_quality

    first, second = (
        evaluate_quality(model, ready.test, ready.collator, run.recipe.task, pooling=run.pooling)
        for model, ready in sides
    )
    change = compare_quality(first, second)
    return Domain(
        dataset=name,
        samples=change.samples,
        score=change.name,
        teacher=first.quality.main.value,
        student=second.quality.main.value,
        difference=change.difference,
        standard_error=change.standard_error,
        agreement=change.agreement,
    )


def _generation(
    run: "Run", reader: "Run", teacher: "PreTrainedModel", student: "PreTrainedModel", length: int
) -> Generation | None:
    """None where the recipe asks for none."""
    import torch

    from ..measurement.generation import measure_generation

    settings = run.recipe.measure
    if settings.new_tokens is None:
        return None
    return measure_generation(
        teacher,
        student,
        run.processor,
        settings.prompts if settings.prompts is not None else run.beginnings(),
        student_tokenizer=None if reader is run else reader.processor,
        new_tokens=settings.new_tokens,
        prompt_tokens=length,
        batch_size=settings.batch_size,
        rounds=min(settings.repeats, 5),
        threads=torch.get_num_threads(),
    )


def _reception(run: "Run", student: "PreTrainedModel") -> dict[str, Any]:
    """By which classes of which library a receiver loads it: fields of a report."""
    from ..models.rebuild import is_portable

    return {
        "auto_class": run.auto_class,
        "processor_class": run.processor_class,
        "library_name": "transformers" if run.modules is None else "sentence-transformers",
        "loads_with": "portable" if is_portable(student) else "plugin",
    }


def _origin(recipe: "Recipe", student: "PreTrainedModel") -> dict[str, Any]:
    """The model that it all began with, and its licence, as far as they are known: fields of a report."""
    from ..data.bundled import upstream
    from ..models.registry import stock_type

    name = recipe.model.name_or_path or f"{stock_type(student.config)} trained from scratch"
    base, licence = upstream(os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name)
    return {"base_model": base, "licence": licence}


def _comparable(run: "Run", teacher: "PreTrainedModel", length: int) -> tuple["PreTrainedModel", tuple[str, ...]]:
    """The teacher for the length at which the student is timed, and what a reader of the numbers must know of it.

    A copy with a tiled table of positions answers for texts that fit as the teacher itself does.
    """
    import torch

    from ..conversion.positions import extend_positions
    from ..measurement.latency import compare_latency
    from ..models.inputs import dummy_inputs
    from ..models.registry import token_limit
    from ..training.ranks import from_main

    limit, settings = token_limit(teacher.config, rotary=False), run.recipe.measure
    notes = []
    if limit is not None and (run.recipe.data.max_length or 0) > limit:
        notes.append(
            f"The teacher takes {limit} tokens: its quality is that on the first {limit} tokens of each text."
        )
    if limit is None or length <= limit:
        return teacher, tuple(notes)
    timing = from_main(
        lambda: (
            compare_latency(
                {"teacher": teacher},
                lambda model: dummy_inputs(model, settings.batch_size, limit),
                rounds=settings.repeats,
                threads=torch.get_num_threads(),
            )
            .latencies["teacher"]
            .median_ms
        )
    )
    notes.append(
        f"At {length} tokens the latency, MACs and memory of the teacher are those of a copy with more positions (its "
        f"table tiled). For {settings.batch_size} x {limit} tokens, all that it takes by itself, it needs "
        f"{timing:.3g} ms (median)."
    )
    return extend_positions(teacher, length), tuple(notes)


def _notes(recipe: "Recipe", records: list[StageRecord], both: Measurement) -> list[str]:
    """What a reader must know of the result and of each stage.

    First what concerns whoever uses the model, which the last stages of a recipe tell; then how it was trained; then
    its exports.
    """
    busy, size = describe_waiting(both, both.baseline), both.size
    zeros = (
        f"{size.sparsity:.0%} of the parameters are zero. Dense kernels multiply zeros like any number: they bring no "
        "speed-up, no fewer MACs and no smaller file."
    )
    pairs = zip(recipe.folders.values(), records, strict=True)
    order = sorted(pairs, key=lambda pair: (pair[0].beside is not None, pair[0].followers is None))
    told = [describe_guessing(both.baseline), busy, zeros if size.is_sparse else ""]
    return [note for note in told if note] + [note for stage, record in order for note in stage.note(record)]


def check_reached(recipe: "Recipe", report: Report) -> Report:
    """The report; RequirementError if it misses what the recipe requires, UnsupportedModelError if an export lost more
    to the teacher than its `max_loss`."""
    stages = [step.settings for step in recipe.stages]
    for number, stage in enumerate(stages, 1):
        stage.check_report(report, stages[number:])
    if recipe.require is not None and report.comparison is not None:
        quality = report.student.quality
        recipe.require.check(report.comparison, None if quality is None else quality.main)
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
    """Query heads and neurons of a layer, all its FFNs and experts together; 0 of what is not known."""
    from ..models.groups import groups_of

    counts = {"heads": 0, "neurons": 0}
    for group in groups_of(stack):
        if index not in group.layers or group.kind == "cross_heads":
            continue
        weight = stack.layers[group.layers[0]].get_parameter(group.members[0].output.name)
        experts = len(weight) if weight.ndim == 3 else 1
        size = group.units * (experts if group.is_neurons else stack.group_size)
        counts["neurons" if group.is_neurons else "heads"] += size
    return counts["heads"], counts["neurons"]
