"""Ask for a speed-up, prune, and measure what came: `metric="latency"` on MiniLM.

    python benchmarks/pruning_latency.py --rounds 40 --output benchmarks/results/pruning_latency_cpu.json

all-MiniLM-L6-v2 with a 5-label head, 8 x 128 tokens, float32. Which weights stay does not matter for speed, so units
are chosen by magnitude. After all models are made, they and the dense one take turns in every round; `reached` is the
median over rounds of the ratio within a round, `off_percent` how far that is from what was asked.
"""

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path

import torch
from pruning_speed import BATCH, LENGTH, print_table, widths
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_efficient import PruningConfig, prune
from hf_efficient.data.bundled import bundled_model
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.latency import compare_latency
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.pruning.price.latency import latency_table

TARGETS = (1.3, 1.5, 2.0, 3.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    dense = AutoModelForSequenceClassification.from_pretrained(bundled_model("minilm-l6"), num_labels=5).eval()
    print(latency_table(dense, BATCH, LENGTH), "\n")
    settings = {
        "metric": "latency",
        "sequence_length": LENGTH,
        "latency_batch_size": BATCH,
        "importance": "magnitude",
        "allocation": options.allocation,
    }
    models = {f"{target}": prune(dense, PruningConfig(ratio=1 - 1 / target, **settings)) for target in options.targets}
    timing = compare_latency(
        {"dense": dense} | models,
        lambda model: dummy_inputs(model, BATCH, LENGTH),
        rounds=options.rounds,
        threads=options.threads,
    )
    rows = []
    for target, (name, model) in zip(options.targets, models.items(), strict=True):
        reached = timing.paired_speedup("dense", name)
        rows.append(
            {
                "target": target,
                "reached": round(reached, 3),
                "off_percent": round(100 * (reached / target - 1), 1),
                "median_ms": round(timing.latencies[name].median_ms, 2),
                "dense_ms": round(timing.latencies["dense"].median_ms, 2),
                "heads": widths(model, "heads"),
                "neurons": widths(model, "neurons"),
            }
        )
    print_table(rows)
    if options.output:
        report = {
            "benchmark": "pruning_latency",
            "model": "sentence-transformers/all-MiniLM-L6-v2, 5 labels",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "settings": {
                "batch": BATCH,
                "length": LENGTH,
                "dtype": "float32",
                "threads": options.threads,
                "rounds": options.rounds,
                "allocation": options.allocation,
            },
            "results": rows,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
