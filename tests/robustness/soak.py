"""Many compressions of a tiny model in one process: memory, tensors and open files must stay what they are.

python -m tests.robustness.soak --rounds 50

One round converts, prunes, builds a student, distils a few steps with a checkpoint, saves and loads. The first rounds
warm up caches (lazy imports, memory pools) and do not count.
"""

import argparse
import gc
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_callback import PrinterCallback

from hf_efficient import (
    AttentionConfig,
    DistillationTrainer,
    PruningCallback,
    PruningConfig,
    build_student,
    convert_attention,
    prune,
)
from hf_efficient.models.loading import load_model
from hf_efficient.training.trainers import MarkComplete

from ..distillation.tiny import arguments, collate, examples, make_pair

WARM_UP = 4
MIB = 1 << 20


@dataclass(frozen=True)
class Used:
    """What the process holds: bytes in memory (Linux), tensors that Python knows of, open files, threads."""

    memory: int
    tensors: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> "Used":
        gc.collect()
        # Counted in the tables of pages: the sums of `statm` may come late.
        resident = re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        return cls(
            int(resident[1]) << 10,
            tensors,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
        )


def one_round(folder: Path) -> None:
    """From a dense model to one that was saved and loaded again."""
    _, teacher = make_pair("bert")
    rows = examples("bert", 16)
    converted = convert_attention(teacher, AttentionConfig("local", window=4))
    small = prune(converted, PruningConfig(ratio=0.3, round_to=4), [collate(rows)])
    student = build_student(small, layers=2)
    trainer = DistillationTrainer(
        student,
        arguments(
            folder / "run",
            losses={"ce": 1.0, "kd": 1.0, "hidden": 1.0},
            max_steps=4,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
        ),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        callbacks=[PruningCallback(PruningConfig(ratio=0.2, importance="taylor", round_to=2)), MarkComplete()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.evaluate()
    trainer.model.save_pretrained(folder / "model")
    loaded = load_model("AutoModelForSequenceClassification", folder / "model").double().eval()
    with torch.no_grad():
        expected, got = (model.eval()(**collate(rows)).logits for model in (trainer.model, loaded))
    assert torch.allclose(expected, got, atol=1e-4)


def soak(rounds: int) -> list[Used]:
    """What is held after each round."""
    used = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            one_round(Path(folder))
        used.append(Used.now())
        print(f"{number + 1:3d}  {used[-1].memory / MIB:8.1f} MiB  {used[-1]}", file=sys.stderr)
    return used


def growth(used: list[Used]) -> float:
    """Bytes of memory a round after the warm-up: the slope of the least squares line."""
    memory = torch.tensor([each.memory for each in used[WARM_UP:]], dtype=torch.float64)
    time = torch.arange(len(memory), dtype=torch.float64)
    centred = time - time.mean()
    return float((centred @ (memory - memory.mean())) / (centred @ centred))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    if rounds < WARM_UP + 2:
        sys.exit(f"--rounds must be at least {WARM_UP + 2}: the first {WARM_UP} warm up.")
    torch.set_num_threads(1)
    used = soak(rounds)
    first, last = used[WARM_UP], used[-1]
    print(f"{rounds} rounds; after the first {WARM_UP}: {growth(used) / 1024:+.1f} KiB a round")
    print(f"memory {first.memory / MIB:.1f} -> {last.memory / MIB:.1f} MiB, tensors {first.tensors} -> {last.tensors}")
    print(f"open files {first.files} -> {last.files}, threads {first.threads} -> {last.threads}")
    if (first.tensors, first.files, first.threads) != (last.tensors, last.files, last.threads):
        sys.exit("Something is held.")
    if growth(used) > 128 * 1024:
        sys.exit("Memory grows.")


if __name__ == "__main__":
    main()
