"""The one place that starts another program, and another Python, which never sees the current folder.

    done = run_module("hf_efficient.pipeline.verify", folder, "AutoModel", timeout=3600)
    done.returncode, done.stdout

    program_output("git", "--version")                  # None where there is no git

`python -m` would look for `torch` and `random` in the current folder first (`-P`, which forbids that, came with 3.11).
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
GRACE = 60.0  # seconds: longer than a process needs to hear that another one has failed

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
    command = _command(module, *arguments)
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    # It may name the current folder, where Python would look for what it imports before our first line.
    options["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=timeout, **options)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{module} took longer than {timeout:g} s") from error


def _command(module: str, *arguments: str) -> list[str]:
    """Of a Python that runs `module`, and finds what this one finds, but for what lies in the current folder."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted
        here = None
    absolute = [path for path in sys.path if isinstance(path, str) and os.path.isabs(path)]
    folders = [path for path in absolute if os.path.realpath(path) != here]  # under whatever name it stands there
    return [sys.executable, "-c", _START, str(len(folders)), *folders, str(PACKAGE), module, *arguments]


def run_together(count: int, module: str, *arguments: str) -> int:
    """Run `module` in so many fresh Pythons, a process group on this machine as torchrun makes one; its exit code.

    Each has its part of the processor's cores. They write where this process does. If one fails, the others have
    `GRACE` seconds to hear of it and end too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    usual = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}  # who waits leaves the cores to others
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group["LOCAL_WORLD_SIZE"] = str(count)
    processes: list[subprocess.Popen] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for rank in range(count):
            place = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | ({"TQDM_DISABLE": "1"} if rank else {})
            environment = usual | {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | place
            command = _command(module, *arguments)
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment))
        return _all_ended(processes)
    except KeyboardInterrupt:  # the terminal told them too
        return 130
    except SystemExit:  # they were not told
        for process in processes:
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(GRACE)
            process.kill()
            process.wait()


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _all_ended(processes: Sequence[subprocess.Popen]) -> int:
    """0 when all have ended well; else, at once, what the first gave that did not."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [code for code in codes if code]:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(0.1)


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


def trim_memory() -> None:
    """Give freed memory back to the system. glibc keeps it, in pieces that what comes next may not fit into: over a
    hundred passes of equal size a process grew to twice what one needs. Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
