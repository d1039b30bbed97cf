"""The machine and versions behind the numbers: never who, where or on which host.

Environment.collect()          # Environment(cpu="AMD EPYC", cores=2, gpu=None, python="3.11.7", ...)
"""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..version import __version__
from .process import program_output

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Machine and versions. `cores` counts logical CPUs; `system` is such as `"Linux x86_64"`."""

    cpu: str
    cores: int
    gpu: str | None
    system: str
    python: str
    torch: str
    transformers: str
    hf_efficient: str

    @classmethod
    def collect(cls) -> "Environment":
        """This process's machine and versions."""
        import torch

        return cls(
            cpu=_cpu_model(),
            cores=os.cpu_count() or 1,
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=str(torch.__version__),
            transformers=metadata.version("transformers"),
            hf_efficient=__version__,
        )


def _cpu_model() -> str:
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        return program_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def package_commit(package: Path = PACKAGE) -> str | None:
    """The commit of the package's own checkout, `-dirty` if its files were changed; None for an installed package."""
    root = package.parent
    # A package copied into another project's checkout must not report that project's commit: it is not tracked there.
    if not (root / ".git").exists() or _git(root, "ls-files", package / "version.py") in (None, ""):
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", package)
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *words: str | Path) -> str | None:
    """What git says of the checkout in `root`, running none of its programs.

    In a hook of another repository the variables GIT_DIR and GIT_WORK_TREE would make it speak of that one.
    """
    quiet = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "--no-optional-locks")
    return program_output("git", "-C", root, *quiet, *words, without=("GIT_",))
