"""Tiny models pruned by the processes of a group: what each of them gets, for test_ranks.

python -m tests.pruning.ranks_driver folder
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from hf_efficient import HfEfficientError, PruningConfig, plan, prune
from hf_efficient.training import ranks
from hf_efficient.training.ranks import leave_processes

from .tiny import batch, batches, make

# Family, batches, config. Seven batches for two processes: their shares differ.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fisher": ("bert", 7, {"importance": "fisher"}),
    "taylor": ("bert", 7, {"importance": "taylor", "allocation": "uniform"}),
    "activation": ("llama", 7, {"importance": "activation"}),
    "obs": ("llama", 7, {"importance": "obs", "allocation": "uniform"}),
    "rearrange": ("vit", 7, {"importance": "fisher", "rearrange": True}),
    "steps": ("t5", 5, {"importance": "fisher", "steps": 2}),
    "loss": ("llama", 7, {"granularity": ("layer", "neuron"), "layer_importance": "loss"}),
    "influence": ("bert", 7, {"granularity": ("layer",), "layer_importance": "block_influence"}),
    "weights": ("bert", 7, {"granularity": ("weight",), "importance": "obs", "allocation": "uniform"}),
    "weights-taylor": ("bert", 7, {"granularity": ("weight",), "importance": "taylor", "reconstruct": False}),
    "one-batch": ("bert", 1, {"importance": "fisher"}),
}


def outcomes() -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """The plan and the weights of each case."""
    plans, weights = {}, {}
    for name, (family, count, changes) in CASES.items():
        model, config = make(family), PruningConfig(ratio=0.4, **changes)
        if "weight" not in config.granularity:
            chosen = plan(model, config, batches(family, count))
            plans[name] = {"layers": chosen.layers, "units": chosen.units}
        small = prune(model, config, batches(family, count))
        weights |= {f"{name}/{key}": value.clone() for key, value in small.state_dict().items()}
    return json.loads(json.dumps(plans)), weights


def faults(rank: int) -> dict[str, str]:
    """What a process is told where one of them cannot go on; a further call then works."""
    model, config = make("bert"), PruningConfig(ratio=0.4)
    broken = batch("bert") | {"input_ids": torch.full((3, 9), 1000)}

    def full_disk() -> None:
        with ranks.together("a test"):
            if rank == 1:
                raise OSError(28, "No space left on device")
            ranks.from_main(lambda: 1)

    return {
        "data": told(lambda: prune(model, config, [batch("bert"), broken] if rank else batches("bert"))),
        "other": told(lambda: prune(model, config, [batch("bert", seed=rank)])),
        "disk": told(full_disk),
        "after": told(lambda: prune(model, config, batches("bert"))),
    }


def told(work: Callable[[], Any]) -> str:
    try:
        work()
    except (HfEfficientError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: str) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    plans, weights = outcomes()
    rank = int(os.environ["RANK"])
    answer = {"processes": state.num_processes, "plans": plans, "faults": faults(rank)}
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    save_file(weights, Path(folder, f"{rank}.safetensors"))
    leave_processes(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
