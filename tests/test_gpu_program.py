"""`make gpu` without a GPU: it says so; each part has its limit and its state; on a CPU all parts run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "scripts" / "gpu.py"


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("gpu_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(program, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    return ended.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--output", tmp_path / "gpu.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not (tmp_path / "gpu.json").exists()
    assert "finds no CUDA device" in done.stderr and "--device cpu" in done.stderr


def test_a_part_that_fails_or_hangs_keeps_no_other_from_running(program, monkeypatch, tmp_path, capsys):
    codes = {
        "machine": "import json, sys; json.dump({'gpu': 'none'}, open(sys.argv[1], 'w'))",
        "kinds": "print('what went wrong'); raise SystemExit(1)",
        "speed": "import subprocess, sys, time; print('begun', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)",
        "decode": "print('fine')",
    }
    monkeypatch.setattr(program, "command", lambda part, _, answer: [sys.executable, "-c", codes[part], str(answer)])
    monkeypatch.setitem(program.LIMITS, "speed", 2)
    output = tmp_path / "new" / "gpu.json"
    code = call(program, monkeypatch, "--device", "cpu", "--output", output, "--parts", "kinds", "speed", "decode")
    parts = json.loads(output.read_text())["parts"]
    states = {name: part["state"] for name, part in parts.items()}
    assert code == 1
    assert states == {"machine": "passed", "kinds": "failed", "speed": "cut off", "decode": "passed"}
    assert parts["machine"]["gpu"] == "none" and "what went wrong" in parts["kinds"]["output"]
    assert "begun" in parts["speed"]["output"] and "output" not in parts["decode"]
    assert "what went wrong" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_not_begun(program, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "command", lambda *_: pytest.fail("begun"))
    output = tmp_path / "gpu.json"
    assert call(program, monkeypatch, "--device", "cpu", "--output", output, "--total", 1) == 1
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == list(program.LIMITS) and {part["state"] for part in parts.values()} == {"no time left"}


def test_tests_that_are_all_skipped_have_not_passed_on_a_gpu(program, monkeypatch):
    monkeypatch.setattr(program, "command", lambda *_: [sys.executable, "-c", "print('3 skipped in 1s')"])
    assert program.run("tests", "cuda", 60)["state"] == "failed"
    assert program.run("tests", "cpu", 60)["state"] == "passed"


HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        hidden = name.partition(".")[0] in ("hypothesis", "datasets", "evaluate", "sklearn", "torchao")
        return None if hidden else self.finder.find_spec(name, *where)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_the_tests_for_a_gpu_need_nothing_but_pytest(program):
    files, words = program.gpu_tests(), program.command("tests", "cuda", Path())[3:]
    assert any("test_flex" in name for name in files) and any("test_fla" in name for name in files)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", HIDING, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " skipped" in done.stdout or " passed" in done.stdout


def test_make_uses_the_interpreter_that_it_is_given():
    def plan(*words):
        command = ["make", "--no-print-directory", "-n", "gpu", *words]
        # What an outer make hands down names its own options.
        environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    given = plan("PYTHON=/opt/bin/python", "GPU_OUT=here.json")
    assert given.strip().endswith("/opt/bin/python scripts/gpu.py --output here.json") and "venv" not in given
    assert ".other/bin/python scripts/gpu.py --output out/gpu.json" in plan("VENV=.other")


@pytest.mark.thorough
@pytest.mark.processes
def test_on_a_cpu_every_part_runs(tmp_path):
    output = tmp_path / "cpu.json"
    command = [sys.executable, PROGRAM, "--device", "cpu", "--output", output, "--total", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = json.loads(output.read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items() if part["state"] != "passed"} == {}, done.stdout
    assert done.returncode == 0 and {cell["kind"] for cell in parts["kinds"]["cells"]} >= {"local", "linear", "topk"}
    assert parts["decode"]["cells"][0]["cache_bytes"] > 0 and parts["speed"]["cells"][0]["both_ms"] > 0
