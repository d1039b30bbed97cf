"""What a student of half the layers learns from labels alone, and what each loss of its teacher adds, at equal steps.

    python benchmarks/distillation_quality.py --reviews reviews.tsv --output \
        benchmarks/results/distillation_quality_cpu.json
    python benchmarks/distillation_quality.py --jobs digits --seeds 0                            # a quick look

Six jobs; in each the same student, rows, batches and number of steps for all mixes of losses:

    reviews     all-MiniLM-L6-v2 fine-tuned on 8,500 snippets of film reviews (--reviews PATH)   accuracy
    reviews-3   the same, three epochs                                                            accuracy
    bbc-news    the same for 5 topics of 1,276 articles                                           accuracy
    language    a Llama of 4 layers, trained from scratch on the articles, 256 tokens             perplexity
    digits      a ViT of 4 layers, trained from scratch on 8 x 8 images                           accuracy
    headlines   a T5 of 4 + 4 layers, trained from scratch: an article's first line from the rest perplexity

The student is `build_student(teacher, layers)`: half of the layers, from the first to the last. The weights of a mix
are 1 for kd, hidden and relation and 0.5 for ce beside them, temperature 2; they were set before anything was measured
and are the same for all jobs. `untrained` is the student before its first step. `agreement` is the fraction of test
rows or tokens at which teacher and student say the same. Teachers are kept in `--work`; a cell is written as soon as
it is measured, and the same command goes on with those that are missing.
"""

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pruning
import quality
import transformers
from datasets import disable_progress_bars
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_efficient import DistillationArguments, DistillationTrainer, build_student
from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import PreparedData, prepare
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.quality import compare_quality, evaluate_quality
from hf_efficient.models.modes import using_threads
from hf_efficient.reporting.tables import markdown

MIXES: dict[str, dict[str, float]] = {
    "ce": {"ce": 1.0},
    "kd": {"ce": 0.5, "kd": 1.0},
    "kd+hidden": {"ce": 0.5, "kd": 1.0, "hidden": 1.0},
    "kd+hidden+relation": {"ce": 0.5, "kd": 1.0, "hidden": 1.0, "relation": 1.0},
}
UNTRAINED = "untrained"
TEMPERATURE = 2.0
VIT = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
T5 = {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4, "d_ff": 256}


@dataclass(frozen=True)
class Job:
    """`make(options, seed)` gives the teacher, untrained unless `teacher_steps` is 0, and the rows."""

    make: Callable[[argparse.Namespace, int], tuple[PreTrainedModel, PreparedData]]
    layers: int
    batch: int
    steps: int
    rate: float
    teacher_steps: int = 0
    teacher_rate: float = 0.0


def classifier(name: str) -> Callable[[argparse.Namespace, int], tuple[PreTrainedModel, PreparedData]]:
    def make(options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, PreparedData]:
        job = pruning.JOBS[name]
        data = pruning.read_job(job, options)
        return pruning.make_teacher(name, job, seed, data, options), data

    return make


def language(options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, PreparedData]:
    return quality.language(options)


def digits(options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, PreparedData]:
    rows = load_dataset_any("bundled:digits", test_fraction=0.2, seed=0)
    data = prepare(rows, "image-classification", None, image_column="image", label_column="label")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=data.num_labels)), data


def headlines(options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, PreparedData]:
    rows = load_dataset_any("bundled:bbc-news", test_fraction=0.2, seed=0)
    tokenizer = quality.train_tokenizer(rows["train"]["text"])

    def cut(row: dict[str, Any]) -> dict[str, str]:
        title, _, body = row["text"].strip().partition("\n")
        return {"text": body.strip(), "target": title.strip() + tokenizer.eos_token}

    rows = rows.map(cut).filter(lambda row: bool(row["text"]))
    data = prepare(rows, "seq2seq", tokenizer, max_length=128)
    config = transformers.T5Config(
        **T5, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), data


JOBS = {
    "reviews": Job(classifier("reviews"), 3, 32, 266, 1e-4),
    "reviews-3": Job(classifier("reviews"), 3, 32, 798, 1e-4),
    "bbc-news": Job(classifier("bbc-news"), 3, 16, 160, 1e-4),
    "digits": Job(digits, 2, 32, 200, 1e-3, 900, 1e-3),
    "language": Job(language, 2, 8, 200, 1e-3, 800, 2e-3),
    "headlines": Job(headlines, 2, 16, 200, 1e-3, 600, 2e-3),
}


def fit(model: PreTrainedModel, data: PreparedData, job: Job, seed: int, losses=None, teacher=None) -> PreTrainedModel:
    """In place: the teacher of a job, or with `losses` its student."""
    settings: dict[str, Any] = {
        "max_steps": job.steps if losses else job.teacher_steps,
        "learning_rate": job.rate if losses else job.teacher_rate,
        "per_device_train_batch_size": job.batch,
        "warmup_steps": 0.1,  # a fraction
        "lr_scheduler_type": "linear",
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if "input_ids" in data.train.column_names:
        settings["train_sampling_strategy"] = "group_by_length"
    with tempfile.TemporaryDirectory() as output:
        more: dict[str, Any] = {"train_dataset": data.train, "data_collator": data.collator}
        if losses is None:
            trainer: Trainer = Trainer(model, TrainingArguments(output, **settings), **more)
        else:
            args = DistillationArguments(output, losses=losses, temperature=TEMPERATURE, **settings)
            trainer = DistillationTrainer(model, args, teacher=teacher, **more)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model.eval()


def make_teacher(name: str, seed: int, options: argparse.Namespace) -> tuple[PreTrainedModel, PreparedData]:
    job = JOBS[name]
    transformers.set_seed(seed)
    model, data = job.make(options, seed)
    if not job.teacher_steps:
        return model, data
    folder = options.work / f"{name}-{seed}-{job.teacher_steps}"
    if (folder / "config.json").is_file():
        return type(model).from_pretrained(folder).eval(), data
    fit(model, data, job, seed).save_pretrained(folder)
    return model, data


class Bench:
    """The cells of one output file."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.settings = {"mixes": MIXES, "temperature": TEMPERATURE}
        self.settings |= {f"{name}_steps": job.steps for name, job in JOBS.items()}
        self.header = {
            "benchmark": "distillation_quality",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "threads": options.threads,
            "load_average_at_start": list(os.getloadavg()),
        }
        self.cells: dict[tuple[str, int, str], dict[str, Any]] = {}
        if options.output and options.output.is_file():
            old = json.loads(options.output.read_text())
            if {**self.settings, **old["settings"]} != self.settings:  # a new job is no other setting
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            self.cells = {(cell["job"], cell["seed"], cell["mix"]): cell for cell in old["cells"]}

    def run(self) -> None:
        for seed in self.options.seeds:
            for name in self.options.jobs:
                missing = [mix for mix in (UNTRAINED, *MIXES) if (name, seed, mix) not in self.cells]
                if missing:
                    self.measure(name, seed, missing)

    def measure(self, name: str, seed: int, mixes: list[str]) -> None:
        job = JOBS[name]
        teacher, data = make_teacher(name, seed, self.options)
        test = data.test if "pixel_values" in data.test.column_names else pruning.by_length(data.test)
        reference = evaluate_quality(teacher, test, data.collator, data.task)
        for mix in mixes:
            student = build_student(teacher, job.layers).eval()
            if mix != UNTRAINED:
                fit(student, data, job, seed, MIXES[mix], teacher)
            found = evaluate_quality(student, test, data.collator, data.task)
            compared = compare_quality(reference, found)
            self.cells[name, seed, mix] = {
                "job": name,
                "seed": seed,
                "mix": mix,
                "metric": found.quality.main.name,
                "teacher": reference.quality.main.value,
                "value": found.quality.main.value,
                "standard_error": found.quality.main.standard_error,
                "agreement": compared.agreement,
                "commit": self.header["commit"],
            }
            print({key: value for key, value in self.cells[name, seed, mix].items() if key != "commit"}, flush=True)
            self.write()

    def write(self) -> None:
        if self.options.output:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            part = self.options.output.with_suffix(".part")
            cells = [self.cells[key] for key in sorted(self.cells)]
            part.write_text(json.dumps(self.header | {"settings": self.settings, "cells": cells}, indent=1) + "\n")
            part.replace(self.options.output)


def summary(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """By job and mix the mean over seeds and its standard deviation; `gain` is that over ce, seed by seed."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    by_key = {(cell["job"], cell["mix"], cell["seed"]): cell for cell in cells}
    for job, mix in sorted({(cell["job"], cell["mix"]) for cell in cells}):
        own = [cell for cell in cells if (cell["job"], cell["mix"]) == (job, mix)]
        gains = [c["value"] - by_key[job, "ce", c["seed"]]["value"] for c in own if (job, "ce", c["seed"]) in by_key]
        agreements = [cell["agreement"] for cell in own if cell["agreement"] is not None]
        found[job, mix] = {
            "seeds": len(own),
            "teacher": _mean([cell["teacher"] for cell in own]),
            "value": _mean([cell["value"] for cell in own]),
            "spread": _spread([cell["value"] for cell in own]),
            "gain": _mean(gains),
            "gain_spread": _spread(gains),
            "agreement": _mean(agreements),
        }
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _spread(values: list[float]) -> float:
    mean = _mean(values)
    return (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5


def table(cells: list[dict[str, Any]]) -> str:
    """One line for each job and mix."""
    metrics = {cell["job"]: cell["metric"] for cell in cells}
    rows = []
    for job in JOBS:
        for mix in (UNTRAINED, *MIXES):
            values = summary(cells).get((job, mix))
            if values is not None:
                scale = 100 if metrics[job] == "accuracy" else 1
                digits_ = 1 if scale == 100 else 2
                rows.append(
                    [
                        job,
                        mix,
                        f"{scale * values['teacher']:.{digits_}f}",
                        f"{scale * values['value']:.{digits_}f} ± {scale * values['spread']:.{digits_}f}",
                        f"{scale * values['gain']:+.{digits_}f} ± {scale * values['gain_spread']:.{digits_}f}",
                        f"{100 * values['agreement']:.1f}",
                    ]
                )
    return markdown(["job", "losses", "teacher", "student", "against ce", "agreement, %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, help="tab-separated, without header: id, rating, text")
    parser.add_argument("--jobs", nargs="+", choices=JOBS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/distillation"), help="where teachers are kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.limit = options.teacher_steps = None
    options.jobs = options.jobs or [name for name in JOBS if not name.startswith("reviews") or options.reviews]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    bench = Bench(options)
    with using_threads(options.threads):
        bench.run()
    print(f"\n{table(list(bench.cells.values()))}")


if __name__ == "__main__":
    main()
