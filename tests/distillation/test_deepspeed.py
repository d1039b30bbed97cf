"""DeepSpeed ZeRO-2 on two CPU processes: the step of DDP. Skipped where DeepSpeed is not installed."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CASES = ("bert", "llama")
DRIVER = ("-m", "tests.distillation.deepspeed_driver")


def launch(tmp_path, name, *launcher, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "--main_process_port" if "accelerate" in launcher[0] else "--master_port"]
        + [port, *DRIVER, str(out), *CASES],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.processes
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed and a compiler")
def test_a_step_of_zero_2_is_the_step_of_ddp(tmp_path):
    config = yaml.safe_load((ROOT / "examples/accelerate/deepspeed_zero2.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(config))
    cpu = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    launcher = ("accelerate.commands.launch", "--config_file", str(tmp_path / "zero2.yaml"))
    reports = launch(tmp_path, "zero", *launcher, **cpu)
    plain = launch(tmp_path, "ddp", "torch.distributed.run", "--nproc_per_node", "2")
    for case in CASES:
        sharded, expected = reports[case], plain[case]
        assert (sharded["engine"], sharded["stage"]) == ("DeepSpeedEngine", 2)
        assert sharded["processes"] == expected["processes"] == 2
        assert expected["engine"] == "DistributedDataParallel"
        assert sharded["log"] == pytest.approx(expected["log"], rel=1e-6)
        assert sharded["found"] == pytest.approx(expected["found"], rel=1e-6)
        assert sharded["weights"].keys() == expected["weights"].keys()  # no projection in the saved model
        for name, weights in expected["weights"].items():
            assert sharded["weights"][name] == pytest.approx(weights, rel=1e-5, abs=1e-6), name
