"""Commands that change models: `compress`, `plan`, `prune`, `distill`."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .base import app, print_json, print_text, quiet_libraries, say
from .overrides import parse_overrides

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
PASSED_ON: dict[str, Any] = OVERRIDES | {"help_option_names": []}
OPTIONS = ("output-dir", "resume", "processes", "json", "trust-remote-code", "help")
TRUST_HELP = "Run code that comes with the model. That a recipe says so is not enough."
STARTED = "HF_EFFICIENT_PROCESSES"  # in the environment of processes that --processes started
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe_names(incomplete: str) -> list[str]:
    """For the shell: the shipped recipes, and recipe files here."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml")) + sorted(str(path) for path in Path().glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


@app.command(context_settings=OVERRIDES)
def compress(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="A shipped recipe (see `hf-efficient list recipes`), a YAML file, or the folder of a run.",
            autocompletion=recipe_names,
        ),
    ],
    output_dir: Annotated[Path | None, typer.Option(help="Default: out/<recipe name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run, and never begin a new one.")] = False,
    processes: Annotated[
        int, typer.Option(min=1, max=1024, help="Share the work out to so many processes on this machine: one a GPU.")
    ] = 1,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a recipe and write model, report, plots and card.

    Any recipe key can be overridden: `--prune.ratio 0.5 --data.limit 200`. The same command again continues a run that
    was stopped, and so does `compress FOLDER` with the folder of that run.
    """
    from ..pipeline.compress import MODEL
    from ..pipeline.compress import compress as run
    from ..reporting.ladder_tables import ladder_text
    from ..reporting.tables import text_table
    from ..training.ranks import leave

    if recipe.startswith("-"):
        raise ConfigError(f"The recipe comes first: `hf-efficient compress RECIPE {recipe} ...`.")
    quiet_libraries()
    chosen, folder = _chosen(recipe, output_dir, context.args, resume)
    chosen = chosen.allowed(trust_remote_code, parse_overrides(context.args, OPTIONS))
    trust = chosen.model.trust_remote_code
    if processes > 1:
        _on_processes(processes)
    if chosen.sweep:
        _sweep(chosen, folder, as_json, trust or trust_remote_code)
        leave()
        return
    report = run(chosen, output_dir=folder, announce=say, trust_remote_code=trust)
    print_json(report.to_dict()) if as_json else print_text(text_table(report) + ladder_text(report))
    if not as_json:
        print_text(f"\nModel, report, page, plots and card: {folder / MODEL}")
    leave()


def _on_processes(count: int) -> None:
    """Start this command again in so many processes, and end with what it ends with there."""
    from ..io.process import run_together

    if os.environ.get(STARTED):
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "accelerate launch or torchrun has started the processes already. Leave --processes out, or start "
            "`hf-efficient` alone."
        )
    os.environ[STARTED] = "1"
    code = run_together(count, "hf_efficient", *sys.argv[1:])
    if code:
        raise SystemExit(code)
    raise typer.Exit


def _chosen(recipe: str, output_dir: Path | None, words: list[str], resume: bool) -> tuple[Any, Path]:
    """The recipe with its overrides, and the folder of its run."""
    from ..pipeline.workspace import RECIPE
    from ..recipes.recipe import Recipe

    path = Path(recipe)
    begun = (path / RECIPE).is_file()
    if path.is_dir() and not begun:
        raise ConfigError(f"{recipe} is a folder, but not that of a run (it has no {RECIPE}). Give a recipe.")
    if begun and (words or (output_dir or path) != path):
        raise ConfigError(
            f"{recipe} goes on with the recipe it began with, there. Leave out the overrides and the folder."
        )
    overrides = parse_overrides(words, OPTIONS)
    chosen = Recipe.from_yaml(path / RECIPE if begun else recipe).with_overrides(overrides)
    folder = path if begun else output_dir or Path("out") / chosen.name
    if resume and not (folder / RECIPE).is_file():
        raise ConfigError(f"There is no run in {folder} to go on with. Leave out --resume, or name its --output-dir.")
    return chosen, folder


def _sweep(recipe: Any, folder: Path, as_json: bool, trust: bool) -> None:
    from ..pipeline.sweep import sweep
    from ..reporting.page import PAGE
    from ..reporting.tables import text_results

    reports = sweep(recipe, output_dir=folder, announce=say, trust_remote_code=trust)
    if as_json:
        print_json({label: each.to_dict() for label, each in reports.items()})
    else:
        print_text(f"{text_results(reports)}\n\nAll of them on one page: {folder / PAGE}")


@app.command()
def plan(
    what: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a Hub id, bundled:NAME, or a recipe.", autocompletion=recipe_names),
    ],
    ratio: Annotated[float, typer.Option(help="The fraction of the metric to remove.")] = 0.5,
    metric: Annotated[
        str | None, typer.Option(help="macs or parameters. Default: macs; parameters where experts leave.")
    ] = None,
    granularity: Annotated[str, typer.Option(help="Of head, neuron, expert, layer; with commas.")] = "head,neuron",
    allocation: Annotated[str, typer.Option(help="global, or uniform: the same sizes in every layer.")] = "global",
    round_to: Annotated[int, typer.Option(help="Neurons stay in multiples of this.")] = 8,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens at which MACs are counted. Default: 128, or all that the model takes.")
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Calibration texts, for the memory and time of pruning from a folder.")
    ] = 256,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON; of a recipe, a list with one for each prune stage.")
    ] = False,
) -> None:
    """Say what pruning would give, weights untouched.

    Sizes, MACs, bytes, and how the result loads; what pruning would refuse is refused. Only the config is read, so a
    model of any size takes seconds. For a recipe the sizes are those after its stages, and its data is looked at too:
    whatever `compress` would refuse before it begins is refused.
    """
    from ..pipeline.compress import plan_recipe
    from ..pruning.config import PruningConfig
    from ..pruning.price.forecast import plan_table
    from ..pruning.prune import plan as run
    from ..recipes.recipe import is_recipe

    quiet_libraries()
    of_recipe = is_recipe(what)
    if of_recipe:
        plans = plan_recipe(what, trust_remote_code=trust_remote_code)
    elif trust_remote_code:
        raise ConfigError(f"--trust-remote-code is for recipes, and {what!r} is a model. Leave it out.")
    else:
        options: dict[str, Any] = {"ratio": ratio, "metric": metric, "allocation": allocation, "round_to": round_to}
        options |= {"granularity": tuple(granularity.split(",")), "sequence_length": sequence_length}
        config = PruningConfig(**options)
        if sequence_length is None:
            config = PruningConfig(**options | {"sequence_length": _usual_length(what)})
        plans = [run(what, config)]
    if output is not None:
        plans[-1].save(output)
        say(f"Plan{' of the last prune stage' if len(plans) > 1 else ''}: {output}")
    if as_json:
        values = [each.to_dict() for each in plans]
        print_json(values if of_recipe else values[0])
    else:
        print_text("\n\n".join(map(plan_table, plans)))
        if not of_recipe and (needs := _resources(what, plans[0], rows)):
            print_text(needs)


def _resources(name: str, plan: Any, rows: int) -> str:
    """What it takes to carry out a plan from the folder of the model."""
    from ..models.anatomy import Anatomy
    from ..pruning.price.resources import predict, resources_line
    from ..pruning.prune import without_weights

    model = without_weights(name)
    if len(Anatomy.of(model).stacks) != 1:
        return ""
    return resources_line(predict(model, plan, rows, plan.forecast.length, batch_size=16))


def _usual_length(name: str) -> int:
    from ..models.loading import load_config
    from ..pruning.score.calibration import DEFAULT_LENGTH
    from .base import fitting_length

    return fitting_length(load_config(name), None, DEFAULT_LENGTH)


@app.command(context_settings=PASSED_ON)
def prune(context: typer.Context) -> None:
    """Prune a model, or sweep over ratios. Flags: `hf-efficient prune --help`."""
    from .programs.prune import parse, run

    words, as_json = _script(context)
    script = parse(words)
    with _stdout_for_json(as_json):
        rows = run(script)
    if as_json:
        print_json(rows)


@app.command(context_settings=PASSED_ON)
def distill(context: typer.Context) -> None:
    """Distil a teacher into a student. Flags: `hf-efficient distill --help`.

    On several processes: `accelerate launch scripts/distill.py`.
    """
    from .programs.distill import read, run

    words, as_json = _script(context)
    script, args = read(words)
    with _stdout_for_json(as_json):
        metrics = run(script, args)
    if as_json:
        print_json(metrics)


def _script(context: typer.Context) -> tuple[list[str], bool]:
    """The flags without `--json`, which is ours; argparse shall call the program by its name."""
    quiet_libraries()
    sys.argv[0] = context.command_path
    words = list(context.args)
    if "-h" in words or "--help" in words:
        print_text("With --json the numbers are printed as JSON, and all else goes to stderr.\n")
    return [word for word in words if word != "--json"], "--json" in words


def _stdout_for_json(wanted: bool) -> Any:
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()
