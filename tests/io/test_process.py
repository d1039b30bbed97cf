"""Programs that we start: isolated from the current folder, the same package, and never waited for without end."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_efficient
from hf_efficient import CheckpointError
from hf_efficient.io import process
from hf_efficient.io.environment import package_commit
from hf_efficient.io.process import program_output, run_module, run_together
from hf_efficient.pipeline.verify import check_reload

PACKAGE = Path(hf_efficient.__file__).parent


@pytest.mark.parametrize("name", ["json", "runpy", "os", "typer", "importlib"])
@pytest.mark.parametrize("spelled", ["", ".", "whole"])
def test_the_current_folder_is_not_searched(name, spelled, tmp_path, monkeypatch):
    """As a file and as a folder; also where this process itself searches there."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nraise SystemExit('a module of the current folder')\n"
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "hf_efficient").mkdir()
    (tmp_path / "hf_efficient/__init__.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if spelled == "whole" else spelled, *sys.path])
    monkeypatch.setenv("PYTHONPATH", spelled and ".")
    done = run_module("hf_efficient.cli", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hf_efficient.__version__ and not mark.exists()


@pytest.fixture
def copied(tmp_path):
    """The package a second time, of another version."""
    package = tmp_path / "elsewhere/hf_efficient"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "version.py").write_text("__version__ = '9.9.9'\n")
    return package


@pytest.mark.processes
def test_the_child_has_the_package_of_its_parent(copied, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(copied.parent)!r})\n"
        "from hf_efficient.io.process import run_module\n"
        "print(run_module('hf_efficient.cli', '--version').stdout)"
    )
    for here in (tmp_path, copied.parent):  # also where the package lies in the current folder
        done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
        assert done.stdout.split() == ["9.9.9"], done.stderr
    assert run_module("hf_efficient.cli", "--version").stdout.strip() == hf_efficient.__version__ != "9.9.9"


@pytest.mark.processes
def test_arguments_arrive_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_module("hf_efficient.cli", "list", "a b\nc", "--json")
    assert done.returncode == 1 and "a b" in done.stderr
    assert run_module("hf_efficient.cli", "list", "tasks").stdout.startswith("tasks: ")


def test_a_child_that_hangs_is_given_up(tmp_path):
    with pytest.raises(TimeoutError, match=r"hf_efficient\.cli took longer than"):
        run_module("hf_efficient.cli", "--version", timeout=1e-3)
    with pytest.raises(CheckpointError, match=r"within 0\.001 s.*command again"):
        check_reload(tmp_path, "AutoModel", "0" * 64, limit=1e-3)


MEMBER = """
import os, signal, sys, time
rank, end = os.environ["RANK"], sys.argv[1]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
open(os.path.join(sys.argv[2], rank), "w").write(" ".join(os.environ[name] for name in names))
if end == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600 if end == "kill" else 0)
sys.exit(3 if end == "fail" and rank == "1" else 0)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("end", "code"), [("well", 0), ("fail", 3), ("kill", 137)])
def test_processes_of_a_group_end_together(end, code, tmp_path, monkeypatch):
    (tmp_path / "hf_member.py").write_text(MEMBER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process, "GRACE", 0.1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run_together(2, "hf_member", end, str(tmp_path)) == code
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [words[:3] for words in told] == [["0", "0", "2"], ["1", "1", "2"]]
    assert told[0][3:] == told[1][3:] and told[0][4] == "passive" and int(told[0][5]) >= 1


def _repository(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_package_also_in_a_hook_of_another_repository(tmp_path, monkeypatch):
    (tmp_path / "checkout/hf_efficient").mkdir(parents=True)
    (tmp_path / "checkout/hf_efficient/version.py").write_text("__version__ = '1'\n")
    own = _repository(tmp_path / "checkout")
    other = _repository(tmp_path / "other", name="other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert package_commit(tmp_path / "checkout/hf_efficient") == own != other


def test_git_runs_no_program_of_the_checkout(tmp_path):
    (tmp_path / "hf_efficient").mkdir()
    (tmp_path / "hf_efficient/version.py").write_text("__version__ = '1'\n")
    own = _repository(tmp_path)
    program = tmp_path / ".git/watch"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    subprocess.run(["git", "-C", str(tmp_path), "config", "core.fsmonitor", str(program)], check=True)
    assert package_commit(tmp_path / "hf_efficient") == own and not (tmp_path / "ran").exists()
    subprocess.run(["git", "-C", str(tmp_path), "status"], check=True, capture_output=True)
    assert (tmp_path / "ran").exists()  # plain git would have run it


def test_what_a_program_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EFFICIENT_TEST", "1")
    print_it = (sys.executable, "-c", "import os; print(os.environ.get('HF_EFFICIENT_TEST'))")
    assert program_output(*print_it) == "1" and program_output(*print_it, without=("HF_EFF",)) == "None"
    assert program_output("no-such-program-anywhere") is None
    assert program_output(sys.executable, "-c", "raise SystemExit(3)") is None
    assert program_output(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.01) is None
