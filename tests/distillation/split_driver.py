"""One optimizer step on the same 16 examples for every architecture and loss, under given ways of splitting the batch.

    python -m tests.distillation.split_driver out some 16x1 4x4                          # batch size x accumulation
    torchrun --nproc_per_node 2 -m tests.distillation.split_driver out all 8x1 4x2       # on two processes

`some` are so many that every architecture and every loss occurs.

Writes out.json (gradient norm, losses, evaluation, number of processes) and out.safetensors (the new weights). The
gradient norms of the stock Trainer stand beside them.
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedModel, Trainer

from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.training.ranks import leave_processes

from ..helpers import covering
from .tiny import CASES, LABELS, VOCABULARY, arguments, collate, examples, losses_of, make_pair, with_adapters

SELF_TAUGHT = "adapters"  # a PEFT student whose teacher is its own base
OTHER_FAMILY = "distilbert"  # a DistilBERT student of a BERT
STOCK = ("bert", "token", "masked", "llama", "t5", "vit")
STOCK_SOME = ("bert", "llama", "t5")
RUNS = [(f"{case}-{loss}", case, {loss: 1.0}, False) for case in CASES for loss in losses_of(case)]
RUNS.append((SELF_TAUGHT, "bert", {"kd": 1.0, "hidden": 1.0}, False))
RUNS.append((OTHER_FAMILY, "bert", dict.fromkeys(losses_of("bert"), 1.0), False))
RUNS.append(("evaluate-first", "bert", {"ce": 1.0, "kd": 0.5, "hidden": 2.0}, True))


def runs_of(which: str) -> list[tuple]:
    """All runs, or so many that every architecture and every loss occurs."""
    if which == "all":
        return RUNS
    pairs = set(covering([(case, loss) for case in CASES for loss in losses_of(case)]))
    return [row for row in RUNS if len(row[2]) != 1 or (row[1], *row[2]) in pairs]


def flat(trainer: DistillationTrainer) -> torch.Tensor:
    """All weights of student and projections in one vector."""
    modules = (trainer.model, trainer.projections)
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]).double()


def models_of(name: str, case: str) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Student and teacher."""
    student, teacher = make_pair(case)
    if name == SELF_TAUGHT:
        return with_adapters(teacher), None
    if name == OTHER_FAMILY:
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
        quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        config = DistilBertConfig(vocab_size=VOCABULARY, num_labels=LABELS, **sizes, **quiet)
        return DistilBertForSequenceClassification(config).double(), teacher
    return student, teacher


def stock_norm(case: str, **settings: Any) -> float:
    """The gradient norm of the first step of transformers' own Trainer."""
    student, _ = make_pair(case)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, **settings)
        trainer = Trainer(student, args, train_dataset=examples(case), data_collator=collate)
        trainer.train()
    return trainer.state.log_history[0]["grad_norm"]


def step(
    name: str, case: str, losses: dict[str, float], *, evaluate_first: bool = False, **settings: Any
) -> tuple[dict, Any]:
    """Train one step, then evaluate on 11 examples, which no batch size here divides."""
    student, teacher = models_of(name, case)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, losses=losses, **settings)
        trainer = DistillationTrainer(
            student,
            args,
            teacher=teacher,
            train_dataset=examples(case),
            eval_dataset=examples(case, 11, seed=1),
            data_collator=collate,
        )
        before = trainer.evaluate() if evaluate_first else {}
        start = flat(trainer)
        trainer.train()
        after = trainer.evaluate()
    weights = flat(trainer)
    everywhere = trainer.accelerator.gather(weights[None])
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    report = {
        "processes": trainer.accelerator.num_processes,
        "rank_difference": float((everywhere - everywhere[0]).abs().max()),
        "log": log,
        "before": {k: v for k, v in before.items() if "loss" in k or "agreement" in k},
        "after": {k: v for k, v in after.items() if "loss" in k or "agreement" in k},
    }
    return report, {"start": start, "weights": weights}


def run(split: str, which: str) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Reports and weights of every case for a split such as `4x2`."""
    batch_size, accumulation = map(int, split.split("x"))
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    reports, tensors = {}, {}
    for name, case, losses, evaluate_first in runs_of(which):
        key = f"{split}/{name}"
        reports[key], vectors = step(name, case, losses, evaluate_first=evaluate_first, **settings)
        tensors |= {f"{key}.{kind}": value for kind, value in vectors.items()}
    for case in STOCK if which == "all" else STOCK_SOME:
        reports[f"{split}/stock-{case}"] = {"grad_norm": stock_norm(case, **settings)}
    return reports, tensors


def main(out: str, which: str, *splits: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    reports, tensors = {}, {}
    for split in splits:
        more_reports, more_tensors = run(split, which)
        reports |= more_reports
        tensors |= more_tensors
    if int(os.environ.get("RANK", 0)) == 0:
        Path(f"{out}.json").write_text(json.dumps(reports))
        save_file(tensors, f"{out}.safetensors")
    leave_processes(PartialState())


if __name__ == "__main__":
    main(*sys.argv[1:])
