"""The documentation builds as a site (`.[dev]` brings what that needs), and the notebooks run (`.[thorough]`)."""

import json
import os
import re
import subprocess
import sys

import pytest

from .pages import DOCS, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material comes with the extra dev")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # a broken link or anchor, a page without a place
    return folder


@pytest.mark.processes
def test_every_page_notebook_and_card_is_in_the_site(site):
    names = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in DOCS]
    names += [f"notebooks/{notebook.stem}.html" for notebook in NOTEBOOKS]
    names += [f"model_cards/{card.parent.name}.html" for card in (ROOT / "model_cards").glob("*/README.md")]
    assert len(names) > 25
    assert not [name for name in names if not (site / name).is_file()]


@pytest.mark.processes
def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    loaded = {
        link
        for page in pages
        for link in re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)",
            page.read_text(encoding="utf-8"),
        )
    }
    assert len(pages) > 25 and not loaded


@pytest.mark.processes
def test_tables_lists_and_reference_are_rendered(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "<table>" in home and 'href="model_cards/bbc-news.html"' in home
    attention = (site / "attention.html").read_text(encoding="utf-8")
    assert "| ---" not in attention and "<!-- measured" in attention
    api = (site / "api.html").read_text(encoding="utf-8")
    assert "temperature_final" in api
    assert api.count("Parameters:") > 15 and ":::" not in api


def _kernels():
    """The one kernel that is this Python; those that the user has registered are not looked at."""
    from jupyter_client.kernelspec import KernelSpecManager

    manager = KernelSpecManager(kernel_dirs=[])
    assert manager.get_kernel_spec("python3").argv[0] == sys.executable
    return manager


@pytest.mark.thorough
@pytest.mark.processes
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the extra thorough")
    import nbformat
    from jupyter_client import AsyncKernelManager

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=_kernels())
    nbclient.NotebookClient(
        notebook, km=manager, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), "a plot was drawn"
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_a_run_leaves(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (path.parent / link).exists()]
