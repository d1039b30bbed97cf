"""Other Python processes, of three kinds.

`python("-m", "module", ...)` is what nearly every test needs: a process of its own with its own arguments, folder and
environment, forked from one that has torch, transformers and the package imported (which alone takes 8 seconds).
`launch("module", ..., count=2)` starts several such that form a process group, as `torchrun` does.
`run_fresh` and `sys.executable` are for what is promised of an interpreter that has imported nothing yet.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .families import CASES, Inputs, make_inputs

ROOT = Path(__file__).parents[1]
# A name that does not exist is passed over in silence.
PRELOADED = [
    "torch._dynamo",
    "transformers.trainer",
    "transformers.modeling_utils",
    "datasets",
    "evaluate",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "hf_efficient.cli.run",
    "hf_efficient.conversion.positions",
    "hf_efficient.distillation.trainer",
    "hf_efficient.pipeline.compress",
    "hf_efficient.pipeline.fresh",
    "hf_efficient.pipeline.report",
    "hf_efficient.pipeline.verify",
    "hf_efficient.pruning.callback",
    "hf_efficient.reporting.page",
    "hf_efficient.reporting.plots",
    "hf_efficient.runtimes.runtime",
]
LIMIT = 600.0  # seconds: what takes longer hangs


@dataclass
class Done:
    """Like a `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def start(*words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, prints: Path | None = None) -> Any:
    """Start `python WORDS` (`-m MODULE`, `-c CODE` or a script, then its arguments): a `multiprocessing.Process`.

    Args:
        env: the whole environment; that of this process by default.
        prints: the folder in which stdout.txt and stderr.txt are written; they go nowhere by default.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    strings = [os.fspath(word) for word in words]
    process = context.Process(
        target=_main, args=(strings, os.fspath(cwd), dict(env or os.environ), prints and os.fspath(prints))
    )
    process.start()
    return process


def finish(process: Any, timeout: float = LIMIT) -> int:
    """Wait for it; gives the exit code.

    Raises:
        TimeoutError: it took longer than `timeout` seconds; it was killed.
    """
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"it took longer than {timeout:g} s")
    return process.exitcode


def python(*words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = LIMIT) -> Done:
    """`python WORDS` to its end."""
    with tempfile.TemporaryDirectory() as prints:
        code = finish(start(*words, cwd=cwd, env=env, prints=Path(prints)), timeout)
        return Done(code, *_printed(Path(prints)))


def launch(module: str, *arguments: str | Path, count: int = 2, timeout: float = LIMIT, **env: str) -> None:
    """As `torchrun --nproc_per_node COUNT -m MODULE ARGUMENTS`, one thread each; a failure shows what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folders = [Path(root, str(rank)) for rank in range(count)]
        processes = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            ranked = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env
            processes.append(start("-m", module, *arguments, env=ranked, prints=folder))
            stack.callback(processes[-1].kill)
        codes = [finish(process, timeout) for process in processes]
        assert codes == [0] * count, [_printed(folder)[1][-3000:] for folder in folders]


def run_module(module: str, *arguments: str, timeout: float | None = None) -> Done:
    """`hf_efficient.io.process.run_module` without a cold start: see the fixture in conftest.py."""
    return python("-m", module, *arguments, cwd=Path.cwd(), timeout=timeout or LIMIT)


def _printed(folder: Path) -> tuple[str, str]:
    names = ("stdout.txt", "stderr.txt")
    return tuple((folder / name).read_text(encoding="utf-8", errors="replace") for name in names)


def _main(words: list[str], cwd: str, env: dict[str, str], prints: str | None) -> None:
    """In the fork: what `python` does with its command line."""
    gc.freeze()  # what is imported by now, as in conftest.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        path = os.path.join(prints, name) if prints else os.devnull
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    first, *rest = words
    if first == "-c":
        code, *arguments = rest
        sys.argv, sys.path[:0] = ["-c", *arguments], [""]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]) | {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[:0] = rest, [cwd]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


def save_with_expectation(model: PreTrainedModel, name: str, folder: Path, inputs: Inputs | None = None) -> None:
    """A checkpoint with what `tests.fresh` needs to load and judge it; `inputs` for a type outside of the table."""
    path, auto = folder / name, CASES[name].auto if inputs is None else "AutoModel"
    inputs = make_inputs(name) if inputs is None else inputs
    model.save_pretrained(path)
    with torch.no_grad():
        save_file(inputs | {"expected": model(**inputs)[0].contiguous()}, path / "expected.safetensors")
    (path / "auto.txt").write_text(auto)


def run_fresh(folder: Path, *scenarios: str, home: Path) -> dict[str, dict]:
    """The answer of each scenario; `home` keeps transformers' copies of loader files away from the user's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fresh", str(folder), *scenarios],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    return json.loads(last[last.index('{"') :])  # transformers' question about trust ends without a line break
