"""What a training would do, from a trainer that is ready for it; one batch is tried, nothing is changed or written.

print(describe(trainer))
"""

import math
from typing import Any

import torch
from torch import nn

from ...distillation.trainer import DistillationTrainer
from ...models.modes import eval_mode
from ...training.batch import base_of

ADAM_STATES = 2


def describe(trainer: DistillationTrainer) -> str:
    """A page for the terminal: sizes, layer maps, losses of the first batch, steps, memory."""
    lines = [*_models(trainer), *_layers(trainer), *_losses(trainer), *_steps(trainer), *_memory(trainer)]
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


Lines = list[tuple[str, str]]


def _models(trainer: DistillationTrainer) -> Lines:
    student: Any = trainer.model
    lines = [("student", _model(student))]
    if trainer.cache is not None:
        layout = trainer.cache.layout
        contents = "all logits" if layout.top_k is None else f"the {layout.top_k} largest logits of each token"
        contents = contents if layout.sampled is None else f"{layout.sampled} tokens drawn for each token"
        return [*lines, ("teacher", f"{len(trainer.cache):,} cached answers in {trainer.cache.folder}, {contents}")]
    if trainer.teacher is None:
        return [*lines, ("teacher", "the student without its adapters" if trainer.teaches_itself else "none")]
    return [*lines, ("teacher", _model(trainer.teacher))]


def _model(model: Any) -> str:
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = "" if trained == count else f", {trained:,} of them trained"
    return f"{type(base_of(model)).__name__}, {count:,} parameters{part}, {_megabytes(_bytes(model))}"


def _layers(trainer: DistillationTrainer) -> Lines:
    lines = []
    for loss, stacks in trainer.pairs.items():
        for stack, pairs in stacks.items():
            text = ", ".join(f"{student} from {teacher}" for student, teacher in pairs)
            lines.append(("layers", f"{loss}, {stack}: {text}"))
    if trainer.projections:
        count = sum(p.numel() for p in trainer.projections.parameters())
        lines.append(("projections", f"{len(trainer.projections)}, {count:,} parameters, dropped at the end"))
    return lines


def _losses(trainer: DistillationTrainer) -> Lines:
    """The first batch goes through both models, without dropout and gradients."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with eval_mode(trainer.model), torch.no_grad():
        trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
    means = trainer.eval_meter.drain(trainer.accelerator)
    lines = []
    for name, weight in trainer.args.losses.items():
        value = sum(mean for part, mean in means.items() if part in trainer.parts_of(name))
        lines.append(("loss", f"{weight:g} x {name}, {value:.4g} on the first batch"))
    return lines


def _steps(trainer: DistillationTrainer) -> Lines:
    args: Any = trainer.args
    batches = len(trainer.get_train_dataloader())
    processes = trainer.accelerator.num_processes
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
    size = args.per_device_train_batch_size * max(1, args.n_gpu) * args.gradient_accumulation_steps * processes
    split = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x {processes}"
    rows = len(trainer.train_dataset)
    return [
        ("steps", f"{steps:,} of {size} examples ({split} processes), {steps / epoch:.1f} epochs of {rows:,}"),
        ("writes to", str(args.output_dir)),
    ]


def _memory(trainer: DistillationTrainer) -> Lines:
    """What does not depend on the batch; AdamW keeps two numbers for each trained one."""
    student: Any = trainer.model
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    trained += _bytes(trainer.projections)
    parts = {"weights": _bytes(student), "gradients": trained, "AdamW": ADAM_STATES * trained}
    if trainer.teacher is not None:
        parts["teacher"] = _bytes(trainer.teacher)
    text = " + ".join(f"{name} {_megabytes(size)}" for name, size in parts.items())
    return [("memory", f"{_megabytes(sum(parts.values()))} a process and activations: {text}")]


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
