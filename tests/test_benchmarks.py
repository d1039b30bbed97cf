"""The benchmark programs run, and the peers that they compare with do the work that is said of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention_methods import CAUSAL, CONFIGS, DIM, HEADS, PEERS, installed, make_method, our_names

from .helpers import assert_close

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name in PEERS if name != "flex_window"])  # needs a compiler
def test_a_peer_does_the_same_work(name):
    peer = PEERS[name]
    if not installed(name):
        pytest.skip(f"needs {peer.package}")
    assert peer.of.removesuffix(CAUSAL) in CONFIGS
    inputs = torch.randn(3, 1, HEADS, 512, DIM)
    method = make_method(name, 512)
    leaves = [tensor.detach().requires_grad_() for tensor in method.lay_out(*inputs)]
    out = method.call(*leaves)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert method.read(out).shape == inputs[0].shape
    if peer.exact:
        assert_close(method.read(out), make_method(peer.of, 512).call(*inputs), 1e-5)


def test_our_methods_take_the_inputs_of_dense_attention():
    inputs = torch.randn(3, 1, HEADS, 128, DIM)
    for name in our_names():
        out = make_method(name, 128).call(*inputs)
        assert out.shape == inputs[0].shape and out.isfinite().all(), name


@pytest.mark.processes
def test_attention_benchmark_runs_and_resumes(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks/attention.py"), "--repeats", "1", "--output", str(output)]

    def run(*arguments: str) -> dict:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "faster from" in done.stdout
        return {
            (cell["method"], cell["mode"], cell["length"]): cell for cell in json.loads(output.read_text())["cells"]
        }

    first = run("--kinds", "local", "--lengths", "64", "128", "--memory-lengths", "128")
    assert {key for key in first if key[0] == "local"} == {
        ("local", mode, length) for mode in ("forward", "forward+backward") for length in (64, 128)
    }
    assert first["local", "forward", 128]["speedup_over_dense"] > 0
    assert first["local", "forward+backward", 128]["peak_bytes"] > 0
    second = run("--kinds", "local", "linear", "--lengths", "128", "--resume", "--skip-memory")
    assert second["local", "forward", 128] == first["local", "forward", 128]  # kept, not measured again
    assert ("linear", "forward", 128) in second and ("linear", "forward", 64) not in second


@pytest.mark.processes
def test_quality_benchmark_runs_and_resumes(tmp_path):
    output = tmp_path / "quality.json"
    steps = ["--teacher-steps", "1", "--steps", "1", "--transfer-steps", "1"]
    files = ["--work", str(tmp_path / "work"), "--output", str(output)]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benchmarks/quality.py"), "--jobs", "language", "--threads", "1"]
        return subprocess.run([*command, *steps, *files, *arguments], capture_output=True, text=True, check=False)

    def cells() -> dict:
        return {(cell["kind"], cell["stage"]): cell for cell in json.loads(output.read_text())["cells"]}

    done = run("--kinds", "local", "hedgehog", "--limit", "30")
    assert done.returncode == 0, done.stderr
    assert "Need training after conversion: hedgehog. Usable as converted" in done.stdout
    first = cells()
    stages = ("converted", "transferred", "distilled")
    assert set(first) == {("local", "converted"), ("local", "distilled"), *(("hedgehog", stage) for stage in stages)}
    assert all(cell["score"] == "perplexity" and cell["standard_error"] > 0 for cell in first.values())
    assert run("--kinds", "local", "dense", "--limit", "30").returncode == 0
    second = cells()
    assert all(second[key] == cell for key, cell in first.items())  # kept, not measured again
    assert second["dense", "converted"]["difference_from_teacher"] == 0
    refused = run("--kinds", "local", "--limit", "40")
    assert refused.returncode != 0 and "other settings" in refused.stderr
