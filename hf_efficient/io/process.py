"""The one place that starts another program, and another Python, which never sees the current folder.

    done = run_module("hf_efficient.pipeline.verify", folder, "AutoModel", timeout=3600)
    done.returncode, done.stdout

    program_output("git", "--version")                  # None where there is no git

`python -m` would look for `torch` and `random` in the current folder first (`-P`, which forbids that, came with 3.11).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent

# Arguments: how many folders are searched for modules, these, our own folder, the module, and what it is given.
# Nothing is imported before the search path is that of the caller. Our own package is taken from where the caller has
# it, whatever folder that is: so the folder itself, which may hold anything, need not be searched.
_START = """
import sys
count = int(sys.argv[1])
sys.path[:] = sys.argv[2 : 2 + count]
own, module = sys.argv[2 + count : 4 + count]
del sys.argv[1 : 4 + count]
import importlib.util, os, runpy
spec = importlib.util.spec_from_file_location(
    "hf_efficient", os.path.join(own, "__init__.py"), submodule_search_locations=[own]
)
sys.modules["hf_efficient"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["hf_efficient"])
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_module(module: str, *arguments: str, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `module` as a program in a fresh Python and wait for it.

    It finds the modules that this process finds, but for those in the current folder.

    Raises:
        TimeoutError: it took longer than `timeout` seconds; it was stopped.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted
        here = None
    absolute = [path for path in sys.path if isinstance(path, str) and os.path.isabs(path)]
    folders = [path for path in absolute if os.path.realpath(path) != here]  # under whatever name it stands there
    command = [sys.executable, "-c", _START, str(len(folders)), *folders, str(PACKAGE), module, *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    # It may name the current folder, where Python would look for what it imports before our first line.
    options["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=timeout, **options)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{module} took longer than {timeout:g} s") from error


def program_output(*command: str | os.PathLike, without: Sequence[str] = (), timeout: float = 10) -> str | None:
    """What a program printed; None if it is not installed, failed, or took longer than `timeout` seconds.

    `without`: variables of the environment that begin so are kept from it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuple(without))}
    try:
        program = subprocess.run(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=timeout,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return program.stdout.strip() if program.returncode == 0 else None
