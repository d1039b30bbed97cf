"""The ladder on data sets: ours beside TF-IDF, static vectors, a shallow student and the teacher in 8 bits.

    python benchmarks/ladder.py --reviews reviews.tsv --data bundled:bbc-news mine.csv \
        --output benchmarks/results/ladder_cpu.json
    python benchmarks/ladder.py --reviews reviews.tsv --seeds 0 --speeds 4 --steps 20 --limit 600     # a quick look

all-MiniLM-L6-v2, fine-tuned once for each data set and seed (of the split, the head and the order of rows). `--data`
takes whatever a recipe does, with the columns text and label; `--reviews` is a tab-separated file without a header:
id, rating, text; a rating above 0 is positive. All is done by recipes (`hf_efficient.compress`) and scored and timed
as their ladders are: on the same test rows, from text to answer.

`ours 4x` has a quarter of the teacher's MACs: pruned (`PruningConfig(ratio)`, `--granularity`), then distilled.
`shallow 4x`, its control, has the first layers of the teacher, so many that it has at least the MACs of ours, and the
same training (`macs` has both; `--speeds 3 6` are those of two and one of six layers exactly). `speedup` is over the
teacher in PyTorch within the same run: let nothing else run then. `--exports` adds other runtimes, for the teacher
too. `beaten by` names what is at least as good and faster, by the means over the seeds. A difference is to the
teacher, in points; ± is the standard error over the seeds, with one seed that over the test rows, paired.

Runs lie in `--work`; the same command goes on where it was stopped.
"""

import argparse
import csv
import datetime
import json
import math
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from datasets import disable_progress_bars

from hf_efficient import Recipe, Report, compress
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.size import count_macs
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.models.modes import using_threads
from hf_efficient.reporting.tables import markdown

TEACHER_BASELINES = ["tfidf", "static", "int8"]
TRAINING: dict[str, Any] = {"batch_size": 32, "learning_rate": 3e-4, "losses": {"kd": 1.0, "ce": 0.5, "hidden": 1.0}}
HEADER = ("", "accuracy", "difference, points", "speed-up", "MACs", "weights", "made in", "beaten by")
MACS_LENGTH = 32  # at which they are counted, for the ratios in the table


def read_reviews(path: Path, target: Path) -> Path:
    """The file of reviews as a csv with the columns text and label."""
    lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows((text, "positive" if float(rating) > 0 else "negative") for _, rating, text in rows)
    return target


def export_stages(names: list[str]) -> list[dict[str, Any]]:
    """`onnx-int8` -> `{export: {format: onnx, quantize: int8}}`."""
    pairs = [name.partition("-")[::2] for name in names]
    return [{"export": {"format": kind} | ({"quantize": bits} if bits else {})} for kind, bits in pairs]


class Bench:
    """The cells of one output file: a rung of a data set, seed and speed each."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        names = ("speeds", "granularity", "epochs", "steps", "teacher_epochs", "teacher_steps", "max_length", "limit")
        self.settings = {name: getattr(options, name) for name in (*names, "batch_size", "exports")}
        self.settings |= {"training": TRAINING}
        self.header = {
            "benchmark": "ladder",
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "threads": options.threads,
            "load_average_at_start": list(os.getloadavg()),
        }
        self.cells: dict[tuple[str, int, str], dict[str, Any]] = {}
        if options.output and options.output.is_file():
            old = json.loads(options.output.read_text())
            if old["settings"] != self.settings:
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            self.cells = {(cell["data"], cell["seed"], cell["rung"]): cell for cell in old["cells"]}

    def recipe(self, data: str, seed: int, **changes: Any) -> Recipe:
        options = self.options
        base: dict[str, Any] = {
            "name": "ladder",
            "task": "text-classification",
            "seed": seed,
            "model": {"name_or_path": "bundled:minilm-l6"},
            "data": {"name_or_path": data, "max_length": options.max_length, "limit": options.limit},
            "measure": {"batch_size": options.batch_size, "repeats": options.rounds, "teacher_exports": False},
        }
        return Recipe.from_dict(base | changes)

    def run(self, name: str, data: str, seed: int) -> None:
        """The teacher with what needs it alone, then ours and its control at each speed."""
        options, speeds = self.options, self.options.speeds
        if (
            all((name, seed, f"ours {speed:g}x") in self.cells for speed in speeds)
            and (name, seed, "tfidf") in self.cells
        ):
            return
        folder = options.work / f"{name}-{seed}"
        teacher = {"epochs": options.teacher_epochs, "batch_size": 32, "learning_rate": 1e-4}
        if options.teacher_steps:
            teacher["max_steps"] = options.teacher_steps
        exports = export_stages(options.exports)
        in_8_bits = any(name.endswith("int8") for name in options.exports)  # its own exports are the teacher's
        cheap = [name for name in TEACHER_BASELINES if name != "int8" or not in_8_bits]
        first = self.recipe(data, seed, teacher=teacher, stages=exports, baselines=cheap)
        report = compress(first, output_dir=folder / "teacher", announce=self.announce)
        self.add(report, name, seed, None)
        training = TRAINING | {"epochs": options.epochs} | ({"max_steps": options.steps} if options.steps else {})
        for speed in speeds:
            prune = {"ratio": 1 - 1 / speed, "granularity": options.granularity, "calibration_samples": 256}
            second = self.recipe(
                data,
                seed,
                model={"name_or_path": str(folder / "teacher" / "0-teacher")},
                stages=[{"prune": prune}, {"distill": training}, *exports],
                baselines=["shallow"],
            )
            place = folder / f"{speed:g}x"
            self.add(compress(second, output_dir=place, announce=self.announce), name, seed, speed, place)

    def announce(self, line: str) -> None:
        print(f"    {line}", flush=True)

    def add(self, report: Report, name: str, seed: int, speed: float | None, folder: Path | None = None) -> None:
        """The rungs of a run; `speed` None: that of the teacher, whose own exports the run calls its result's."""
        ladder = report.ladder
        assert ladder is not None
        teacher = next(rung for rung in ladder.rungs if rung.kind == "teacher")
        for rung in ladder.rungs:
            label = {"student": "ours", "export": f"ours {rung.name}"}.get(rung.kind, rung.name)
            if speed is None:
                label = f"teacher {rung.name}" if rung.kind == "export" else rung.name
            elif rung.kind != "teacher":
                label = f"{label} {speed:g}x"
            if (rung.kind == "teacher" and speed is not None) or (rung.kind == "student" and speed is None):
                continue
            self.cells[name, seed, label] = {
                "data": name,
                "seed": seed,
                "rung": label,
                "about": rung.about,
                "speed": speed,
                "score": ladder.score,
                "value": rung.score,
                "standard_error": rung.standard_error,
                "difference": rung.difference,
                "difference_error": rung.difference_error,
                "milliseconds": rung.median_ms,
                "speedup": teacher.median_ms / rung.median_ms,
                "macs": self.macs_of(rung.kind, rung.name, folder),
                "weight_bytes": rung.weight_bytes,
                "seconds": rung.seconds,
                "largest_class": report.student.quality.largest_class if report.student.quality else None,
                "samples": report.student.quality.samples if report.student.quality else None,
                "commit": self.header["commit"],
            }
            print(f"{name} seed {seed} {label}: {100 * rung.score:.1f} ({100 * rung.difference:+.1f})", flush=True)
        self.write()

    def macs_of(self, kind: str, name: str, folder: Path | None) -> float | None:
        """Of ours and of the shallow control, as a part of the teacher's."""
        if folder is None or (kind != "student" and name != "shallow"):
            return None
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        places = (folder / ("model" if kind == "student" else "baseline-shallow"), folder / "0-teacher")
        small, whole = (count_macs(model, dummy_inputs(model, 1, MACS_LENGTH)) for model in map(load, places))
        return round(small / whole, 4)

    def write(self) -> None:
        if self.options.output:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            part = self.options.output.with_suffix(".part")
            report = self.header | {"settings": self.settings, "cells": list(self.cells.values())}
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(self.options.output)


def mean_and_error(cells: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the difference to the teacher over the seeds, in points."""
    values = [100 * cell["difference"] for cell in cells]
    if len(values) == 1:
        return values[0], 100 * cells[0]["difference_error"]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(cells: list[dict[str, Any]]) -> str:
    """Of one data set, the fastest first; below it what ours gains over its controls."""
    rungs: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        rungs.setdefault(cell["rung"], []).append(cell)
    means = {
        name: {key: statistics.fmean(each[key] for each in some) for key in ("value", "speedup", "weight_bytes")}
        for name, some in rungs.items()
    }
    rows = []
    for name in sorted(rungs, key=lambda name: -means[name]["speedup"]):
        some, mean = rungs[name], means[name]
        beaten = [
            other
            for other, its in means.items()
            if its["value"] >= mean["value"] and its["speedup"] > mean["speedup"] and other != name
        ]
        made = [each["seconds"] for each in some if each["seconds"] is not None]
        macs = [each["macs"] for each in some if each["macs"] is not None]
        change = "{:+.1f} ± {:.1f}".format(*mean_and_error(some))
        rows.append(
            (
                name,
                f"{100 * mean['value']:.1f}",
                "" if name == "teacher" else change,
                f"{mean['speedup']:.1f}x",
                f"{statistics.fmean(macs):.3f}" if macs else "",
                f"{mean['weight_bytes'] / 1e6:.1f} MB",
                f"{statistics.fmean(made):.0f} s" if made else "",
                ", ".join(beaten),
            )
        )
    return "\n".join([markdown(HEADER, rows), "", *gains(rungs)])


def gains(rungs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What ours has over the shallow student of at least its MACs, seed by seed."""
    lines = []
    for name, ours in rungs.items():
        control = {cell["seed"]: cell for cell in rungs.get(name.replace("ours", "shallow"), [])}
        if not name.startswith("ours ") or not control:
            continue
        apart = [100 * (cell["value"] - control[cell["seed"]]["value"]) for cell in ours if cell["seed"] in control]
        error = f" ± {statistics.stdev(apart) / math.sqrt(len(apart)):.1f}" if len(apart) > 1 else ""
        lines.append(f"{name} - {name.replace('ours', 'shallow')}: {statistics.fmean(apart):+.1f}{error} points")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, help="tab-separated, without header: id, rating, text")
    parser.add_argument("--data", nargs="*", default=[], help="as data.name_or_path of a recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--speeds", nargs="+", type=float, default=[4.0, 8.0], help="the teacher's MACs over ours")
    parser.add_argument("--granularity", nargs="+", default=["head", "neuron"])
    parser.add_argument("--exports", nargs="*", default=["onnx-int8"], help="such as onnx onnx-int8; none: no export")
    parser.add_argument("--epochs", type=float, default=3.0, help="of distillation (default: 3)")
    parser.add_argument("--steps", type=int, help="of distillation instead of epochs, for a quick look")
    parser.add_argument("--teacher-epochs", type=float, default=2.0)
    parser.add_argument("--teacher-steps", type=int, help="of fine-tuning, for a quick look")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default: 128)")
    parser.add_argument("--batch-size", type=int, default=1, help="texts at a time, where they are timed (default: 1)")
    parser.add_argument("--limit", type=int, help="rows of each data set; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="of timing (default: 20)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/ladder"), help="where the runs are kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    named = {Path(name.split(":")[-1]).stem: name for name in options.data}
    if options.reviews:
        named |= {"reviews": str(read_reviews(options.reviews, options.work / "reviews.csv"))}
    if not named:
        parser.error("name a data set: --reviews FILE, or --data bundled:bbc-news")
    bench = Bench(options)
    with using_threads(options.threads):
        for name, data in named.items():
            for seed in options.seeds:
                bench.run(name, data, seed)
    for name in dict.fromkeys(cell["data"] for cell in bench.cells.values()):
        print(f"\n{name}\n\n{table([cell for cell in bench.cells.values() if cell['data'] == name])}")


if __name__ == "__main__":
    main()
