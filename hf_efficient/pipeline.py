"""From a recipe to a measured model: the loop over stages.

    report = compress("bbc-news", output_dir="out/bbc-news")
    report.comparison.speedup

Each stage reads a checkpoint folder and writes one. Started again, a stopped run goes on after its last finished stage
(and a stage that trains, after its last epoch); the result is that of an uninterrupted run.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .disk import clear_disk_errors
from .errors import ConfigError, UnsupportedModelError
from .recipe import Recipe
from .reporting.schema import DatasetFacts, LayerStructure, Report, Size, StageRecord, load_report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .pruning.config import PruningConfig
    from .pruning.plan import PruningPlan
    from .running import Run
    from .stages import AttentionStage
    from .workspace import Workspace

MODEL = "model"

# A stage's folder, its settings, and what runs it: (run, settings, source folder, target folder) -> facts.
Step = tuple[str, Any, Callable[["Run", Any, Path, Path], dict[str, Any]]]


def compress(
    recipe: Recipe | str | Path,
    *,
    output_dir: str | Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    **overrides: Any,
) -> Report:
    """Run a recipe: teacher, stages, measurement, report.

    Parameters:
        recipe: a `Recipe`, a YAML file, or the name of a shipped recipe.
        output_dir: default `out/<recipe name>`. The result lies in its folder `model`.
        announce: called with one line when a stage begins or ends.
        **overrides: dotted recipe keys: `compress("bbc-news", **{"prune.ratio": 0.5})`.

    Raises:
        ConfigError, DataError, UnsupportedModelError: before any long work.
        CheckpointError: `output_dir` holds something else, a stage's files are damaged, or the disk is full.
        TrainingError: a loss that is not finite, or one example that does not fit into memory.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    recipe = recipe.with_overrides(overrides) if overrides else recipe
    if recipe.sweep:
        raise ConfigError("The recipe has a sweep, so it gives many results: call sweep(recipe), not compress.")
    from .running import Run
    from .workspace import Workspace

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "compress runs in one process. To distil on several, use `accelerate launch scripts/distill.py`."
        )
    folder = Path(output_dir) if output_dir is not None else Path("out") / recipe.name
    space = Workspace(folder, recipe)
    if (folder / MODEL).is_dir():
        announce(f"{folder} is finished: nothing to do. Delete {folder / MODEL} to measure again.")
        return load_report(folder / MODEL)
    run = Run(recipe, folder)
    check(run)
    then = "Then give the same command again: finished stages are kept, and it goes on from there."
    with clear_disk_errors(folder, then):
        space.open(run.inputs())
        try:
            return _carry_out(run, space, announce)
        finally:
            space.close()


def plan_recipe(recipe: Recipe | str | Path) -> list["PruningPlan"]:
    """What each prune stage of a recipe will give, from the config of its model alone: sizes, not choices.

    Raises:
        ConfigError: there is no such stage; a ratio that cannot be reached.
    """
    from .pruning.calibration import DEFAULT_LENGTH
    from .pruning.prune import plan
    from .pruning.surgery import planned_config
    from .running import Run, longest_text
    from .stages import AttentionStage, PruneStage

    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    run = Run(recipe, Path())
    config, plans = run.config, []
    for stage in recipe.stages:
        if isinstance(stage.settings, AttentionStage):
            config = _check_attention(run, config, stage.settings)
        elif isinstance(stage.settings, PruneStage):
            asked = stage.settings.config
            length = asked.sequence_length or recipe.data.max_length or DEFAULT_LENGTH
            length = min(length, longest_text(config) or length)
            model = run.skeleton(config)
            plans.append(plan(model, dataclasses.replace(asked, sequence_length=length)))
            config = planned_config(model, plans[-1])
    if not plans:
        raise ConfigError(f"The recipe {recipe.name!r} has no prune stage, so there is nothing to plan.")
    return plans


def _carry_out(run: "Run", space: "Workspace", announce: Callable[[str], None]) -> Report:
    from transformers import set_seed

    from .measure.energy import with_energy
    from .running import RUNNERS, TEACHER, run_teacher
    from .verify import check_reload, output_digest

    recipe = run.recipe
    steps: list[Step] = [(TEACHER, recipe.teacher, run_teacher)]
    steps += [(f"{i}-{stage.name}", stage.settings, RUNNERS[stage.name]) for i, stage in enumerate(recipe.stages, 1)]
    source, records, exports = run.folder, [], []
    for name, settings, runner in steps:
        announce(f"{name} ...")
        set_seed(recipe.seed)  # a stage draws the same whatever ran before it in this process
        tracked = with_energy(runner, recipe.measure.country) if recipe.measure.energy else runner
        work = partial(tracked, run, settings, source)
        made, record = space.stage(name, settings.to_dict() if settings else {}, work)
        records.append(record)
        if record.name == "export":
            exports.append((made / settings.folder, record.facts))
        else:
            source = made
        announce(f"{name} done in {record.seconds:.0f} s")
    announce("measure ...")
    report = _measured(run, source, records, exports)
    expected = output_digest(run.load(source))
    check_reload(source, report.auto_class, expected, recipe.model.trust_remote_code)
    announce("a fresh process loads the model and gives the same output")
    space.result(MODEL, lambda target: _publish(report, source, [folder for folder, _ in exports], target))
    return report


def check(run: "Run") -> None:
    """Everything that can be wrong with data and model, before any long work.

    Raises:
        ConfigError, DataError, UnsupportedModelError, CheckpointError: as the part that is wrong says.
    """
    from .data import check_labels
    from .exporting import check_runtime
    from .families import family_of
    from .measure.energy import check_energy
    from .pruning.tokenizer import check_tokenizer
    from .quantization import check_torchao
    from .stages import AttentionStage, ExportStage, PruneStage, QuantizeStage, VocabularyStage

    if run.recipe.measure.energy:
        check_energy(run.recipe.measure.country)
    prepared, config = run.data(), run.config
    family_of(config)
    if config.is_encoder_decoder and not run.task.trains:
        raise UnsupportedModelError(
            f"task {run.recipe.task!r} needs a model with one stack; {config.model_type} has an encoder and a "
            "decoder. Distil its encoder with DistillationTrainer (T5EncoderModel)."
        )
    _check_lengths(run.recipe, config)
    if run.recipe.teacher is None and run.recipe.model.config is None:
        check_labels(config, prepared)
    pruned = False
    for number, stage in enumerate(run.recipe.stages):
        if isinstance(stage.settings, AttentionStage):
            try:
                config = _check_attention(run, config, stage.settings)
            except (ConfigError, UnsupportedModelError) as error:
                raise type(error)(f"stages[{number}].attention: {error}") from error
        elif isinstance(stage.settings, VocabularyStage):
            check_tokenizer(run.processor)
        elif isinstance(stage.settings, QuantizeStage):
            check_torchao()
        elif isinstance(stage.settings, ExportStage):
            check_runtime(stage.settings.format)
        elif not pruned:  # a second one starts from what is not known yet
            asked = stage.settings if isinstance(stage.settings, PruneStage) else stage.settings.prune
            if asked is not None:
                _check_pruning(run, config, asked.config)
                pruned = True


def _check_pruning(run: "Run", config: "PreTrainedConfig", pruning: "PruningConfig") -> None:
    from .pruning.calibration import DEFAULT_LENGTH
    from .pruning.costs import make_costs
    from .pruning.reach import check_reachable
    from .running import longest_text

    length = run.recipe.data.max_length or DEFAULT_LENGTH
    length = pruning.sequence_length or min(length, longest_text(config) or length)
    model = run.skeleton(config)
    # What can be reached in measured time is not known before it is measured: MACs stand in for it.
    metric = "macs" if pruning.metric == "latency" else pruning.metric
    check_reachable(model, pruning, make_costs(model, metric, length))


def _check_attention(run: "Run", config: "PreTrainedConfig", stage: "AttentionStage") -> "PreTrainedConfig":
    """The config after the stage."""
    from .attention.convert import efficient_config
    from .attention.positions import longer_config
    from .attention.transfer import check_learned, find_attentions
    from .models.configs import block_of, with_block

    longer = stage.longer
    if longer.positions is not None:
        changes = longer_config(config, longer.positions, longer.position_method, longer.rope)
        config = with_block(config, block_of(config), **changes)
    config = efficient_config(config, stage.config, stage.layers)
    if stage.transfer is not None:
        check_learned(find_attentions(run.skeleton(config)))
    return config


def _check_lengths(recipe: Recipe, config: "PreTrainedConfig") -> None:
    """No text may be longer than the model has positions, when it reads it.

    `data.max_length` is that of the final model: the teacher, and stages before the model was extended, read the
    beginning.
    """
    from .running import longest_text, teacher_cut
    from .settings import DistillSettings
    from .stages import AttentionStage

    limit = longest_text(config)
    if limit is None:
        return
    _check_length("teacher.max_length", recipe.teacher.max_length if recipe.teacher else None, limit)
    for number, stage in enumerate(recipe.stages):
        path, settings = f"stages[{number}].{stage.name}", stage.settings
        if isinstance(settings, AttentionStage):
            limit = max(limit, settings.longer.positions or 0)
            if settings.transfer is not None:
                _check_length(f"{path}.transfer.max_length", settings.transfer.max_length, limit)
        elif isinstance(settings, DistillSettings):
            _check_length(f"{path}.max_length", settings.max_length, limit)
            _check_cut(path, recipe.task, settings.losses, teacher_cut(recipe, settings, config))
    _check_length("data.max_length", recipe.data.max_length, limit)
    _check_length("measure.sequence_length", recipe.measure.sequence_length, limit)
    _check_length("measure.lengths", max(recipe.measure.lengths or [0]), limit)


def _check_length(key: str, length: int | None, limit: int) -> None:
    if length is not None and length > limit:
        raise ConfigError(
            f"{key} is {length}, but the model has {limit} positions there. Lower it, or extend the model: an "
            "attention stage with positions."
        )


def _check_cut(path: str, task: str, losses: Mapping[str, float], cut: int | None) -> None:
    """A teacher that reads only the beginning can answer for a whole text, and for nothing else."""
    from .data import TASKS

    by_token = any(losses.get(name) for name in ("hidden", "attention", "relation"))
    if cut is None or (task == "text-classification" and not by_token):
        return
    raise ConfigError(
        f"{path}: the teacher takes {cut} tokens and the student gets more, so it can answer for a whole text (task "
        f"text-classification, loss kd), but nothing else. Set {path}.max_length to {cut}"
        + (", or losses to {ce: 1.0}." if TASKS[task].trains else ".")
    )


def _measured(
    run: "Run", student_folder: Path, records: list[StageRecord], exports: list[tuple[Path, dict[str, Any]]]
) -> Report:
    import torch

    from .bundled import upstream
    from .data import TASKS
    from .families import family_of
    from .measure import measure
    from .measure.lengths import measure_lengths, usual_lengths
    from .models.building import is_portable
    from .running import TEACHER
    from .runtime import measure_export

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
    measured = measure(
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
        student=measured.alone(),
        teacher=measured.baseline,
        comparison=measured.comparison,
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
            *_about_zeros(measured.size),
            *_about_tokens(records),
            *_about_bits(records),
            *_about_memory(records),
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

    from .attention.positions import extend_positions
    from .measure.inputs import dummy_inputs
    from .measure.latency import compare_latency
    from .running import longest_text

    limit, settings = longest_text(teacher.config), run.recipe.measure
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
    return (
        f"The tokenizer has {after:,} of {before:,} tokens, those of the training texts: use the one that lies beside "
        "the model. Other texts are spelled in more pieces.",
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


def structure(teacher: "PreTrainedModel", student: "PreTrainedModel") -> tuple[LayerStructure, ...]:
    """What is left of each layer of the teacher; layers that the student dropped have nothing left."""
    from .families import family_of, find_stacks
    from .models.configs import block_of

    family, block = family_of(student.config), block_of(student.config)
    remaining = {stack.name: layers for stack, layers in find_stacks(student, family)}
    found = []
    for stack, layers in find_stacks(teacher, family):
        own, attention = remaining[stack.name], block.stack(stack.name).attention
        kept = block.kept_layers.get(stack.name, tuple(range(len(own))))
        for index, layer in enumerate(layers):
            heads, neurons = _counts(layer, stack, family, teacher.config)
            left, kind = (0, 0), "removed"
            if index in kept:
                place = kept.index(index)
                left = _counts(own[place], stack, family, student.config)
                kind = attention[place].kind if attention else "full"
            found.append(LayerStructure(index, left[0], heads, left[1], neurons, kind, stack.name))
    return tuple(found)


def _counts(layer, stack, family, config) -> tuple[int, int]:
    """Query heads and neurons, as the linears that read them have it."""
    from .models.linears import num_inputs

    heads = num_inputs(layer.get_submodule(stack.attention.output)) // stack.head_width(config)
    return heads, num_inputs(layer.get_submodule(family.down(stack, config)))


def _publish(report: Report, source: Path, exports: list[Path], target: Path) -> None:
    """The result as a receiver gets it: checkpoint, exports, report, page, card, plots (with matplotlib)."""
    from .reporting.card import save_card
    from .reporting.page import save_page
    from .reporting.plots import save_plots
    from .workspace import copy_checkpoint

    copy_checkpoint(source, target)
    for folder in exports:
        shutil.copytree(folder, target / folder.name)
    report.save(target)
    if find_spec("matplotlib"):
        save_plots(report, target)
    save_page(report, target)
    save_card(report, target)
