"""From a recipe to a measured model: the loop over stages.

    report = compress("bbc-news", output_dir="out/bbc-news")
    report.comparison.speedup

Each stage reads a checkpoint folder and writes one. Started again, a stopped run goes on after its last finished stage
(and a stage that trains, after its last epoch); the result is that of an uninterrupted run.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe
from .reporting.schema import DatasetFacts, LayerStructure, Report, StageRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .running import Run

MODEL = "model"


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
    run = Run(recipe, folder)
    check(run)
    space = Workspace(folder, recipe)
    steps = [(TEACHER, recipe.teacher, run_teacher)]
    steps += [(f"{i}-{s.name}", s.settings, RUNNERS[s.name]) for i, s in enumerate(recipe.stages, 1)]
    source, records = None, []
    for name, settings, runner in steps:
        announce(f"{name} ...")

        def work(target: Path, runner=runner, settings=settings, source=source) -> dict[str, Any]:
            set_seed(recipe.seed)  # so that a stage draws the same whatever ran before it in this process
            return runner(run, settings, source, target)

        source, record = space.stage(name, settings.to_dict() if settings else {}, work)
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
    import transformers

    from .attention.convert import _converted
    from .data import check_labels
    from .families import family_of
    from .stages import AttentionStage

    prepared = run.data()
    asked = run.recipe.model
    if asked.config is not None:
        config = transformers.AutoConfig.for_model(
            asked.config["model_type"], **{k: v for k, v in asked.config.items() if k != "model_type"}
        )
    else:
        from .bundled import resolve_model

        config = transformers.AutoConfig.from_pretrained(
            resolve_model(asked.name_or_path), trust_remote_code=asked.trust_remote_code
        )
    if run.recipe.teacher is None:
        check_labels(config, prepared)
    if run.recipe.stages:
        family_of(config)
    for stage in run.recipe.stages:
        if isinstance(stage.settings, AttentionStage):
            _converted(config, stage.settings.config, stage.settings.layers)


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
    from .attention.dispatch import ATTACHED
    from .families import family_of, find_stacks
    from .models.configs import block_of

    family, kept_layers = family_of(student.config), block_of(student.config).kept_layers
    remaining = {stack.name: (stack, layers) for stack, layers in find_stacks(student, family)}
    found = []
    for stack, layers in find_stacks(teacher, family):
        own = remaining[stack.name][1]
        kept = kept_layers.get(stack.name, tuple(range(len(own))))
        for index, layer in enumerate(layers):
            heads, neurons = _counts(layer, stack, family, teacher.config)
            left, attention = (0, 0), "removed"
            if index in kept:
                mine = own[kept.index(index)]
                left = _counts(mine, stack, family, student.config)
                variant = mine.get_submodule(stack.attention.module)._modules.get(ATTACHED)
                attention = "full" if variant is None else variant.config.kind
            found.append(LayerStructure(index, left[0], heads, left[1], neurons, attention, stack.name))
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
