"""A command line in this process: as `hf-efficient ...` in a shell, without paying for the imports each time."""

import contextlib
import io
import logging
import os
import sys
from dataclasses import dataclass

import datasets
import transformers

from hf_efficient.cli import main
from hf_efficient.cli.base import DEBUG


@dataclass
class Done:
    """Like a `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def cli(*arguments: str) -> Done:
    """Run it. An error that is no user's error comes through as what it is."""
    out, err = io.StringIO(), io.StringIO()
    words, verbosity = list(sys.argv), transformers.utils.logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    sys.argv = ["hf-efficient", *arguments]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = words
        os.environ.pop(DEBUG, None)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    return Done(code, out.getvalue(), err.getvalue())
