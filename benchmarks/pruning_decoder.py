"""Perplexity against removed MACs of a small Llama: heads, neurons, layers and their mix, each with its controls.

    python benchmarks/pruning_decoder.py --output benchmarks/results/pruning_decoder_cpu.json
    python benchmarks/pruning_decoder.py --teacher-steps 5 --limit 60 --ratios 0.3        # a quick look
    python benchmarks/plot_pruned.py benchmarks/results/pruning_decoder_cpu.json docs/images/pruning_decoder.png

The language model of `quality.py` (4 layers, trained from scratch on BBC News, 256 tokens), pruned without training
with `--calibration` rows of its training texts; perplexity on held-out articles. `default` is `PruningConfig(ratio)`,
that is heads and neurons; `heads`, `neurons` and `layers` remove nothing else, as far as that goes. `random` scores
are noise, without reconstruction. Layers leave as a whole, so `removed` may exceed `ratio`.

Each cell is written as soon as it is measured; the same command goes on with those that are missing.
"""

import argparse
import datetime
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from datasets import disable_progress_bars
from quality import JOBS, make_teacher
from transformers import PreTrainedModel

from hf_efficient import PruningConfig, prune
from hf_efficient.errors import ConfigError
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.quality import evaluate_quality
from hf_efficient.models.modes import using_threads
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.pruning.score.calibration import average_length
from hf_efficient.reporting.tables import markdown

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
BATCH = 16  # of calibration
DENSE = "dense"
GRANULARITIES = {"": ("head", "neuron"), "heads": ("head",), "neurons": ("neuron",), "layers": ("layer",)}


def all_methods() -> dict[str, dict[str, Any]]:
    """Name -> settings of PruningConfig."""
    methods = {name or "default": {"granularity": kinds} for name, kinds in GRANULARITIES.items()}
    for name, kinds in GRANULARITIES.items():
        control = {"granularity": kinds, "importance": "random", "reconstruct": False}
        methods[f"{name} random".strip()] = control
    methods["default without reconstruction"] = {"reconstruct": False}
    for importance in ("taylor", "activation", "magnitude"):
        methods[importance] = {"importance": importance}
    return methods


METHODS = all_methods()


class Bench:
    """The cells of one output file."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.settings = {name: getattr(options, name) for name in ("calibration", "limit", "teacher_steps")}
        self.header = {
            "benchmark": "pruning_decoder",
            "model": "a Llama of 4 layers, trained on BBC News",
            "score": "perplexity",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "threads": options.threads,
            "load_average_at_start": list(os.getloadavg()),
        }
        self.cells: dict[tuple[str, float], dict[str, Any]] = {}
        if options.output and options.output.is_file():
            old = json.loads(options.output.read_text())
            if old["settings"] != self.settings:
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            self.cells = {(cell["method"], cell["ratio"]): cell for cell in old["cells"]}

    def run(self) -> None:
        job, options = JOBS["language"], self.options
        teacher, data = make_teacher("language", job, options)
        rows = [data.train[index] for index in range(min(options.calibration, len(data.train)))]
        batches = [dict(data.collator(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]
        for batch in batches:
            batch.pop("labels")
        length = average_length(batches, teacher)
        whole = total_cost(teacher, "macs", length)
        for method, ratio in [
            (DENSE, 0.0),
            *((method, ratio) for method in options.methods for ratio in options.ratios),
        ]:
            if (method, ratio) in self.cells:
                continue
            start = time.perf_counter()
            try:
                small = (
                    teacher if method == DENSE else prune(teacher, PruningConfig(ratio, **METHODS[method]), batches)
                )
            except ConfigError as error:  # heads alone are not half of the MACs
                print(f"{method} {ratio}: left out. {error}", flush=True)
                continue
            seconds = time.perf_counter() - start
            score = evaluate_quality(small, data.test, data.collator, job.task).quality.main
            removed = 1 - total_cost(small, "macs", length) / whole
            self.add(method, ratio, removed, small, score.value, score.standard_error, seconds)

    def add(
        self,
        method: str,
        ratio: float,
        removed: float,
        model: PreTrainedModel,
        value: float,
        error: float,
        seconds: float,
    ) -> None:
        self.cells[method, ratio] = {
            "method": method,
            "ratio": ratio,
            "removed": round(removed, 4),
            "parameters": model.num_parameters(),
            "perplexity": value,
            "standard_error": error,
            "seconds": round(seconds, 1),
        }
        print(f"{method} {ratio}: perplexity {value:.1f}, {removed:.3f} gone ({seconds:.0f} s)", flush=True)
        if self.options.output:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            part = self.options.output.with_suffix(".part")
            report = self.header | {"settings": self.settings, "cells": list(self.cells.values())}
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(self.options.output)

    def table(self) -> str:
        """Perplexity, times that of the dense model."""
        dense = self.cells[DENSE, 0.0]["perplexity"]
        ratios = sorted({ratio for _, ratio in self.cells} - {0.0})
        rows = []
        for method in dict.fromkeys(method for method, _ in self.cells):
            found = [self.cells.get((method, ratio)) for ratio in ratios]
            shown = [f"{cell['perplexity'] / dense:.2f} ({cell['removed']:.2f})" if cell else "" for cell in found]
            rows.append([method, *shown])
        return markdown([f"times {dense:.1f} (removed)", *(f"{ratio:g}" for ratio in ratios)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--calibration", type=int, default=256, help="rows (default: 256)")
    parser.add_argument("--teacher-steps", type=int, help="of training the dense model; default: 800")
    parser.add_argument("--limit", type=int, default=2225, help="articles, a fifth for the test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/pruning"), help="where the dense model is kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    bench = Bench(options)
    with using_threads(options.threads):
        bench.run()
    print(f"\n{bench.table()}")


if __name__ == "__main__":
    main()
