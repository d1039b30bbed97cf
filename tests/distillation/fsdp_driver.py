"""One optimizer step on two processes, by DDP and by FSDP2, on CPUs.

    torchrun --nproc_per_node 2 -m tests.distillation.fsdp_driver out.json case-loss+loss ...

accelerate makes FSDP of several GPUs only; told that these processes are such, it shards on a CPU as well.
"""

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.training.ranks import leave_processes

from .tiny import arguments, collate, examples, make_pair

FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}


LAYERS = {"bert": ["BertLayer"]}


def is_sharded_out(model: torch.nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def step(case: str, losses: dict[str, float], *, is_sharded: bool) -> dict[str, Any]:
    student, teacher = (model.float() for model in make_pair(case))
    AcceleratorState._reset_state(reset_partial_state=False)
    kind = DistributedType.MULTI_GPU if is_sharded else DistributedType.MULTI_CPU
    with tempfile.TemporaryDirectory() as folder:
        config = FSDP | {"cpu_ram_efficient_loading": False, "transformer_layer_cls_to_wrap": LAYERS.get(case)}
        more = {"fsdp": True, "fsdp_config": config} if is_sharded else {}
        args = arguments(folder, losses=losses, per_device_train_batch_size=4, gradient_accumulation_steps=2, **more)
        PartialState._shared_state["distributed_type"] = kind
        trainer = DistillationTrainer(
            student,
            args,
            teacher=copy.deepcopy(teacher),
            train_dataset=examples(case),
            eval_dataset=examples(case, 11, seed=1),
            data_collator=collate,
        )
        trainer.train()
        found = trainer.evaluate()
        trainer.save_model(f"{folder}/model")
        trainer.accelerator.wait_for_everyone()
        shared = [f"{folder}/model"]
        torch.distributed.broadcast_object_list(shared)  # rank 0 has written it, into a folder of its own
        saved = type(student).from_pretrained(shared[0], output_loading_info=True)
        torch.distributed.barrier()
    weights = torch.cat([p.detach().flatten() for p in saved[0].parameters()])
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {
        "processes": trainer.accelerator.num_processes,
        "sharded": [is_sharded_out(model) for model in (trainer.model_wrapped, trainer.teacher)],
        "log": {name: value for name, value in log.items() if "loss" in name or name == "grad_norm"},
        "found": {name: value for name, value in found.items() if "loss" in name or "agreement" in name},
        "unexpected": [sorted(saved[1][kind]) for kind in ("missing_keys", "unexpected_keys")],
        "weights": weights.double().tolist(),
    }


def main(out: str, *runs: str) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    reports = {}
    for run in runs:
        case, names = run.split("-")
        for is_sharded in (False, True):
            losses = dict.fromkeys(names.split("+"), 1.0)
            reports[f"{run}/{'fsdp' if is_sharded else 'ddp'}"] = step(case, losses, is_sharded=is_sharded)
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(reports))
    leave_processes(PartialState())


if __name__ == "__main__":
    main(*sys.argv[1:])
