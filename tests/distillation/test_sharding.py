"""FSDP2 on two CPU processes: student and teacher sharded, the same step as DDP, a whole model saved."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ("llama-ce+kd+hidden+relation", "bert-ce+kd+hidden+attention_output")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("fsdp") / "reports.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*launcher, "-m", "tests.distillation.fsdp_driver", str(out), *RUNS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
