"""From a recipe to a measured model: the loop over stages.

    report = compress("bbc-news", output_dir="out/bbc-news")
    report.comparison.speedup

Each stage reads a checkpoint folder and writes one. Started again, a stopped run goes on after its last finished stage
(and a stage that trains, after its last epoch); the result is that of an uninterrupted run.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..io.disk import clear_disk_errors, copy_folder, inside
from ..recipes.recipe import Recipe
from ..reporting.schema import Report, load_report
from .checking import check, check_attention
from .report import check_losses, measured

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan
    from .run import Run
    from .workspace import Workspace

MODEL = "model"

# A stage's folder, its settings, and what runs it: (run, settings, source folder, target folder) -> facts.
Step = tuple[str, Any, Callable[["Run", Any, Path, Path], dict[str, Any]]]


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
        announce: called with one line when a stage begins or ends.
        trust_remote_code: run code that comes with the model. That the recipe says so is not enough.
        **overrides: dotted recipe keys: `compress("bbc-news", **{"prune.ratio": 0.5})`.

    Raises:
        ConfigError, DataError, UnsupportedModelError: before any long work.
        CheckpointError: `output_dir` holds something else, a stage's files are damaged, or the disk is full.
        TrainingError: a loss that is not finite, or one example that does not fit into memory.
        UnsupportedModelError: an export lost more than its `max_loss`; the result is there all the same.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    recipe = recipe.allowed(trust_remote_code, overrides)
    if recipe.sweep:
        raise ConfigError("The recipe has a sweep, so it gives many results: call sweep(recipe), not compress.")
    from .run import Run
    from .workspace import Workspace

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "compress runs in one process. To distil on several, use `accelerate launch scripts/distill.py`."
        )
    folder = Path(output_dir) if output_dir is not None else Path("out") / recipe.name
    space = Workspace(folder, recipe)
    if report := _finished(folder, announce):
        return check_losses(recipe, report)
    run = Run(recipe, folder)
    check(run)
    then = "Then give the same command again: finished stages are kept, and it goes on from there."
    with clear_disk_errors(folder, then):
        space.open(run.inputs())
        try:
            # Another process may have ended it while this one looked at data and model.
            return check_losses(recipe, _finished(folder, announce) or _carry_out(run, space, announce))
        finally:
            space.close()


def _finished(folder: Path, announce: Callable[[str], None]) -> Report | None:
    """The report of a run that has ended."""
    if not folder.is_dir() or not inside(folder, MODEL).is_dir():
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
    from ..models.anatomy import Anatomy
    from ..models.families import token_limit
    from ..pruning.cut.surgery import planned_config
    from ..pruning.prune import plan
    from ..pruning.score.calibration import DEFAULT_LENGTH
    from ..recipes.stages import AttentionStage, PruneStage
    from .run import Run

    recipe = (recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)).allowed(trust_remote_code)
    run = Run(recipe, Path())
    check(run)
    config, plans = run.config, []
    for stage in recipe.stages:
        if isinstance(stage.settings, AttentionStage):
            config = check_attention(run, config, stage.settings)
        elif isinstance(stage.settings, PruneStage):
            asked = stage.settings.config
            length = asked.sequence_length or recipe.data.max_length or DEFAULT_LENGTH
            length = min(length, token_limit(config, rotary=False) or length)
            model = run.skeleton(config)
            plans.append(plan(model, dataclasses.replace(asked, sequence_length=length)))
            config = planned_config(Anatomy.of(model), plans[-1])
    if not plans:
        raise ConfigError(f"The recipe {recipe.name!r} has no prune stage, so there is nothing to plan.")
    return plans


def _carry_out(run: "Run", space: "Workspace", announce: Callable[[str], None]) -> Report:
    from transformers import set_seed

    from ..measurement.energy import with_energy
    from .run import TEACHER
    from .runners import RUNNERS, run_teacher
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
    report = measured(run, source, records, exports)
    expected = output_digest(run.load(source))
    check_reload(source, report.auto_class, expected, recipe.model.trust_remote_code)
    announce("a fresh process loads the model and gives the same output")
    space.result(MODEL, lambda target: _publish(report, source, [folder for folder, _ in exports], target))
    return report


def _publish(report: Report, source: Path, exports: list[Path], target: Path) -> None:
    """The result as a receiver gets it: checkpoint, exports, report, page, card, plots (with matplotlib)."""
    from ..reporting.card import save_card
    from ..reporting.page import save_page
    from ..reporting.plots import save_plots
    from .workspace import MANIFEST

    copy_folder(source, target, leave_out=(MANIFEST,))
    for folder in exports:
        copy_folder(folder, target / folder.name)
    report.save(target)
    if find_spec("matplotlib"):
        save_plots(report, target)
    save_page(report, target)
    save_card(report, target)
