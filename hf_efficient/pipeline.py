"""From a recipe to a measured model: the loop over stages.

    report = compress("bbc-news", output_dir="out/bbc-news")
    report.comparison.speedup

Each stage reads a checkpoint folder and writes one. Started again, a stopped run goes on after its last finished stage
(and a stage that trains, after its last epoch); the result is that of an uninterrupted run.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe
from .reporting.schema import DatasetFacts, LayerStructure, Report, StageRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .running import Run

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
        CheckpointError: `output_dir` holds something else, or a stage's files are damaged.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    recipe = recipe.with_overrides(overrides) if overrides else recipe
    from transformers import set_seed

    from .running import RUNNERS, TEACHER, Run, run_teacher
    from .verify import check_reload
    from .workspace import Workspace

    folder = Path(output_dir) if output_dir is not None else Path("out") / recipe.name
    space = Workspace(folder, recipe)
    run = Run(recipe, folder)
    check(run)
    space.open()

    steps: list[Step] = [(TEACHER, recipe.teacher, run_teacher)]
    steps += [(f"{i}-{stage.name}", stage.settings, RUNNERS[stage.name]) for i, stage in enumerate(recipe.stages, 1)]
    source, records = folder, []
    for name, settings, runner in steps:
        announce(f"{name} ...")
        set_seed(recipe.seed)  # a stage draws the same whatever ran before it in this process
        source, record = space.stage(
            name, settings.to_dict() if settings else {}, partial(runner, run, settings, source)
        )
        records.append(record)
        announce(f"{name} done in {record.seconds:.0f} s")
    announce("measure ...")
    report = _measured(run, source, records)
    made = space.replace_folder(MODEL, lambda target: _publish(report, source, target))
    check_reload(made, report.auto_class, records[-1].facts["output_sha256"])
    announce("a fresh process loads the model and gives the same output")
    return report


def check(run: "Run") -> None:
    """Everything that can be wrong with data and model, before any long work."""
    from .attention.convert import efficient_config
    from .data import check_labels
    from .families import family_of
    from .pruning.prune import DEFAULT_LENGTH
    from .pruning.reach import check_reachable
    from .stages import AttentionStage, PruneStage

    prepared, config = run.data(), run.config
    if run.recipe.teacher is None:
        check_labels(config, prepared)
    if run.recipe.stages:
        family_of(config)
    checked: set[str] = set()
    for stage in run.recipe.stages:
        if isinstance(stage.settings, AttentionStage):
            config = efficient_config(config, stage.settings.config, stage.settings.layers)
        elif isinstance(stage.settings, PruneStage) and "prune" not in checked:
            check_reachable(run.skeleton(config), stage.settings.config, run.recipe.data.max_length or DEFAULT_LENGTH)
        checked.add(stage.name)


def _measured(run: "Run", student_folder: Path, records: list[StageRecord]) -> Report:
    import torch

    from .bundled import upstream
    from .data import TASKS
    from .measure import measure
    from .models.building import is_portable
    from .running import TEACHER

    recipe, prepared = run.recipe, run.data()
    teacher, student = run.load(run.folder / TEACHER), run.load(student_folder)
    measured = measure(
        student,
        dataset=prepared.test,
        collator=prepared.collator,
        task=recipe.task,
        batch_size=recipe.measure.batch_size,
        sequence_length=recipe.measure.sequence_length or recipe.data.max_length or 512,
        repeats=recipe.measure.repeats,
        threads=torch.get_num_threads(),
        baseline=teacher,
        folder=student_folder,
        baseline_folder=run.folder / TEACHER,
    )
    base_model, licence = upstream(recipe.model.name_or_path or f"a fresh {student.config.model_type}")
    return Report(
        student=measured.alone(),
        teacher=measured.baseline,
        comparison=measured.comparison,
        base_model=base_model,
        licence=licence,
        auto_class=TASKS[recipe.task].auto_class,
        loads_with="portable" if is_portable(student) else "plugin",
        dataset=DatasetFacts(recipe.data.name_or_path, {"train": len(prepared.train), "test": len(prepared.test)}),
        stages=tuple(records),
        structure=structure(teacher, student),
        recipe=recipe.to_dict(),
        seed=recipe.seed,
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
    heads = layer.get_submodule(stack.attention.query).out_features // family.head_width(config)
    return heads, layer.get_submodule(stack.down).in_features


def _publish(report: Report, source: Path, target: Path) -> None:
    """The result as a receiver gets it: checkpoint, report, plots (where matplotlib is installed) and card."""
    from .reporting.card import save_card
    from .reporting.plots import save_plots
    from .workspace import link_files

    link_files(source, target)
    report.save(target)
    if find_spec("matplotlib"):
        save_plots(report, target)
    save_card(report, target)
