"""The gradient of one optimizer step must not depend on how its 16 examples are split.

The reference is one batch of 16 in one process; the others are 4 x 2 accumulated on each of 2 processes and, with
`--thorough`, also 4 x 4 accumulated and 8 on each of 2 processes, and every architecture with every loss. Everything
is in float64, so what remains is the order of additions.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..helpers import selected
from ..processes import launch
from . import split_driver

SOME = [name for name, *_ in split_driver.runs_of("some")]
NAMES = selected([(name,) for name, *_ in split_driver.RUNS], lambda name: name in SOME)
SPLITS = {"4x4": 1, "4x2": 2, "8x1": 2}  # batch size x accumulation: processes
CHOSEN = selected([(split,) for split in SPLITS], lambda split: split == "4x2")
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def which(pytestconfig):
    return "all" if pytestconfig.getoption("--thorough") else "some"


@pytest.fixture(scope="module")
def reference(which):
    return split_driver.run("16x1", which)


@pytest.fixture(scope="module")
def others(tmp_path_factory, which):
    """The same cases under all other splits; the two-process ones in one launch."""
    splits = ["4x2", "8x1"] if which == "all" else ["4x2"]
    out = tmp_path_factory.mktemp("splits") / "two"
    launch("tests.distillation.split_driver", out, which, *splits)
    reports, tensors = split_driver.run("4x4", which) if which == "all" else ({}, {})
    reports |= json.loads(Path(f"{out}.json").read_text())
    tensors |= load_file(f"{out}.safetensors")
    return reports, tensors


@pytest.mark.processes
@pytest.mark.parametrize(("name",), NAMES)
@pytest.mark.parametrize(("split",), CHOSEN)
def test_the_step_does_not_depend_on_the_split(reference, others, split, name):
    key, expected_key = f"{split}/{name}", f"16x1/{name}"
    report, expected = others[0][key], reference[0][expected_key]
    assert report["processes"] == SPLITS[split]
    assert report["rank_difference"] == 0
    assert report["log"] == pytest.approx(expected["log"], rel=1e-6)  # the Trainer logs in float32
    assert report["before"] == pytest.approx(expected["before"], rel=TOLERANCE)
    assert report["after"] == pytest.approx(expected["after"], rel=TOLERANCE)
    weights, expected_weights = others[1][f"{key}.weights"], reference[1][f"{expected_key}.weights"]
    update = (expected_weights - reference[1][f"{expected_key}.start"]).norm()
    assert update > 0
    assert (weights - expected_weights).norm() <= TOLERANCE * update


@pytest.mark.parametrize(("name",), NAMES)
def test_the_gradient_is_that_of_the_mean_loss(reference, name):
    """SGD with learning rate 0.1 moves by 0.1 x the gradient whose norm was logged."""
    _, tensors = reference
    moved = (tensors[f"16x1/{name}.weights"] - tensors[f"16x1/{name}.start"]).norm().item()
    assert moved == pytest.approx(0.1 * reference[0][f"16x1/{name}"]["log"]["grad_norm"], rel=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case",), selected([(case,) for case in split_driver.STOCK], lambda case: case in split_driver.STOCK_SOME)
)
@pytest.mark.parametrize(("split",), CHOSEN)
def test_the_stock_trainer_depends_on_it(reference, others, split, case):
    """Why the trainer counts for itself: most heads get a gradient that is accumulated batches x processes times too
    large. Where labels are tokens the micro-batches differ in length too, so that the factor is only about that."""
    accumulation = int(split.split("x")[1])
    factor = accumulation * SPLITS[split] if case not in ("llama", "vit") else 1
    ratio = others[0][f"{split}/stock-{case}"]["grad_norm"] / reference[0][f"16x1/stock-{case}"]["grad_norm"]
    assert ratio == pytest.approx(factor, rel=1e-4 if case in ("bert", "llama", "vit") else 0.15)
