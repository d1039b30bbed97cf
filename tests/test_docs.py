"""Every Python block of README and docs runs, in the order in which it stands, page by page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def _blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


@pytest.mark.processes
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _blocks(page)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_between_pages_lead_somewhere():
    missing = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing


def test_named_files_and_commands_exist():
    from hf_efficient.recipe import shipped_recipes

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in re.findall(r"\b(?:scripts|benchmarks|tests|hf_efficient)/[\w/]+\.(?:py|json)\b", text):
        assert (ROOT / path).exists(), path
    named = re.findall(r"hf-efficient compress ([a-z][\w.-]*)", text)
    assert named and all(name in shipped_recipes() or name.endswith(".yaml") for name in named)
