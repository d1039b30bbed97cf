"""Is a change slower? Two source trees run the same work in turns: attention, pruning, a distillation step, start-up.

    git worktree add ../before v0.1.0
    python benchmarks/before_after.py ../before . --output benchmarks/results/before_after_cpu.json

Each tree has a worker of its own; in each round both do the same work, the one that begins changing from round to
round. A work uses public names only, so that it means the same in both. Reported are the medians, and the median over
the rounds of after / before: above 1 is slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

COMMANDS = {
    "import hf_efficient": ["-c", "import hf_efficient"],
    "hf-efficient --help": ["-m", "hf_efficient.cli", "--help"],
    "hf-efficient list": ["-m", "hf_efficient.cli", "list"],
}
LENGTH = 8192


def attention_work(kind: str, backward: bool) -> Callable[[], object]:
    """One converted BERT layer over 8,192 tokens."""
    import torch
    from transformers import BertConfig, BertModel

    from hf_efficient import AttentionConfig, convert_attention

    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 384, "num_hidden_layers": 1}
    model = convert_attention(
        BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=LENGTH)), AttentionConfig(kind=kind)
    )
    ids = torch.randint(0, 64, (1, LENGTH))

    def forward() -> None:
        with torch.set_grad_enabled(backward):
            states = model(input_ids=ids).last_hidden_state
        if backward:
            states.sum().backward()

    return forward


def small_classifier(layers: int):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 1024, "num_hidden_layers": layers}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=500, max_position_embeddings=128))


def calibration() -> list[dict]:
    import torch

    ids = torch.randint(0, 500, (4, 8, 128))
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def pruning_work(importance: str) -> Callable[[], object]:
    """`prune` of six layers to half their MACs."""
    from hf_efficient import PruningConfig, prune

    model, batches = small_classifier(6), calibration()
    data = {} if importance == "magnitude" else {"calibration": batches}
    return lambda: prune(model, PruningConfig(ratio=0.5, importance=importance), **data)


def pruned_forward_work() -> Callable[[], object]:
    import torch

    from hf_efficient import PruningConfig, prune

    model, batch = (
        prune(small_classifier(6), PruningConfig(ratio=0.5, importance="magnitude")).eval(),
        calibration()[0],
    )

    def forward() -> None:
        with torch.inference_mode():
            model(**batch)

    return forward


def distillation_work() -> Callable[[], object]:
    """Eight steps of `DistillationTrainer` with three losses."""
    import torch
    from datasets import Dataset

    from hf_efficient import DistillationArguments, DistillationTrainer, build_student

    teacher = small_classifier(4)
    rows = {"input_ids": torch.randint(0, 500, (64, 64)).tolist(), "labels": [0, 1] * 32}
    data = Dataset.from_dict(rows | {"attention_mask": [[1] * 64] * 64})
    folder = tempfile.mkdtemp()
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    losses = {"ce": 1.0, "kd": 1.0, "hidden": 1.0}
    arguments = DistillationArguments(output_dir=folder, losses=losses, max_steps=8, use_cpu=True, **quiet)

    def train() -> None:
        DistillationTrainer(build_student(teacher, layers=2), arguments, teacher=teacher, train_dataset=data).train()

    return train


WORKS: dict[str, Callable[[], Callable[[], object]]] = {
    "attention local, forward": lambda: attention_work("local", backward=False),
    "attention local, forward and backward": lambda: attention_work("local", backward=True),
    "attention linear, forward": lambda: attention_work("linear", backward=False),
    "attention linear, forward and backward": lambda: attention_work("linear", backward=True),
    "attention lsh, forward": lambda: attention_work("lsh", backward=False),
    "attention topk, forward": lambda: attention_work("topk", backward=False),
    "prune by magnitude": lambda: pruning_work("magnitude"),
    "prune by activation": lambda: pruning_work("activation"),
    "pruned forward": pruned_forward_work,
    "distillation, eight steps": distillation_work,
}


def work() -> None:
    """What a worker does: for each name that it reads, the work once; it answers with the seconds."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in ready:
            ready[name] = WORKS[name]()
        start = time.perf_counter()
        ready[name]()
        print(time.perf_counter() - start, file=answers, flush=True)


class Tree:
    """One source tree, with the process that works in it."""

    def __init__(self, folder: Path, threads: int):
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self.environment, cwd="/", text=True)

    def run(self, name: str) -> float:
        if name in COMMANDS:
            start = time.perf_counter()
            command = [sys.executable, *COMMANDS[name]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=self.environment, cwd=self.folder)
            return time.perf_counter() - start
        print(name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def version(self) -> str:
        git = ["git", "-C", str(self.folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def compare(before: Tree, after: Tree, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    cells = {}
    for name in names:
        times: dict[Tree, list[float]] = {before: [], after: []}
        for number in range(rounds + 1):
            for tree in (before, after) if number % 2 else (after, before):
                spent = tree.run(name)
                if number:  # the first is warm-up
                    times[tree].append(spent)
        ratios = [new / old for old, new in zip(times[before], times[after], strict=True)]
        cells[name] = {
            "before_s": statistics.median(times[before]),
            "after_s": statistics.median(times[after]),
            "after_over_before": statistics.median(ratios),
            "fastest_after_over_before": min(times[after]) / min(times[before]),
        }
        print(f"{name}: {cells[name]['after_over_before']:.3f}", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*WORKS, *COMMANDS], default=[*WORKS, *COMMANDS])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    trees = [Tree(folder, options.threads) for folder in (options.before, options.after)]
    cells = compare(*trees, options.only, options.rounds)

    from hf_efficient.io.environment import Environment

    report = {
        "cells": cells,
        "commits": [tree.version() for tree in trees],
        "rounds": options.rounds,
        "threads": options.threads,
        "environment": asdict(Environment.collect()),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for tree in trees:
        tree.process.stdin.close()
        tree.process.wait()


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()
