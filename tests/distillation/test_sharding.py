"""FSDP2 on two CPU processes: student and teacher sharded, the same step as DDP, a whole model saved."""

import json

import pytest

from ..processes import launch

RUNS = ("llama-ce+kd+hidden+relation", "bert-ce+kd+hidden+attention_output")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp") / "reports.json"
    launch("tests.distillation.fsdp_driver", out, *RUNS, ACCELERATE_USE_CPU="1")
    return json.loads(out.read_text())


@pytest.mark.processes
@pytest.mark.parametrize("run", RUNS)
def test_a_sharded_step_is_the_step_of_ddp(reports, run):
    plain, sharded = reports[f"{run}/ddp"], reports[f"{run}/fsdp"]
    assert plain["processes"] == sharded["processes"] == 2
    assert plain["sharded"] == [False, False]
    assert sharded["sharded"] == [True, True]
    assert sharded["log"] == pytest.approx(plain["log"], rel=1e-5)
    assert sharded["found"] == pytest.approx(plain["found"], rel=1e-5)
    assert sharded["unexpected"] == [[], []]  # no projection in the saved model
    assert sharded["weights"] == pytest.approx(plain["weights"], rel=1e-4, abs=1e-6)
