"""Commands that hand a model on: `export`, `push`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .base import app, load, print_json, print_text, quiet_libraries


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A result: a folder with report.json, or that of a run.")],
    repo_id: Annotated[str, typer.Option(help="Where to: user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, upload nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Upload a result to the Hub, in one commit.

    Model, tokenizer, exports, report, page, card and recipe. The repository is private unless it is there already or
    --public is given. After a failure, the same command sends what is missing.
    """
    from ..pipeline.hub import push as run

    result = run(folder, repo_id, private=not public, dry_run=dry_run)
    if as_json:
        print_json(asdict(result))
        return
    for name, size in result.files.items():
        print_text(f"{size:>14,}  {name}")
    print_text(f"{sum(result.files.values()):>14,}  bytes in {len(result.files)} files")
    audience = "private" if result.private else "public"
    print_text(f"Pushed: {result.url} ({audience})" if result.url else f"Nothing was uploaded to {repo_id} (dry run).")


def format_names(incomplete: str) -> list[str]:
    """For the shell."""
    from ..runtimes.formats import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a GGUF file, a Hub id, or bundled:NAME.")],
    format: Annotated[
        str, typer.Option(help="onnx, openvino, executorch, torch or gguf.", autocompletion=format_names)
    ] = "onnx",
    quantize: Annotated[str | None, typer.Option(help="int8: 8 bits (onnx, gguf); a recipe has more ways.")] = None,
    cache: Annotated[bool, typer.Option("--cache", help="A decoder that writes, with a cache (onnx).")] = False,
    min_agreement: Annotated[
        float | None, typer.Option(help="Fail where fewer of the predictions are the same: 0.95.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Default: out/<format>.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Decides the class that loads the model. Default: its head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write a model for another runtime.

    What it computes there is compared with PyTorch.
    """
    from ..io.disk import check_empty
    from ..models.loading import load_processor
    from ..runtimes.export import export as run
    from ..runtimes.formats import FORMATS, check_format, check_runtime, folder_name

    check_format(format, quantize, cache)
    check_runtime(format)
    target = output_dir or Path("out") / folder_name(format, quantize, cache)
    check_empty(target)
    quiet_libraries()
    tokenizer = load_processor(model) if FORMATS[format].holds_tokenizer else None
    result = run(
        load(model, task),
        format,
        target,
        quantize=quantize,
        cache=cache,
        min_agreement=min_agreement,
        tokenizer=tokenizer,
    )
    if as_json:
        print_json(asdict(result))
        return
    print_text(
        f"{result.folder}: {result.bytes_on_disk:,} bytes for {result.runtime}. Largest difference to PyTorch "
        f"{result.difference:.2g} of the largest output; the same prediction in {result.same_prediction:.1%}."
    )
