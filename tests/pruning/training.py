"""A standard Trainer on tiny models, with a callback that watches what PruningCallback leaves behind."""

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_efficient import PruningCallback, PruningConfig
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import unit_parameters

from .tiny import batch, logits, make

STEPS = 20


def dataset(case: str) -> list[dict[str, torch.Tensor]]:
    """12 examples of one length."""
    found = []
    for seed in range(4):
        one = batch(case, seed)
        found += [{key: value[row] for key, value in one.items()} for row in range(3)]
    return found


def make_trainer(case: str, folder: Any, callbacks: list, *, model=None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 5,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **(settings | changes))
    rows = dataset(case)
    return Trainer(model or make(case), args, train_dataset=rows, eval_dataset=rows[:6], callbacks=callbacks)


def pruning(ratio: float = 0.5, every: int = 2, **changes: Any) -> PruningCallback:
    """Rises from step 2 to step 12 of 20."""
    settings = {"importance": "taylor"} | changes
    return PruningCallback(PruningConfig(ratio=ratio, **settings), start=0.1, end=0.6, every=every)


class Watch(TrainerCallback):
    """Stands after PruningCallback: notes what has been removed, and the largest leftover of a removed unit."""

    def __init__(self, callback: PruningCallback):
        self.callback = callback
        self.removed: list[dict] = []
        self.leftover: list[float] = []
        self.alive: list[float] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.removed.append({group: mask.clone() for group, mask in self.callback.removal.removed.items()})
        leftover, alive = 0.0, float("inf")
        for group, mask in self.callback.removal.removed.items():
            gone, kept = mask.nonzero().flatten(), (~mask).nonzero().flatten()
            for member in group.members:
                for parameter, part in unit_parameters(model, member):
                    moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
                    for tensor in (parameter.detach(), *moments):
                        cut = tensor.index_select(part.dim, part.rows(gone, tensor))
                        leftover = max(leftover, float(cut.abs().max()) if cut.numel() else 0.0)
                    left = parameter.detach().index_select(part.dim, part.rows(kept, parameter))
                    alive = min(alive, float(left.abs().max()))
        self.leftover.append(leftover)
        self.alive.append(alive)


class Before(TrainerCallback):
    """Stands before PruningCallback: what the model computes, in its full shape, just before it becomes small."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        self.inputs = inputs
        self.logits = self.parameters = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        training = model.training
        self.logits = logits(model.eval(), self.inputs)
        self.parameters = sum(p.numel() for p in model.parameters())
        model.train(training)


def count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def layer_count(model: PreTrainedModel) -> int:
    return sum(p.numel() for stack in Anatomy.of(model).stacks for p in stack.layers.parameters())
