"""One PruningCallback run, on one or two processes.

torchrun --nproc_per_node 2 -m tests.pruning.callback_driver out
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from hf_efficient.training.ranks import leave_processes

from .training import count, make_trainer, pruning

CASES: dict[str, dict] = {
    "bert": {},
    "llama": {},
    "bert movement": {"importance": "movement"},
    "bert weight": {"granularity": "weight", "importance": "movement"},
    "bert 2:4": {"granularity": "weight", "mask_structure": "2:4"},
}


def run(name: str, batch_size: int) -> tuple[dict, dict[str, torch.Tensor]]:
    case, callback = name.split()[0], pruning(**CASES[name])
    with tempfile.TemporaryDirectory() as folder:
        # AdamW would make large steps of rounding errors, where a gradient is next to nothing.
        plain = {"optim": "sgd", "per_device_train_batch_size": batch_size}
        trainer = make_trainer(case, folder, [callback], **plain)
        dense = count(trainer.model)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    removed = torch.cat([mask.flatten() for mask in callback.removal.removed.values()]).to(torch.int64)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    masks = trainer.accelerator.gather(removed[None])
    sizes = trainer.accelerator.gather(torch.tensor([[count(trainer.model)]]))
    everywhere = trainer.accelerator.gather(weights[None]) if len(set(sizes.flatten().tolist())) == 1 else None
    report = {
        "processes": trainer.accelerator.num_processes,
        "dense": dense,
        "sizes": sizes.flatten().tolist(),
        "removed": masks.sum(1).tolist(),
        "same_masks": bool((masks == masks[0]).all()),
        "same_weights": everywhere is not None and bool((everywhere == everywhere[0]).all()),
        "loss": loss,
    }
    return report, {"removed": removed, "weights": weights}


def main(out: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    reports, tensors = {}, {}
    for case in CASES:
        reports[case], found = run(case, batch_size=2)
        tensors |= {f"{case}.{name}": value for name, value in found.items()}
    if int(os.environ.get("RANK", 0)) == 0:
        Path(f"{out}.json").write_text(json.dumps(reports))
        save_file(tensors, f"{out}.safetensors")
    leave_processes(PartialState())


if __name__ == "__main__":
    main(*sys.argv[1:])
