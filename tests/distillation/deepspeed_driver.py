"""One optimizer step on two processes, by DDP or by the engine that accelerate was launched with, in float32.

accelerate launch --config_file zero2.yaml -m tests.distillation.deepspeed_driver out.json case ...
torchrun --nproc_per_node 2 -m tests.distillation.deepspeed_driver out.json case ...      # DDP
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.training.ranks import leave_processes

from .tiny import arguments, collate, examples, make_pair

LOSSES = {"ce": 1.0, "kd": 1.0, "hidden": 1.0, "relation": 1.0}


def step(case: str) -> dict[str, Any]:
    student, teacher = (model.float() for model in make_pair(case))
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    where = {"use_cpu": False, "ddp_backend": "gloo"} if uses_deepspeed else {}
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            arguments(folder, losses=LOSSES, **split, **where),
            teacher=teacher,
            train_dataset=examples(case),
            eval_dataset=examples(case, 11, seed=1),
            data_collator=collate,
        )
        trainer.train()
        found = trainer.evaluate()
        trainer.save_model(f"{folder}/model")
        saved = load_file(f"{folder}/model/model.safetensors") if trainer.is_world_process_zero() else {}
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {
        "processes": trainer.accelerator.num_processes,
        "engine": type(trainer.model_wrapped).__name__,
        "stage": trainer.model_wrapped.zero_optimization_stage() if uses_deepspeed else 0,
        "log": {name: value for name, value in log.items() if "loss" in name or name == "grad_norm"},
        "found": {name: value for name, value in found.items() if "loss" in name or "agreement" in name},
        "weights": {name: tensor.double().flatten().tolist() for name, tensor in saved.items()},
    }


def main(out: str, *cases: str) -> None:
    torch.set_num_threads(1)
    reports = {case: step(case) for case in cases}
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(reports))
    leave_processes(PartialState())


if __name__ == "__main__":
    main(*sys.argv[1:])
