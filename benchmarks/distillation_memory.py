"""The memory of distillation by arithmetic and as measured: what `docs/scaling.md` counts with.

    python benchmarks/distillation_memory.py --output benchmarks/results/distillation_memory_cpu.json

Each case is one process that takes three steps in float32. `measured` is its peak resident memory less what it held
before the models were made. The arithmetic, for s trained and t teacher parameters and n tokens in a batch:

    weights, gradients, AdamW     4 s + 4 s + 8 s bytes; 4 t for the teacher
    activations of the student    68 n h bytes a layer (Korthikanti et al. 2022, equation 2, at 4 bytes a number and
                                  without the attention matrix, which SDPA does not keep)
    logits                        3 x 4 n V bytes: student, teacher, gradient
"""

import argparse
import datetime
import json
import multiprocessing
import resource
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.reporting.tables import markdown

CASES: dict[str, dict[str, Any]] = {
    "6-layer MiniLM, student of 3, 32 x 128": {"kind": "classifier", "batch": 32, "length": 128, "hidden": 384},
    "6-layer Llama of 16,384 entries, student of 3, 8 x 256": {
        "kind": "language",
        "batch": 8,
        "length": 256,
        "hidden": 256,
    },
}


def page_table(report: dict) -> str:
    """Markdown: arithmetic and measurement of each case."""
    parts, rows = list(next(iter(report["cases"].values()))["parts"]), []
    for name, case in report["cases"].items():
        bytes_of = [*(case["parts"][part] for part in parts), case["arithmetic"], case["measured"]]
        rows.append((name, *(f"{count / 1e6:.0f}" for count in bytes_of)))
    return str(markdown(("MB", *parts, "sum", "measured"), rows)) + "\n"


def resident() -> int:
    """Bytes, at their peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: dict[str, Any], queue: Any) -> None:
    import distillation
    import torch
    from datasets import Dataset

    from hf_efficient import DistillationArguments, DistillationTrainer, build_student

    distillation.SHAPES[case["kind"]] = (case["batch"], case["length"])
    build_student(distillation.make_models("classifier")[0], 1)  # what is imported on first use
    rows: Dataset = distillation.make_rows(case["kind"])
    before = resident()
    teacher, student = distillation.make_models(case["kind"])
    losses = {"losses": {"ce": 1.0, "kd": 1.0}}
    with tempfile.TemporaryDirectory() as folder:
        args = distillation.arguments(DistillationArguments, folder, case["batch"], **losses)
        trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows)
        step = distillation.trainer_step(trainer, rows)
        for _ in range(3):
            step()
    measured = resident() - before
    tokens = case["batch"] * case["length"]
    own, other = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    vocabulary = distillation.LLAMA["vocab_size"] if case["kind"] == "language" else 0
    parts = {
        "weights, gradients, AdamW": 16 * own,
        "teacher": 4 * other,
        "activations": 68 * tokens * case["hidden"] * student.config.num_hidden_layers,
        "logits": 3 * 4 * tokens * vocabulary,
    }
    assert torch.get_default_dtype() == torch.float32
    queue.put({"measured": measured, "parts": parts, "arithmetic": sum(parts.values())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    report: dict[str, Any] = {
        "benchmark": "distillation_memory",
        "commit": package_commit(),
        "date": datetime.date.today().isoformat(),
        "environment": asdict(Environment.collect()),
        "cases": {},
    }
    rows = []
    for name, case in CASES.items():
        queue = context.Queue()
        process = context.Process(target=measure, args=(case, queue))
        process.start()
        report["cases"][name] = found = queue.get()
        process.join()
        parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in found["parts"].items())
        rows.append([name, parts, f"{found['arithmetic'] / 1e6:.0f}", f"{found['measured'] / 1e6:.0f}"])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        part = options.output.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(options.output)
    print(markdown(["case", "parts, MB", "arithmetic, MB", "measured, MB"], rows))


if __name__ == "__main__":
    main()
