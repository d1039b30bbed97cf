"""Every Python block of README and docs runs, page by page in the order in which it stands; what is named exists."""

import inspect
import re

import pytest

import hf_efficient

from .pages import PAGES, ROOT, blocks, text
from .processes import python

WITH_CODE = [page for page in PAGES if blocks(page, "python")]


SHORTER = {  # page -> what stands there, and what is run instead but with --thorough
    "README": ("sequence_length=512", "sequence_length=64"),
    "deploy": ("num_hidden_layers=2", "num_hidden_layers=1"),
}


@pytest.mark.processes
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, pytestconfig):
    code = "\n".join(blocks(page, "python"))
    if page.stem in SHORTER and not pytestconfig.getoption("--thorough"):
        long, short = SHORTER[page.stem]
        assert long in code
        code = code.replace(long, short)
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.processes
def test_code_that_fails_is_noticed(tmp_path):
    done = python("-c", "import hf_efficient\nhf_efficient.prune_everything\n", cwd=tmp_path)
    assert done.returncode == 1 and "no attribute 'prune_everything'" in done.stderr


def test_links_between_pages_lead_somewhere():
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page)):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing


def test_named_files_exist():
    named = {
        path
        for page in PAGES
        for path in re.findall(
            r"\b(?:scripts|benchmarks|tests|hf_efficient|examples)/[\w/]+\.(?:py|json|yaml)\b", text(page)
        )
    }
    assert len(named) > 20
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_the_api_page_has_every_public_name_once():
    listed = re.findall(r"^::: (\S+)$", text(ROOT / "docs" / "api.md"), re.MULTILINE)
    modules = {name: getattr(hf_efficient, name).__module__ for name in hf_efficient.__all__ if name[0] != "_"}
    assert sorted(listed) == sorted(f"{module}.{name}" for name, module in modules.items())


@pytest.mark.parametrize("name", [name for name in hf_efficient.__all__ if name[0] != "_"])
def test_documented_parameters_are_those_of_the_signature(name):
    public = getattr(hf_efficient, name)
    documented = _documented(inspect.getdoc(public))
    if documented:
        assert documented <= set(inspect.signature(public).parameters)


def _documented(docstring: str) -> set[str]:
    """The names under `Parameters:`; several may share a line."""
    section = re.search(r"^Parameters:\n((?:(?: .*)?\n)+)", docstring + "\n", re.MULTILINE)
    lines = re.findall(r"^ {4}(\**\w+(?:, \**\w+)*): ", section[1], re.MULTILINE) if section else []
    return {name.strip("*") for line in lines for name in line.split(", ")}


def test_parameters_are_found_in_a_docstring():
    assert _documented("What.\n\nParameters:\n    a, b: both.\n        more: of them\n    **c: rest.\n") == {
        "a",
        "b",
        "c",
    }
    assert not _documented("What.\n\nRaises:\n    ConfigError: no.\n")
