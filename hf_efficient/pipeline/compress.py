"""From a recipe to a measured model: the loop over stages.

    report = compress("bbc-news", output_dir="out/bbc-news")
    report.comparison.speedup

Each stage reads a checkpoint folder and writes one. Started again, a stopped run goes on after its last finished stage
(and a stage that trains, after its last epoch); the result is that of an uninterrupted run.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedModelError
from ..io.disk import clear_disk_errors, copy_folder, inside
from ..recipes.recipe import Recipe
from ..reporting.schema import Report, load_report
from ..stages.base import Stage, check_length
from ..training.progress import telling
from ..training.ranks import begin, check_same, count, from_main, is_main, together
from .chain import Chain, carry
from .ladder import check_ladder, make_baselines, measured_ladder
from .report import check_reached, measured
from .search import check_target, search
from .workspace import MANIFEST, MODEL, Workspace

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan
    from .run import Run


def compress(
    recipe: Recipe | str | Path,
    *,
    output_dir: str | Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Report:
    """Run a recipe: teacher, stages, measurement, report.

    Parameters:
        recipe: a `Recipe`, a YAML file, or the name of a shipped recipe.
        output_dir: default `out/<recipe name>`. The result lies in its folder `model`.
        announce: called with one line when a stage begins or ends; and now and then in long ones, with steps and time
            left, where stderr is no terminal that shows bars.
        trust_remote_code: run code that comes with the model. That the recipe says so is not enough.
        **overrides: dotted recipe keys: `compress("bbc-news", **{"prune.ratio": 0.5})`.

    Under `accelerate launch` or torchrun all processes call it: they share out what each stage does, and one writes.

    Raises:
        ConfigError, DataError, UnsupportedModelError: before any long work.
        CheckpointError: `output_dir` holds something else, a stage's files are damaged, or the disk is full.
        TrainingError: a loss that is not finite, or one example that does not fit into memory.
        RequirementError: the result misses what the recipe requires, and is there all the same.
        UnsupportedModelError: an export lost more than its `max_loss`; so it is then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    recipe = recipe.allowed(trust_remote_code, overrides)
    if recipe.sweep:
        raise ConfigError("The recipe has a sweep, so it gives many results: call sweep(recipe), not compress.")
    folder = Path(output_dir) if output_dir is not None else Path("out") / recipe.name
    begin()
    with together("compress", ends=True):
        told = announce if is_main() else lambda line: None
        with telling(told):
            return _compress(recipe, folder, told)


def _compress(recipe: Recipe, folder: Path, announce: Callable[[str], None]) -> Report:
    from .run import Run

    space = Workspace(folder, recipe)
    if report := _finished(folder, announce):
        return _reached(recipe, folder, report)
    run = Run(recipe, folder)
    check(run)
    inputs = run.inputs()
    if count() > 1:
        check_same({"data or model folder": json.dumps(inputs)})
    then = "Then give the same command again: finished stages are kept, and it goes on from there."
    with clear_disk_errors(folder, then):
        space.open(inputs)
        try:
            # Another process may have ended it while this one looked at data and model.
            return _reached(recipe, folder, _finished(folder, announce) or _carry_out(run, space, announce))
        finally:
            space.close()


def _reached(recipe: Recipe, folder: Path, report: Report) -> Report:
    """The report; raises what the result misses."""
    if recipe.target is not None:
        check_target(folder)
    return check_reached(recipe, report)


def _finished(folder: Path, announce: Callable[[str], None]) -> Report | None:
    """The report of a run that has ended."""
    if not from_main(lambda: folder.is_dir() and inside(folder, MODEL).is_dir()):
        return None
    announce(f"{folder} is finished: nothing to do. Delete {folder / MODEL} to measure again.")
    return load_report(folder / MODEL)


def plan_recipe(recipe: Recipe | str | Path, *, trust_remote_code: bool = False) -> list["PruningPlan"]:
    """What each prune stage of a recipe will give, from the config of its model alone: sizes, not choices.

    `trust_remote_code`: run code that comes with the model. That the recipe says so is not enough.

    Raises:
        ConfigError: there is no such stage; a second stage's ratio that cannot be reached.
        ConfigError, DataError, UnsupportedModelError, CheckpointError: whatever `compress` refuses before it begins.
    """
    from .run import Run

    recipe = (recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)).allowed(trust_remote_code)
    run = Run(recipe, Path())
    check(run)
    config, plans = run.config, []
    for step in recipe.stages:
        config, sizes = step.settings.plan(run, config)
        plans += [] if sizes is None else [sizes]
    if not plans:
        raise ConfigError(f"The recipe {recipe.name!r} has no prune stage, so there is nothing to plan.")
    return plans


def check(run: "Run") -> None:
    """All that can be wrong with data and model, before any long work; raises as the part that is wrong does."""
    from ..measurement.energy import check_energy
    from ..measurement.scores import load_metrics
    from ..models.derive import family_for
    from ..models.registry import token_limit
    from .fresh import check_fresh

    recipe = run.recipe
    _check_processes(recipe)
    if recipe.measure.energy:
        check_energy(recipe.measure.country)
    load_metrics(recipe.measure.metrics or [], trusted=recipe.model.trust_remote_code)
    run.data()
    config, stages = run.config, recipe.paths
    if recipe.model.config is not None:
        check_fresh(partial(run.skeleton, config))
    family_for(config)
    if config.is_encoder_decoder and not run.task.trains:
        raise UnsupportedModelError(
            f"task {recipe.task!r} needs a model with one stack; {config.model_type} has an encoder and a "
            "decoder. Distil its encoder with DistillationTrainer (T5EncoderModel)."
        )
    if max(recipe.measure.truncate_dims or [0]) > getattr(config, "hidden_size", 0):
        raise ConfigError(
            f"measure.truncate_dims is {recipe.measure.truncate_dims}, and vectors are {config.hidden_size} numbers "
            "long."
        )
    if (limit := token_limit(config, rotary=False)) is not None:
        # `data.max_length` is that of the final model: what comes before it was extended reads the beginning.
        for path, stage in stages.items():
            limit = stage.check_lengths(path, run, limit)
        check_length("data.max_length", recipe.data.max_length, limit)
        check_length("measure.sequence_length", recipe.measure.sequence_length, limit)
        check_length("measure.lengths", max(recipe.measure.lengths or [0]), limit)
    before: list[Stage] = []
    for path, stage in stages.items():
        config = stage.check(path, run, config, before)
        before.append(stage)
    check_ladder(run)


def _check_processes(recipe: Recipe) -> None:
    """ConfigError unless the batches of each training can be shared out."""
    for path, stage in recipe.paths.items():
        size = stage.training.batch_size if stage.training else 0
        if size % count():
            raise ConfigError(
                f"{path}.batch_size is {size}, which {count()} processes cannot share out evenly. It counts the "
                f"rows of all of them: take {size - size % count() or count()}, or another number of processes."
            )


def _carry_out(run: "Run", space: "Workspace", announce: Callable[[str], None]) -> Report:
    from .verify import check_reload, output_digest

    notes: tuple[str, ...] = ()
    if run.recipe.target is not None:
        run, note = search(run, space, announce)
        notes = (note,)
    recipe = run.recipe
    end = carry(run, space, Chain(run.folder, run), recipe.folders, announce)
    source, exports = end.source, list(end.exports)
    made = make_baselines(run, space, source, announce)
    announce("measure ...")
    report = measured(run, source, list(end.records), exports)
    if report is not None:
        report = replace(
            report, ladder=measured_ladder(run, source, made, report), warnings=(*notes, *report.warnings)
        )
        expected = output_digest(run.load(source))
        check_reload(source, report.auto_class, expected, recipe.model.trust_remote_code)
        announce("a fresh process loads the model and gives the same output")

    def publish(target: Path) -> None:
        assert report is not None  # the main process has it, and no other comes here
        _publish(report, source, [folder for folder, _ in exports], target)

    result = space.result(MODEL, publish)
    return report or load_report(result)


def _publish(report: Report, source: Path, exports: list[Path], target: Path) -> None:
    """The result as a receiver gets it: checkpoint, exports, report, page, card, plots (with matplotlib)."""
    from ..reporting.card import save_card
    from ..reporting.page import save_page
    from ..reporting.plots import save_plots

    copy_folder(source, target, leave_out=(MANIFEST,))
    for folder in exports:
        copy_folder(folder, target / folder.name)
    report.save(target)
    if find_spec("matplotlib"):
        save_plots(report, target)
    save_page(report, target)
    save_card(report, target)
