"""Commands that measure and show: `measure`, `report`, `card`, `list`, `env`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .base import app, fitting_length, load, print_json, print_text, quiet_libraries, say

LISTS = ("attention", "importance", "losses", "stages", "formats", "quantize", "families", "tasks", "recipes")
# What a bug report needs beside torch and transformers; those that are not installed are told as such.
PACKAGES = (
    *("accelerate", "datasets", "huggingface_hub", "peft", "safetensors"),
    *("torchao", "onnx", "onnxruntime", "openvino", "executorch", "codecarbon", "matplotlib"),
)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, a Hub id, or bundled:NAME.")],
    baseline: Annotated[str | None, typer.Option(help="Measured in turn with the model, and compared.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Decides the class that loads the model. Default: its head.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs in one forward.")] = 1,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="In tokens; images have their model's size. Default: 512, or all that the model takes."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
    energy: Annotated[
        bool, typer.Option("--energy", help="Also the energy of 1,000 inputs (needs hf-efficient[energy]).")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Scored on the test rows of these, with --task: a file, Hub id or bundled:NAME, or as `data:` of a "
            "recipe: 'name_or_path: rows.csv, text_column: question'."
        ),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="What it must reach against the baseline, else exit code 3: 'speedup: 4, size: 0.25'."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurement as JSON.")] = False,
) -> None:
    """Measure size, cost, latency and quality of a model.

    Alone, or against a baseline in one interleaved run.
    """
    from ..measurement.measure import measure as run
    from ..reporting.tables import measurement_table

    rows = None if data is None else _data(data, task)
    required = None if require is None else _requirements(require, baseline, with_data=rows is not None)
    quiet_libraries()
    loaded, other = load(model, task), None if baseline is None else load(baseline, task)
    lengths = [fitting_length(each.config, sequence_length, 512) for each in (loaded, other) if each is not None]
    measurement = run(
        loaded,
        baseline=other,
        batch_size=batch_size,
        sequence_length=min(lengths),
        repeats=repeats,
        energy=energy,
        task=task,
        **({} if rows is None else _scored(rows, task, [(model, loaded), (baseline, other)])),
    )
    if as_json:
        print_json(asdict(measurement))
    else:
        print_text(measurement_table(measurement))
    if required is not None:
        score = measurement.quality and measurement.quality.main
        required.check(measurement.comparison, score)


def _data(text: str, task: str | None) -> Any:
    """The settings of the data, as in a recipe."""
    from ..data.tasks import TASKS
    from ..errors import unknown_name
    from ..recipes.settings import DataSettings
    from ..stages.settings import read

    if task is None:
        known = ", ".join(TASKS)
        raise ConfigError(f"--data needs --task, which says how its rows are read and scored. Give one of {known}.")
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    is_section = "name_or_path:" in text
    settings = read(DataSettings, _section(text, "--data") if is_section else {"name_or_path": text}, "--data")
    settings.check_task(task)
    return settings


def _scored(rows: Any, task: str | None, models: list[tuple[str | None, Any]]) -> dict[str, Any]:
    """The test rows as the model and its baseline, if there is one, read them: arguments of `measure`."""
    from ..data.preparation import check_labels
    from ..pipeline.run import Run
    from ..recipes.recipe import Recipe

    found: dict[str, Any] = {}
    for side, (name, model) in zip(("", "baseline_"), models, strict=True):
        if model is None:
            continue
        section = {"name": "measure", "task": task, "model": {"name_or_path": name}, "data": rows.to_dict()}
        run = Run(Recipe.from_dict(section), Path())
        prepared = run.data(config=model.config)
        check_labels(model.config, prepared)
        found |= {f"{side}dataset": prepared.test, f"{side}collator": prepared.collator, f"{side}pooling": run.pooling}
    return found


def _section(text: str, flag: str) -> Any:
    from ..io.yaml import parse

    return parse("{" + text + "}" if not text.lstrip().startswith("{") else text, flag)


def _requirements(text: str, baseline: str | None, with_data: bool) -> Any:
    """What can be measured here: without data no quality."""
    from ..recipes.requirements import Requirements
    from ..stages.settings import read

    required = read(Requirements, _section(text, "--require"), "--require")
    if baseline is None:
        raise ConfigError("--require compares with a baseline. Name it: --baseline FOLDER.")
    if not with_data and (unknown := [name for name in required.to_dict() if name not in ("speedup", "size")]):
        raise ConfigError(
            f"--require names {', '.join(unknown)}, which takes data to measure: give --data. Without it speedup and "
            "size can be asked for."
        )
    return required


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results: folders with report.json, or of runs.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against latency of all of them here, as PNG.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write all of them into one page here, as HTML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as a JSON list.")] = False,
) -> None:
    """Show what was measured, of one result or several.

    Several can be drawn into one plot or page.
    """
    from ..io.disk import write_atomic
    from ..io.text import for_line
    from ..reporting.ladder_tables import ladder_text
    from ..reporting.page import report_page
    from ..reporting.plots import plot_accuracy_latency
    from ..reporting.tables import text_table

    reports = [load_result(folder) for folder in folders]
    if plot is not None:
        plot_accuracy_latency(reports, plot)
        say(f"Plot: {plot}")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, report_page(reports))
        say(f"Page: {page}")
    if as_json:
        print_json([each.to_dict() for each in reports])
    else:
        texts = (text_table(each) + ladder_text(each) for each in reports)
        print_text("\n\n".join(f"{for_line(str(name))}\n{text}" for name, text in zip(folders, texts, strict=True)))


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A result: a folder with report.json, or that of a run.")],
    repo_id: Annotated[str, typer.Option(help="Where it will be loaded from, for title and snippet.")] = "",
    to_stdout: Annotated[bool, typer.Option("--print", help="Print it, and write nothing.")] = False,
) -> None:
    """Write the model card (README.md) anew from the report."""
    from ..pipeline.hub import result_folder
    from ..reporting.card import model_card, save_card

    chosen, name = result_folder(folder), repo_id or "path/to/this/model"
    if to_stdout:
        print_text(str(model_card(load_result(folder), name)))
    else:
        print_text(f"Card: {save_card(load_result(folder), chosen, name)}")


@app.command("list")
def list_names(
    what: Annotated[
        str | None,
        typer.Argument(
            help=f"One of {', '.join(LISTS)}.",
            autocompletion=lambda incomplete: [name for name in LISTS if name.startswith(incomplete)],
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List what can be asked for by name."""
    from ..errors import unknown_name

    if what is not None and what not in LISTS:
        raise unknown_name("list", what, LISTS)
    from ..attention.config import KINDS
    from ..data.tasks import TASKS
    from ..distillation.terms import LOSSES
    from ..models.families import FAMILIES
    from ..pruning.methods import IMPORTANCES, LAYER_IMPORTANCES, TRAINED_IMPORTANCES, WEIGHT_IMPORTANCES
    from ..recipes.recipe import shipped_recipes
    from ..runtimes.formats import FORMATS
    from ..runtimes.quantization import METHODS
    from ..stages.table import STAGES

    importances = [*IMPORTANCES, *LAYER_IMPORTANCES, *WEIGHT_IMPORTANCES, *TRAINED_IMPORTANCES]
    tables: tuple[Any, ...] = (KINDS, dict.fromkeys(importances), LOSSES, STAGES, FORMATS, METHODS, FAMILIES, TASKS)
    names = {name: list(table) for name, table in zip(LISTS, (*tables, shipped_recipes()), strict=True)}
    chosen = names if what is None else {what: names[what]}
    if as_json:
        print_json(chosen)
        return
    for title, entries in chosen.items():
        print_text(f"{title}: {', '.join(entries)}")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show machine and versions, for a bug report."""
    from importlib import metadata

    from ..io.environment import Environment, package_commit

    facts: dict[str, Any] = asdict(Environment.collect()) | {"commit": package_commit()}
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    if as_json:
        print_json(facts)
    else:
        print_text("\n".join(f"{key}: {'none' if value is None else value}" for key, value in facts.items()))


def load_result(folder: Path) -> Any:
    from ..pipeline.hub import result_folder
    from ..reporting.schema import load_report

    return load_report(result_folder(folder))
