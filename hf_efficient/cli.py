"""The command line, `hf-efficient COMMAND`. Each command is a thin call of the library.

Heavy imports stand inside the commands, so that `--help` answers at once. Exit codes: 0; 1 for an error that the user
can mend, told in one message (`--debug` shows where it arose); 2 for a command line that cannot be read; 130 after
ctrl-C. Anything else is a defect and shows its traceback.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import ConfigError, HfEfficientError

app = typer.Typer(
    help="Efficient attention, pruning and distillation for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
DEBUG = "HF_EFFICIENT_DEBUG"
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def _print_version(asked: bool) -> None:
    if asked:
        from .version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


@app.command(context_settings=OVERRIDES)
def compress(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="A shipped recipe (see `hf-efficient list recipes`), a YAML file, or the folder of a run."
        ),
    ],
    output_dir: Annotated[Path | None, typer.Option(help="Default: out/<recipe name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run, and never begin a new one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a recipe and write model, report, plots and card.

    Any recipe key can be overridden: `--prune.ratio 0.5 --data.limit 200`. The same command again continues a run that
    was stopped, and so does `compress FOLDER` with the folder of that run.
    """
    from .pipeline import MODEL
    from .pipeline import compress as run
    from .recipe import Recipe
    from .reporting.tables import text_table
    from .workspace import RECIPE

    if recipe.startswith("-"):
        raise ConfigError(f"The recipe comes first: `hf-efficient compress RECIPE {recipe} ...`.")
    _quiet_libraries()
    path = Path(recipe)
    begun = (path / RECIPE).is_file()
    if begun and (context.args or (output_dir or path) != path):
        raise ConfigError(
            f"{recipe} goes on with the recipe it began with, there. Leave out the overrides and the folder."
        )
    chosen = Recipe.from_yaml(path / RECIPE if begun else recipe).with_overrides(parse_overrides(context.args))
    folder = path if begun else output_dir or Path("out") / chosen.name
    if resume and not (folder / RECIPE).is_file():
        raise ConfigError(f"There is no run in {folder} to go on with. Leave out --resume, or name its --output-dir.")
    if chosen.sweep:
        _sweep(chosen, folder, as_json)
        return
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
    task: Annotated[
        str | None, typer.Option(help="Decides the class that loads the model. Default: its head.")
    ] = None,
    batch_size: int = 1,
    sequence_length: Annotated[int, typer.Option(help="In tokens; images have their model's size.")] = 512,
    repeats: int = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurement as JSON.")] = False,
) -> None:
    """Measure size, cost and latency of a model, alone or against a baseline in one interleaved run."""
    from dataclasses import asdict

    from .measure import measure as run
    from .reporting.tables import measurement_table

    _quiet_libraries()
    measured = run(
        _load(model, task),
        baseline=None if baseline is None else _load(baseline, task),
        batch_size=batch_size,
        sequence_length=sequence_length,
        repeats=repeats,
    )
    typer.echo(json.dumps(asdict(measured), indent=2) if as_json else measurement_table(measured))


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def prune(context: typer.Context) -> None:
    """Prune a model, or sweep over ratios. Flags: `hf-efficient prune --help`."""
    from .pruning.script import parse, run

    _quiet_libraries()
    run(parse(context.args))


@app.command(context_settings=PASSED_ON)
def distill(context: typer.Context) -> None:
    """Distil a teacher into a student. Flags: `hf-efficient distill --help`.

    On several processes: `accelerate launch scripts/distill.py`.
    """
    from .distillation.script import read, run

    _quiet_libraries()
    run(*read(context.args))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results: folders with report.json, or of runs.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against latency of all of them here, as PNG.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write all of them into one page here, as HTML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as a JSON list.")] = False,
) -> None:
    """Show what was measured, and draw several results into one plot or page."""
    from .reporting.page import report_page
    from .reporting.plots import plot_accuracy_latency
    from .reporting.tables import text_table

    reports = [_report(folder) for folder in folders]
    if as_json:
        typer.echo(json.dumps([json.loads(each.to_json()) for each in reports], indent=2))
    else:
        typer.echo("\n\n".join(f"{folder}\n{text_table(each)}" for folder, each in zip(folders, reports, strict=True)))
    if plot is not None:
        plot_accuracy_latency(reports, plot)
        typer.echo(f"\nPlot: {plot}", err=True)
    if page is not None:
        from .workspace import write_text

        write_text(page, report_page(reports))
        typer.echo(f"\nPage: {page}", err=True)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A result: a folder with report.json, or that of a run.")],
    repo_id: Annotated[str, typer.Option(help="Where it will be loaded from, for title and snippet.")] = "",
    to_stdout: Annotated[bool, typer.Option("--print", help="Print it, and write nothing.")] = False,
) -> None:
    """Write the model card (README.md) anew from the report."""
    from .hub import result_folder
    from .reporting.card import model_card, save_card

    chosen, name = result_folder(folder), repo_id or "path/to/this/model"
    if to_stdout:
        typer.echo(str(model_card(_report(folder), name)))
    else:
        typer.echo(f"Card: {save_card(_report(folder), chosen, name)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A result: a folder with report.json, or that of a run.")],
    repo_id: Annotated[str, typer.Option(help="Where to: user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, upload nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Upload model, tokenizer, exports, report, page, card and recipe to the Hub, in one commit.

    The repository is private unless it is there already or --public is given. After a failure, the same command sends
    what is missing.
    """
    from dataclasses import asdict

    from .hub import push as run

    done = run(folder, repo_id, private=not public, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
        return
    for name, size in done.files.items():
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{sum(done.files.values()):>14,}  bytes in {len(done.files)} files")
    typer.echo(f"Pushed: {done.url}" if done.url else f"Nothing was uploaded to {repo_id} (dry run).")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or bundled:NAME.")],
    format: Annotated[str, typer.Option(help="onnx, openvino, executorch or torch.")] = "onnx",
    quantize: Annotated[str | None, typer.Option(help="int8: weights of 8 bits (onnx).")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Default: out/<format>.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Decides the class that loads the model. Default: its head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write a model for another runtime, and compare what it computes with PyTorch."""
    from dataclasses import asdict

    from .exporting import check_format, check_runtime, folder_name
    from .exporting import export as run

    check_format(format, quantize)
    check_runtime(format)
    _quiet_libraries()
    target = output_dir or Path("out") / folder_name(format, quantize)
    made = run(_load(model, task), format, target, quantize=quantize)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2, default=str))
        return
    typer.echo(
        f"{made.folder}: {made.bytes_on_disk:,} bytes for {made.runtime}. Largest difference to PyTorch "
        f"{made.difference:.2g} of the largest output; the same prediction in {made.same_prediction:.1%}."
    )


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


def _sweep(recipe: Any, folder: Path, as_json: bool) -> None:
    from .reporting.page import PAGE
    from .reporting.tables import text_results
    from .sweeping import sweep

    reports = sweep(recipe, output_dir=folder, announce=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps({label: json.loads(each.to_json()) for label, each in reports.items()}, indent=2))
    else:
        typer.echo(f"{text_results(reports)}\n\nAll of them on one page: {folder / PAGE}")


def _load(name: str, task: str | None) -> Any:
    """The model, with the head of the task, or its own."""
    from .data import TASKS
    from .errors import unknown_name
    from .loading import auto_class_of, load_model

    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    return load_model(auto_class_of(name) if task is None else TASKS[task].auto_class, name)


def _report(folder: Path) -> Any:
    from .hub import result_folder
    from .reporting.schema import load_report

    return load_report(result_folder(folder))


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
    import logging

    for name in ("torchao", "torch.utils._pytree"):  # that kernels for GPUs do not load on a CPU, at every import
        logging.getLogger(name).setLevel(logging.ERROR)
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
        if os.environ.get(DEBUG):
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
