"""Two processes prune as one does: the same plan, the same weights; and what stops one of them stops both."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ..processes import launch
from . import ranks_driver

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def single():
    return ranks_driver.outcomes()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch("tests.pruning.ranks_driver", folder)
    return [
        (json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"))
        for rank in range(2)
    ]


@pytest.mark.parametrize("case", ranks_driver.CASES)
def test_two_processes_give_what_one_does(single, both, case):
    plans, weights = single
    expected = {key: value for key, value in weights.items() if key.startswith(f"{case}/")}
    rounding = 1e-3 if case == "weights" else 1e-5  # SparseGPT sums in float32, and inverts
    for answer, found in both:
        assert answer["processes"] == 2
        assert answer["plans"].get(case) == plans.get(case)
        for key, value in expected.items():
            assert torch.equal(found[key] == 0, value == 0), key
            assert torch.allclose(found[key], value, rtol=rounding, atol=rounding / 10), key
    first, second = (weights for _, weights in both)
    assert all(torch.equal(first[key], second[key]) for key in expected)


def test_what_stops_one_process_stops_both_with_its_reason(both):
    main, second = (answer["faults"] for answer, _ in both)
    assert main["data"].startswith("DataError: Process 1 of 2 failed: Calibration batch 1")
    assert second["data"].startswith("DataError: Calibration batch 1")
    for faults in (main, second):
        assert "another calibration than process 0" in faults["other"]
        assert faults["after"] == "nothing"
    assert main["disk"] == "HfEfficientError: Process 1 of 2 failed: OSError: [Errno 28] No space left on device"
    assert second["disk"] == "OSError: [Errno 28] No space left on device"
