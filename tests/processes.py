"""Checkpoints for `tests.fresh`, and its answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .families import CASES, make_inputs

ROOT = Path(__file__).parents[1]


def save_with_expectation(model: PreTrainedModel, name: str, folder: Path) -> None:
    """A checkpoint with what `tests.fresh` needs to load and judge it."""
    path, inputs = folder / name, make_inputs(name)
    model.save_pretrained(path)
    with torch.no_grad():
        save_file(inputs | {"expected": model(**inputs)[0].contiguous()}, path / "expected.safetensors")
    (path / "auto.txt").write_text(CASES[name].auto)


def run_fresh(folder: Path, *scenarios: str, home: Path) -> dict[str, dict]:
    """The answer of each scenario; `home` keeps transformers' copies of loader files away from the user's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fresh", str(folder), *scenarios],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    return json.loads(last[last.index('{"') :])  # transformers' question about trust ends without a line break
