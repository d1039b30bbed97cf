"""A model of 6 GB is pruned by a process that may allocate 3 GiB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "pruning_folder.py"


def pruned(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "numbers.json"
    command = [sys.executable, str(BENCHMARK), "--work", str(tmp_path / "work"), "--output", str(output), *words]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(BENCHMARK.parents[1])})
    [run] = json.loads(output.read_text())["runs"]
    return run


@pytest.mark.thorough
def test_a_model_of_three_billion_parameters_under_three_gibibytes(tmp_path):
    """Minutes on two quiet cores, and 12 GB of disk."""
    numbers = pruned(tmp_path, "--size", "3b", "--limit", "3")
    assert numbers["parameters"] > 2.9e9 and numbers["weight_bytes"] > 1.9 * numbers["limit_bytes"] * 0.95
    assert numbers["parameters_after"] < 0.8 * numbers["parameters"]
    assert numbers["peak_bytes"] < numbers["limit_bytes"]
    assert numbers["predicted_bytes"] == pytest.approx(numbers["peak_bytes"], rel=0.35)


@pytest.mark.thorough
def test_the_benchmark_runs(tmp_path):
    numbers = pruned(tmp_path, "--size", "tiny", "--limit", "2")
    assert numbers["parameters_after"] < numbers["parameters"] and numbers["peak_bytes"] > numbers["weight_bytes"]
