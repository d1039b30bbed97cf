"""The one place that starts another Python: it never sees the current folder, whatever files lie there.

    done = run_module("hf_efficient.verify", folder, "AutoModel")
    done.returncode, done.stdout

`python -m` would look for `torch` and `random` in the current folder first (`-P`, which forbids that, came with 3.11).
"""

import subprocess
import sys

_START = (
    "import sys; sys.path[:1] = [] if sys.path[:1] == [''] else sys.path[:1]; "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def run_module(module: str, *arguments: str, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `module` as a program in a fresh Python and wait for it.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    return subprocess.run(
        [sys.executable, "-c", _START, module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout,
    )
