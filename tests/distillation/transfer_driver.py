"""One step of attention transfer on 16 texts, on any number of processes; rank 0 writes the learned parts.

torchrun --nproc_per_node 2 -m tests.distillation.transfer_driver out.safetensors 8
"""

import os
import sys
import tempfile

import torch
from safetensors.torch import save_file

from hf_efficient.attention.config import KINDS, Kind
from hf_efficient.training.ranks import leave_processes

from .sharpened import KIND, Sharpened, converted, learned, make_trainer


def main(out: str, batch_size: str) -> None:
    torch.set_num_threads(1)
    KINDS[KIND] = Kind((), Sharpened)
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 1e9}
    with tempfile.TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": int(batch_size)}
        trainer = make_trainer("bert", folder, converted(), **settings, **batch)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    weights = torch.cat([value.flatten() for value in learned(trainer.model).values()])
    everywhere = trainer.accelerator.gather(weights[None])
    if int(os.environ.get("RANK", 0)) == 0:
        losses = torch.tensor([before, after], dtype=torch.float64)
        save_file({"weights": weights, "losses": losses, "ranks": everywhere.contiguous()}, out)
    leave_processes(trainer.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
