"""How much of the removed multiply-accumulates (MACs) becomes time: pruned MiniLM against itself, interleaved.

    python benchmarks/pruning_speed.py --rounds 30 --output benchmarks/results/pruning_speed_cpu.json

all-MiniLM-L6-v2 with a 5-label head, 8 x 128 tokens, float32. Which weights stay does not matter for speed, so units
are chosen by magnitude. `efficiency` is speed-up / (dense MACs / pruned MACs): 1 would mean that nothing but the
layers' products costs time. Dense and pruned models take turns in every round; the speed-up is the median over
rounds of the ratio within a round. On a machine with other work use `--threads 1`: two threads wait for each other.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_efficient import PruningConfig, prune
from hf_efficient.data.bundled import bundled_model
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.latency import LatencyComparison, compare_latency
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.pruning.price.costs import total_cost

BATCH, LENGTH = 8, 128
RATIOS = (0.25, 0.5, 0.75)
VARIANTS = {  # what is compared: settings of PruningConfig
    "global, round_to 8": {"allocation": "global", "round_to": 8},
    "global, round_to 32": {"allocation": "global", "round_to": 32},
    "uniform, round_to 8": {"allocation": "uniform", "round_to": 8},
    "uniform, round_to 32": {"allocation": "uniform", "round_to": 32},
    "neurons only": {"granularity": ("neuron",)},
    "layers only": {"granularity": ("layer",)},
}


def make_models(ratios: Sequence[float]) -> dict[str, tuple]:
    """Name -> (variant, ratio, model); the dense one first. What cannot be reached (neurons alone) is left out."""
    dense = AutoModelForSequenceClassification.from_pretrained(bundled_model("minilm-l6"), num_labels=5)
    models = {"dense": ("dense", 0.0, dense)}
    for variant, settings in VARIANTS.items():
        for ratio in ratios:
            if variant == "neurons only" and ratio > 0.5:
                continue  # FFNs are 63% of the MACs
            small = prune(dense, PruningConfig(ratio=ratio, importance="magnitude", **settings))
            models[f"{variant}, {ratio}"] = (variant, ratio, small)
    return models


def widths(model, kind: str) -> list[int]:
    return [group.units for group in Anatomy.of(model).groups if group.kind == kind]


def result_row(name: str, variant: str, ratio: float, model, dense, timing: LatencyComparison) -> dict:
    mac_ratio = total_cost(dense, "macs", LENGTH) / total_cost(model, "macs", LENGTH)
    speedup = timing.paired_speedup("dense", name)
    return {
        "variant": variant,
        "ratio": ratio,
        "mac_ratio": round(mac_ratio, 3),
        "speedup": round(speedup, 3),
        "efficiency": round(speedup / mac_ratio, 3),
        "median_ms": round(timing.latencies[name].median_ms, 2),
        "heads": widths(model, "heads"),
        "neurons": widths(model, "neurons"),
    }


def print_table(rows: list[dict]) -> None:
    columns = [name for name in rows[0] if name not in ("heads", "neurons")]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models = make_models(options.ratios)
    dense = models["dense"][2]
    timing = compare_latency(
        {name: model for name, (_, _, model) in models.items()},
        lambda model: dummy_inputs(model, BATCH, LENGTH),
        rounds=options.rounds,
        threads=options.threads,
    )
    rows = [result_row(name, *entry, dense, timing) for name, entry in models.items()]
    print_table(rows)
    if options.output:
        report = {
            "benchmark": "pruning_speed",
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
            },
            "results": rows,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
