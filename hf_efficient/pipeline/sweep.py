"""A recipe over a matrix of settings: every combination, one page and one plot of all.

    # in the recipe
    sweep: {prune.ratio: [0.3, 0.5, 0.7], attention.kind: [local, linear]}

    reports = sweep("my-recipe.yaml", output_dir="out/sweep")        # {"ratio=0.3,kind=local": Report, ...}

Each combination is a run of its own in a folder of its own, so it can be resumed, shown and pushed as any other.
Stages that two combinations begin with in common are done once.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from ..errors import CheckpointError, ConfigError, RequirementError
from ..io.disk import check_name, copy_folder, inside, new_folder, own_file, write_atomic
from ..recipes.recipe import Recipe
from ..reporting.page import PAGE, report_page
from ..reporting.schema import Report, load_report
from ..training.ranks import begin, is_main, on_main, together
from .compress import compress
from .workspace import INPUTS, LOCK, MANIFEST, MODEL, RECIPE, taken_lock

PARETO = "pareto.png"


def sweep(
    recipe: Recipe | str | Path,
    *,
    output_dir: str | Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    trust_remote_code: bool = False,
) -> dict[str, Report]:
    """Run every combination of `recipe.sweep`, then write `report.html` and `pareto.png` over all of them.

    Parameters:
        output_dir: default `out/<recipe name>`; each combination has a folder in it.
        announce: called with one line when something begins or ends.
        trust_remote_code: run code that comes with the model. That the recipe says so is not enough.

    Returns:
        The report of each combination by its label. Called again, what is finished is not done again.

    Raises:
        ConfigError: the recipe has no sweep.
        CheckpointError: the folder holds something else.
        RequirementError: after all of them, if some miss what the recipe requires.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    if not recipe.sweep:
        raise ConfigError(
            f"The recipe {recipe.name!r} has no sweep. Add one: sweep: {{prune.ratio: [0.3, 0.5, 0.7]}}."
        )
    recipe = recipe.allowed(trust_remote_code)
    combinations = {label: one.allowed(trust_remote_code) for label, one in recipe.combinations().items()}
    folder = check_name(output_dir) if output_dir is not None else Path("out") / recipe.name
    begin()
    with together("sweep", ends=True):
        _check_folder(folder, recipe)
        lock = on_main(lambda: _open(folder, recipe))
        try:
            return _run_all(folder, combinations, announce if is_main() else lambda line: None)
        finally:
            if lock is not None:
                lock.release()


def _open(folder: Path, recipe: Recipe) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    lock = taken_lock(folder)
    _check_folder(folder, recipe)  # again: another process may have been here since
    write_atomic(folder / RECIPE, recipe.to_yaml())
    return lock


def _run_all(folder: Path, combinations: dict[str, Recipe], announce: Callable[[str], None]) -> dict[str, Report]:
    reports: dict[str, Report] = {}
    done: list[tuple[Path, Recipe]] = []
    missed: list[str] = []
    for label, one in combinations.items():
        announce(f"== {label}")
        target = inside(folder, label)
        on_main(lambda: _copy_stages(done, target, one))  # noqa: B023  (done before the next one)
        trust = one.model.trust_remote_code  # was allowed above
        try:
            reports[label] = compress(one, output_dir=target, announce=announce, trust_remote_code=trust)
        except RequirementError as error:  # the others are asked all the same
            reports[label] = load_report(target / MODEL)
            missed += [f"{label}: {miss}" for miss in error.misses]
        done.append((target, one))
    on_main(lambda: _show_all(folder, reports))
    if missed:
        raise RequirementError(missed)
    return reports


def _show_all(folder: Path, reports: dict[str, Report]) -> None:
    write_atomic(folder / PAGE, report_page(list(reports.values()), list(reports)))
    if find_spec("matplotlib") and all(report.student.quality is not None for report in reports.values()):
        from ..reporting.plots import plot_accuracy_latency

        plot_accuracy_latency(list(reports.values()), own_file(folder / PARETO), list(reports))


def _check_folder(folder: Path, recipe: Recipe) -> None:
    if not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    recipe_file = inside(folder, RECIPE)
    if not recipe_file.is_file() or Recipe.from_yaml(recipe_file).fingerprint() != recipe.fingerprint():
        raise CheckpointError(
            f"{folder} is not empty and not a run of this sweep. Choose another output folder, or empty it."
        )


def _copy_stages(done: list[tuple[Path, Recipe]], target: Path, recipe: Recipe) -> None:
    """Give a new run the finished stages that an earlier one began with in common; the longest such beginning."""
    if target.exists() or not done:
        return
    source, common = max(((folder, _common(other, recipe)) for folder, other in done), key=lambda pair: pair[1])
    if common < 0:
        return
    with new_folder(target) as partial:
        for name in list(recipe.folders)[: common + 1]:
            if (inside(source, name) / MANIFEST).is_file():
                copy_folder(source / name, partial / name)
        write_atomic(partial / INPUTS, inside(source, INPUTS).read_bytes())
        write_atomic(partial / RECIPE, recipe.to_yaml())


def _common(one: Recipe, other: Recipe) -> int:
    """How many stages both begin with; -1 if not even the teacher is the same."""
    first, second = one.to_dict(), other.to_dict()
    if any(first[key] != second[key] for key in ("task", "seed", "model", "data", "teacher")):
        return -1
    pairs = zip(first["stages"], second["stages"], strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first["stages"]), len(second["stages"])))
