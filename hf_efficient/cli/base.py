"""The application, what all commands share, and how errors are told.

@app.command()
def hello() -> None: ...

main()                                                   # reads sys.argv
"""

import errno
import io
import json
import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from ..errors import HfEfficientError, RequirementError
from ..io.secrets import without_secrets
from ..io.text import PLAIN, for_terminal
from .noise import silence

DEBUG = "HF_EFFICIENT_DEBUG"
STOPPED = 130
MISSED = 3  # what was required
LONGEST = 4000  # characters of an error

ORDER = ("compress", "plan", "free", "prune", "distill", "measure", "report", "card", "export", "push", "list", "env")


class _InOrder(typer.core.TyperGroup):
    """Commands are listed as they are used, one after the other."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(ORDER)


app = typer.Typer(
    name="hf-efficient",
    cls=_InOrder,
    help="Efficient attention, pruning and distillation for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the time to the first line, and it reflows
)


def _print_version(asked: bool) -> None:
    if asked:
        from ..version import __version__

        print_text(__version__)
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


def print_json(value: Any) -> None:
    """The one way in which commands answer machines: on stdout, and nothing else there."""
    print_text(json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f"))


def print_text(text: str) -> None:
    """What was asked for, on stdout. Whoever wrote it, the terminal obeys nothing in it."""
    if rank() == 0:
        typer.echo(for_terminal(text))


def rank() -> int:
    """Which of several processes this is; only the first one answers."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def say(line: str) -> None:
    """What a person wants to know and a machine does not: on stderr."""
    typer.echo(for_terminal(without_secrets(line)), err=True)


def quiet_libraries() -> None:
    """Only errors from the libraries underneath, and progress bars only where there is a terminal to draw them on."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def load(name: str, task: str | None) -> Any:
    """The model, with the head of the task, or its own."""
    from ..data.tasks import TASKS
    from ..errors import unknown_name
    from ..models.loading import auto_class_of, load_model

    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    return load_model(auto_class_of(name) if task is None else TASKS[task].auto_class, name)


def fitting_length(config: Any, asked: int | None, usual: int) -> int:
    """What was asked for; else the usual length, or all that a model of this config takes if that is less."""
    from ..models.registry import token_limit

    if asked is not None:
        return asked
    return min(usual, token_limit(config, rotary=False) or usual)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN)  # a terminal of ascii is told all that we tell
    silence()
    try:
        app(prog_name="hf-efficient")
    except (HfEfficientError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        if isinstance(error, RequirementError):
            for line in error.misses if rank() == 0 else ():  # all processes measured the same
                say(f"missed: {line}")
            raise SystemExit(MISSED) from None
        message = str(error) if isinstance(error, HfEfficientError) else _told(error)
        where = f" in process {rank()}" if rank() else ""
        say(f"error{where}: {message if len(message) <= LONGEST else message[:LONGEST] + '...'}")
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == STOPPED:
            say("stopped; the same command goes on where it was")
        raise


def _told(error: OSError) -> str:
    """A file system or network that refuses: what, why, and what to do."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(names)}: " if names else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Make room, or name a folder on another disk; what is finished is kept. "
    elif names:
        fix = "Check that the folder is there and that you may write to it, or name another one. "
    else:
        fix = ""
    return f"{where}{reason.rstrip('.')}. {fix}`hf-efficient --debug ...` shows where it arose."
