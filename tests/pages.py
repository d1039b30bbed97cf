"""README and docs/ as tests see them: pages, and the blocks of code in them."""

import multiprocessing
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]

# What nearly every page imports: one process loads it, and each page runs in a fork of that.
PRELOADED = [
    "torch",
    "transformers.trainer",
    "datasets",
    "hf_efficient.distillation.trainer",
    "hf_efficient.pipeline.compress",
]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of that language, without the indentation of a list in which they stand."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text(page), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def run_code(code: str, folder: Path) -> tuple[int | None, str]:
    """Run it as a program of its own, in `folder`; gives the exit code, and what it printed to stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(code, str(folder)))
    process.start()
    process.join()
    return process.exitcode, (folder / "stderr.txt").read_text(encoding="utf-8")


def _run(code: str, folder: str) -> None:
    os.chdir(folder)
    errors = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main = sys.modules["__main__"]
    exec(compile(code, "page", "exec"), vars(main) | {"__name__": "__main__"})
