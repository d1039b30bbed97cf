"""The command that takes only what changes no answer: `free`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .base import app, load, print_json, print_text, quiet_libraries


@app.command()
def free(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, a Hub id, or bundled:NAME.")],
    output_dir: Annotated[Path, typer.Option(help="Where the result goes; new or empty.")],
    texts: Annotated[
        str | None, typer.Option(help="Data with all texts that the model is for: tokens of none of them leave.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Of these data. Default: its usual names.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Decides the class that loads the model. Default: its head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what each step saved as JSON.")] = False,
) -> None:
    """Take from a model what changes no answer.

    Layers, heads and neurons that add exactly nothing; the model's own sliding windows computed as windows; with
    --texts tokens that are in none of them. The result is compared with the model, and says how it loads.
    """
    from ..io.disk import check_empty, new_folder
    from ..models.loading import load_processor
    from ..pruning.exact import free as run

    if text_column is not None and texts is None:
        raise ConfigError("--text-column is for --texts. Give the data, or leave it out.")
    check_empty(output_dir)
    quiet_libraries()
    tokenizer = load_processor(model)
    rows = None if texts is None else _texts(texts, text_column)
    freed = run(load(model, task), tokenizer if rows else None, rows)
    with new_folder(output_dir) as folder:
        freed.model.save_pretrained(folder)
        (freed.tokenizer or tokenizer).save_pretrained(folder)
    if as_json:
        savings = [asdict(saving) for saving in freed.savings]
        print_json({"savings": savings, "difference": freed.difference, "loads_with": freed.loads_with})
        return
    print_text("\n".join(saving.told for saving in freed.savings) or "Nothing: all of it counts.")
    print_text(
        f"{output_dir}: loads with {freed.loads_with}; outputs differ by {freed.difference:.1g} of the largest."
    )


def _texts(name: str, column: str | None) -> list[str]:
    """Of all splits."""
    from ..data.datasets import load_dataset_any
    from ..data.preparation import need_column

    splits = load_dataset_any(name).values()
    return [text for rows in splits for text in rows[need_column(rows, "text", column)]]
