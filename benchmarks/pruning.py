"""Accuracy against removed MACs: every importance, schedule and allocation, and peers, without any training.

    python benchmarks/pruning.py --reviews reviews.tsv --output benchmarks/results/pruning_cpu.json
    python benchmarks/pruning.py --jobs bbc-news --seeds 0 --ratios 0.5 --limit 200        # a quick look

all-MiniLM-L6-v2 with a head, fine-tuned once for each seed (of the head, the order of rows, and whatever a method
draws) and kept in `--work`:

    reviews     positive or negative snippets of film reviews (--reviews PATH), 64 tokens, 8,500 rows to train on
    bbc-news    5 topics, 128 tokens, 3 in 5 of the articles to train on

`--reviews` is a tab-separated file without a header: id, rating, text; a rating above 0 is positive. Without it that
job is left out. All methods prune the same model to the same MACs of the encoder, counted by the same formula at the
average length of the same calibration rows (`--calibration`, of the training rows, in batches of 32 sorted by length).
Ours read no labels; the peers (`pruning_peers.py`) do, except `torch-pruning l2`. torch-pruning is not among our
requirements: pip install --no-deps torch-pruning==1.6.1.

Names: `x4` scores in 4 steps, not in one; `+r` reconstructs, that is, fits what stays; `uniform` keeps as much of each
layer; `default` is `PruningConfig(ratio)`. Layers are removed as a whole, so `removed` may exceed what was asked for.
The methods of `COARSE_RATIOS` are run at those alone, unless `--all`.

Each cell is written as soon as it is measured, with the commit it was measured at; the same command goes on with those
that are missing, and `--again METHOD ...` measures some anew. A difference is to the dense model, paired on the same
test rows.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import ClassLabel, Dataset, disable_progress_bars
from pruning_peers import PEERS, Calibration, OutOfReach, Pruned, count_parameters
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_efficient import PruningConfig, prune
from hf_efficient.data.bundled import bundled_model
from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import PreparedData, prepare
from hf_efficient.errors import ConfigError
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.quality import Evaluation, compare_quality, evaluate_quality
from hf_efficient.models.modes import using_threads
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.reporting.tables import markdown

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COARSE_RATIOS = (0.4, 0.6, 0.8)
SEEDS = (0, 1, 2)
BATCH = 32  # of calibration
TRAIN_ROWS = 8500  # of the reviews
WARMUP_STEPS = 20
DENSE = "dense"


def units(importance: str, steps: int = 1, reconstruct: bool = False, **more: Any) -> dict[str, Any]:
    return {"importance": importance, "steps": steps, "reconstruct": reconstruct} | more


def our_methods() -> dict[str, dict[str, Any]]:
    """Name -> settings of PruningConfig. More steps change nothing where nothing is scored on data."""
    methods: dict[str, dict[str, Any]] = {"default": {}}
    for importance in ("fisher", "taylor", "activation", "magnitude", "magnitude_l1", "random"):
        for steps in (1, 4) if importance in ("fisher", "taylor", "activation") else (1,):
            for reconstruct in (False, True):
                name = importance + (" x4" if steps > 1 else "") + (" +r" if reconstruct else "")
                methods[name] = units(importance, steps, reconstruct)
    methods["uniform"] = {"allocation": "uniform"}
    for importance in ("loss", "block_influence", "random"):
        methods[f"layers {importance}"] = {"granularity": ("layer",), "layer_importance": importance}
    return methods


OURS = our_methods()
FINE = ("default", "fisher", "fisher +r", "fisher x4", "fisher x4 +r", *PEERS)  # run at all ratios


@dataclass(frozen=True)
class Job:
    """One data set: `rows(options)` gives its `train` and `test`."""

    length: int
    batch: int
    epochs: int
    rows: Callable[[argparse.Namespace], Any]


def bbc_news(options: argparse.Namespace) -> Any:
    return load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0)


def reviews(options: argparse.Namespace) -> Any:
    lines = options.reviews.read_text(encoding="utf-8", errors="ignore").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    columns = {"text": [text for _, _, text in rows], "label": [int(float(rating) > 0) for _, rating, _ in rows]}
    data = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["negative", "positive"])).shuffle(seed=0)
    train = TRAIN_ROWS if len(data) > TRAIN_ROWS else len(data) * 4 // 5
    return {"train": data.select(range(train)), "test": data.select(range(train, len(data)))}


JOBS = {"reviews": Job(64, 32, 1, reviews), "bbc-news": Job(128, 16, 2, bbc_news)}


def by_length(rows: Dataset) -> Dataset:
    """Little padding, so less work; the same order for all."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def read_job(job: Job, options: argparse.Namespace) -> PreparedData:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model("minilm-l6"))
    return prepare(job.rows(options), "text-classification", tokenizer, max_length=job.length)


def make_calibration(data: PreparedData, rows: int) -> Calibration:
    chosen = by_length(data.train.select(range(min(rows, len(data.train)))))
    batches = [
        dict(data.collator([chosen[i] for i in range(start, min(start + BATCH, len(chosen)))]))
        for start in range(0, len(chosen), BATCH)
    ]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return Calibration(batches, max(1, tokens // len(chosen)))


def make_teacher(name: str, job: Job, seed: int, data: PreparedData, options: argparse.Namespace) -> PreTrainedModel:
    """The dense model, trained once and kept in `--work`."""
    steps = options.teacher_steps
    folder = options.work / (f"{name}-{seed}" + (f"-{steps}" if steps else ""))
    kind = transformers.AutoModelForSequenceClassification
    if (folder / "config.json").is_file():
        return kind.from_pretrained(folder).eval()
    transformers.set_seed(seed)
    model = kind.from_pretrained(bundled_model("minilm-l6"), num_labels=data.num_labels)
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            num_train_epochs=job.epochs,
            max_steps=steps or -1,
            per_device_train_batch_size=job.batch,
            learning_rate=1e-4,
            warmup_steps=WARMUP_STEPS,
            lr_scheduler_type="linear",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=data.train, data_collator=data.collator)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    model.eval().save_pretrained(folder)
    return model


def prune_with(method: str, model: PreTrainedModel, ratio: float, calibration: Calibration, seed: int) -> Pruned:
    if method in PEERS:
        return PEERS[method](model, ratio, calibration, seed)
    config = PruningConfig(ratio, sequence_length=calibration.length, seed=seed, **OURS[method])
    small = prune(model, config, calibration.without_labels())
    return Pruned(small, total_cost(small, "macs", calibration.length), count_parameters(small))


class Bench:
    """The cells of one output file, and how a missing one is measured."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.cells: dict[tuple[str, int, str, float], dict[str, Any]] = {}
        self.header = {
            "benchmark": "pruning",
            "model": "sentence-transformers/all-MiniLM-L6-v2, fine-tuned",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "threads": options.threads,
            "load_average_at_start": list(os.getloadavg()),
        }
        self.settings = {name: getattr(options, name) for name in ("calibration", "limit", "teacher_steps")}
        self.settings |= {
            "jobs": {n: {"tokens": job.length, "batch": job.batch, "epochs": job.epochs} for n, job in JOBS.items()}
        }
        if options.output and options.output.is_file():
            old = json.loads(options.output.read_text())
            if old["settings"] != self.settings:
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            kept = [cell for cell in old["cells"] if cell["method"] not in options.again]
            self.cells = {(cell["job"], cell["seed"], cell["method"], cell["ratio"]): cell for cell in kept}

    def wanted(self) -> list[tuple[str, float]]:
        """Methods and ratios; the dense model first."""
        options = self.options
        chosen = [(DENSE, 0.0)]
        for method in options.methods:
            coarse = method not in FINE and not options.all
            chosen += [(method, ratio) for ratio in options.ratios if not coarse or ratio in COARSE_RATIOS]
        return chosen

    def run(self, name: str, job: Job) -> None:
        """All missing cells of a job."""
        missing = [
            (seed, method, ratio)
            for seed in self.options.seeds
            for method, ratio in self.wanted()
            if (name, seed, method, ratio) not in self.cells
        ]
        if not missing:
            return
        data = read_job(job, self.options)
        calibration = make_calibration(data, self.options.calibration)
        test = by_length(data.test.select(range(min(self.options.limit or len(data.test), len(data.test)))))
        for seed in self.options.seeds:
            own = [(method, ratio) for other, method, ratio in missing if other == seed]
            if not own:
                continue
            teacher = make_teacher(name, job, seed, data, self.options)
            reference = evaluate_quality(teacher, test, data.collator, data.task)
            dense = Pruned(teacher, total_cost(teacher, "macs", calibration.length), count_parameters(teacher))
            for method, ratio in own:
                start = time.perf_counter()
                try:
                    found = dense if method == DENSE else prune_with(method, teacher, ratio, calibration, seed)
                except (ConfigError, OutOfReach) as error:  # uniform allocation, say, cannot reach every ratio
                    print(f"{name} {seed} {method} {ratio}: left out. {error}", flush=True)
                    continue
                seconds = time.perf_counter() - start
                quality = evaluate_quality(found.model, test, data.collator, data.task)
                removed = 1 - found.macs / dense.macs
                self.add((name, seed, method, ratio), quality, reference, found, removed, seconds)

    def add(
        self,
        key: tuple[str, int, str, float],
        quality: Evaluation,
        reference: Evaluation,
        found: Pruned,
        removed: float,
        seconds: float,
    ) -> None:
        compared, score = compare_quality(reference, quality), quality.quality.main
        self.cells[key] = dict(zip(("job", "seed", "method", "ratio"), key, strict=True)) | {
            "removed": round(removed, 4),
            "macs": found.macs,
            "parameters": found.parameters,
            "accuracy": score.value,
            "standard_error": score.standard_error,
            "difference": compared.difference,
            "difference_error": compared.standard_error,
            "agreement": compared.agreement,
            "samples": compared.samples,
            "seconds": round(seconds, 1),
            "commit": self.header["commit"],
        }
        name, seed, method, ratio = key
        print(f"{name} {seed} {method} {ratio}: {score.value:.4f}, {removed:.3f} gone ({seconds:.1f} s)", flush=True)
        if self.options.output:
            report = self.header | {"settings": self.settings, "cells": list(self.cells.values())}
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            part = self.options.output.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(self.options.output)


def summarize(cells: Iterable[dict[str, Any]]) -> dict[tuple[str, str, float], dict[str, float]]:
    """Means over seeds by (job, method, ratio). `spread` is the standard deviation of the accuracy over seeds,
    `difference_error` the paired standard error over test rows alone: the seeds share those, so it does not shrink."""
    together: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        together.setdefault((cell["job"], cell["method"], cell["ratio"]), []).append(cell)
    names = ("removed", "accuracy", "difference", "difference_error", "seconds", "parameters")
    return {
        key: {name: statistics.fmean(cell[name] for cell in own) for name in names}
        | {
            "seeds": len(own),
            "spread": statistics.stdev(cell["accuracy"] for cell in own) if len(own) > 1 else math.nan,
            "difference_spread": statistics.stdev(cell["difference"] for cell in own) if len(own) > 1 else math.nan,
        }
        for key, own in together.items()
    }


def tables(cells: Iterable[dict[str, Any]]) -> str:
    """Of each job: accuracy ± standard deviation over seeds, and difference to dense ± standard error, in percent."""
    summary = summarize(cells)
    parts = []
    for job in dict.fromkeys(job for job, _, _ in summary):
        methods = list(dict.fromkeys(method for own, method, _ in summary if own == job))
        ratios = sorted({ratio for own, _, ratio in summary if own == job and ratio})
        for title, value, error in (
            ("accuracy, % ± standard deviation over seeds", "accuracy", "spread"),
            ("difference to dense, points ± standard error over rows", "difference", "difference_error"),
        ):
            header = [title, *(f"{ratio:g}" for ratio in ratios), "seconds"]
            rows = [[method, *_row(summary, job, method, ratios, value, error)] for method in methods]
            parts.append(f"{job}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _row(summary: dict, job: str, method: str, ratios: list[float], value: str, error: str) -> list[str]:
    found = [summary.get((job, method, 0.0 if method == DENSE else ratio)) for ratio in ratios]
    seconds = [entry["seconds"] for entry in found if entry]
    shown = []
    for ratio, entry in zip(ratios, found, strict=True):
        text = f"{100 * entry[value]:.1f}" if entry else ""
        if entry and not math.isnan(entry[error]):
            text += f" ± {100 * entry[error]:.1f}"
        if entry and method != DENSE and abs(entry["removed"] - ratio) > 0.01:
            text += f" ({entry['removed']:.2f})"
        shown.append(text)
    return [*shown, f"{statistics.fmean(seconds):.0f}" if seconds else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*OURS, *PEERS]
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--all", action="store_true", help="every method at every ratio")
    parser.add_argument("--again", nargs="+", choices=known, default=[], help="methods to measure anew")
    parser.add_argument("--calibration", type=int, default=1024, help="rows (default: 1024)")
    parser.add_argument("--limit", type=int, help="test rows; default: all")
    parser.add_argument("--teacher-steps", type=int, help="of fine-tuning, for a quick look")
    parser.add_argument("--reviews", type=Path, help="tab-separated, without header: id, rating, text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/pruning"), help="where the dense models are kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    bench = Bench(options)
    with using_threads(options.threads):
        for name in options.jobs:
            if name != "reviews" or options.reviews:
                bench.run(name, JOBS[name])
    print(f"\n{tables(bench.cells.values())}")


if __name__ == "__main__":
    main()
