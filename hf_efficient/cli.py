"""The command line: `hf-efficient compress | plan | measure | list | env`. Each command is a thin call of the library.

Heavy imports stand inside the commands, so that `--help` answers at once. A user's error is one line and exit code 1;
anything else is a defect and shows its traceback.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError, HfEfficientError

app = typer.Typer(
    help="Efficient attention, pruning and distillation for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=OVERRIDES)
def compress(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `hf-efficient list recipes`) or a YAML file.")],
    output_dir: Annotated[Path | None, typer.Option(help="Default: out/<recipe name>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a recipe and write model, report, plots and card.

    Any recipe key can be overridden: `--prune.ratio 0.5 --data.limit 200`. The same command again continues a run that
    was stopped.
    """
    from .pipeline import MODEL
    from .pipeline import compress as run
    from .recipe import Recipe
    from .reporting.tables import text_table

    if recipe.startswith("-"):
        raise ConfigError(f"The recipe comes first: `hf-efficient compress RECIPE {recipe} ...`.")
    _quiet_libraries()
    chosen = Recipe.from_yaml(recipe).with_overrides(parse_overrides(context.args))
    folder = output_dir or Path("out") / chosen.name
    report = run(chosen, output_dir=folder, announce=lambda line: typer.echo(line, err=True))
    typer.echo(report.to_json() if as_json else text_table(report))
    if not as_json:
        typer.echo(f"\nModel, report, plots and card: {folder / MODEL}")


@app.command()
def plan(
    what: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, bundled:NAME, or a recipe.")],
    ratio: Annotated[float, typer.Option(help="The fraction of the metric to remove.")] = 0.5,
    metric: Annotated[str, typer.Option(help="macs or parameters.")] = "macs",
    granularity: Annotated[str, typer.Option(help="Of head, neuron and layer, joined by commas.")] = "head,neuron",
    round_to: Annotated[int, typer.Option(help="Neurons stay in multiples of this.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens at which MACs are counted.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what pruning would give, before any weight is touched: sizes, MACs, bytes, and how the result loads.

    Only the config is read, so a model of any size takes seconds. For a recipe the sizes are those after its stages.
    """
    from .pipeline import plan_recipe
    from .pruning.config import PruningConfig
    from .pruning.forecast import plan_table
    from .pruning.prune import plan as run
    from .recipe import is_recipe

    _quiet_libraries()
    if is_recipe(what):
        plans = plan_recipe(what)
    else:
        names = tuple(granularity.split(","))
        config = PruningConfig(
            ratio=ratio, metric=metric, granularity=names, round_to=round_to, sequence_length=sequence_length
        )
        plans = [run(what, config)]
    for made in plans:
        typer.echo(json.dumps(made.to_dict(), indent=1) if as_json else plan_table(made))
    if output is not None:
        plans[-1].save(output)
        typer.echo(f"\nPlan: {output}", err=True)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or bundled:NAME.")],
    baseline: Annotated[str | None, typer.Option(help="Measured in turn with the model, and compared.")] = None,
    task: Annotated[str, typer.Option(help="Decides the class that loads the model.")] = "text-classification",
    batch_size: int = 1,
    sequence_length: Annotated[int, typer.Option(help="In tokens; images have their model's size.")] = 512,
    repeats: int = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurement as JSON.")] = False,
) -> None:
    """Measure size, cost and latency of a model, alone or against a baseline in one interleaved run."""
    from dataclasses import asdict

    from .data import TASKS
    from .errors import unknown_name
    from .loading import load_model
    from .measure import measure as run
    from .reporting.tables import measurement_table

    _quiet_libraries()
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    auto = TASKS[task].auto_class
    measured = run(
        load_model(auto, model),
        baseline=None if baseline is None else load_model(auto, baseline),
        batch_size=batch_size,
        sequence_length=sequence_length,
        repeats=repeats,
    )
    typer.echo(json.dumps(asdict(measured), indent=2) if as_json else measurement_table(measured))


@app.command("list")
def list_names(
    what: Annotated[
        str | None, typer.Argument(help="attention, importance, losses, families, tasks or recipes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List what can be asked for by name."""
    from .errors import unknown_name

    names = _names()
    if what is not None and what not in names:
        raise unknown_name("list", what, names)
    chosen = names if what is None else {what: names[what]}
    if as_json:
        typer.echo(json.dumps(chosen, indent=2))
        return
    for title, entries in chosen.items():
        typer.echo(f"{title}: {', '.join(entries)}")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show the machine and the versions: what to paste into a bug report."""
    from dataclasses import asdict

    from .reporting.environment import Environment

    facts = asdict(Environment.collect())
    typer.echo(
        json.dumps(facts, indent=2) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items())
    )


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`["--prune.ratio", "0.5", "--seed=1"]` -> `{"prune.ratio": "0.5", "seed": "1"}`."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not an option. Override recipe keys as `--prune.ratio 0.5`.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: `--{key} VALUE`.")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def _names() -> dict[str, list[str]]:
    from .attention.config import KINDS
    from .families import FAMILIES
    from .preparing import TASKS
    from .pruning.config import IMPORTANCES
    from .recipe import shipped_recipes

    return {
        "attention": list(KINDS),
        "importance": list(IMPORTANCES),
        "losses": ["ce", "kd", "hidden", "attention", "relation", "attention_output", "embedding"],
        "families": list(FAMILIES),
        "tasks": list(TASKS),
        "recipes": list(shipped_recipes()),
    }


def _quiet_libraries() -> None:
    """Only errors from the libraries underneath, and progress bars only where there is a terminal to draw them on."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except HfEfficientError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
