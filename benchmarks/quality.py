"""What each attention kind costs in quality: as converted, after attention transfer, and after a short distillation.

    python benchmarks/quality.py --reviews reviews.tsv --output benchmarks/results/quality_cpu.json
    python benchmarks/quality.py --jobs language --kinds local hedgehog --steps 5 --limit 100       # a quick look

Three jobs; in each the same model, rows, batches and number of steps for all kinds, and `dense` as the control, which
gets the same extra training:

    bbc-news    MiniLM with a head for 5 topics, fine-tuned on the articles, 128 tokens       accuracy
    reviews     the same for positive or negative snippets of film reviews (--reviews PATH)   accuracy
    language    a Llama of 4 layers, trained from scratch on the articles, 256 tokens         perplexity

`--reviews` is a tab-separated file without a header: id, rating, text; a rating above 0 is positive. Without it that
job is left out. Windows, blocks and buckets are set so that a query of each sparse kind sees about as many keys
(`near` tokens to each side), far fewer than there are.

`converted` has had no training. `transferred`: the learned parts were fitted to softmax attention
(`--transfer-steps`), in the kinds that have any. `distilled`: from there, `--steps` of training against the dense
model (kd 1, ce 0.5). Each cell is written as soon as it is measured; the same command goes on with those that are
missing. ± is one standard error over the test rows; one seed: differences within two of them may be chance.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import ClassLabel, Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_efficient import AttentionConfig, DistillationArguments, DistillationTrainer, convert_attention
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.data.bundled import bundled_model
from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import PreparedData, prepare
from hf_efficient.distillation.transfer import TransferTrainer, find_attentions
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.measurement.quality import Evaluation, compare_quality, evaluate_quality
from hf_efficient.models.modes import using_threads
from hf_efficient.reporting.schema import Score
from hf_efficient.reporting.tables import format_score, markdown
from hf_efficient.training.trainers import ExactTrainer

STAGES = ("converted", "transferred", "distilled")
SEED = 0
VOCABULARY = 2048  # of the language model's tokenizer, trained on the same texts
LLAMA = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


def variants(near: int) -> dict[str, AttentionConfig]:
    """What is compared, for inputs in which `near` tokens to each side are few."""
    settings = {
        "dense": AttentionConfig(),
        "local": AttentionConfig("local", window=near, global_tokens=1),
        "strided": AttentionConfig("strided", block_size=near, num_blocks=1, global_tokens=1),
        "topk": AttentionConfig("topk", block_size=near // 2, top_k=4, global_tokens=1),
        "lsh": AttentionConfig("lsh", block_size=near, num_hashes=2, num_buckets=8),
        "elu": AttentionConfig("linear"),
        "relu": AttentionConfig("linear", feature_map="relu"),
        "favor": AttentionConfig("linear", feature_map="favor", feature_dim=64),
        "hedgehog": AttentionConfig("linear", feature_map="hedgehog"),
        "local_linear": AttentionConfig("local_linear", window=near, feature_map="hedgehog"),
        "additive": AttentionConfig("additive"),
        "kernel": AttentionConfig("kernel"),
    }
    return {name: config for name, config in settings.items() if config.kind == "full" or config.kind in ATTENTIONS}


@dataclass(frozen=True)
class Job:
    """One model and data set: `make(options)` gives the untrained model and the rows."""

    task: str
    near: int
    batch: int
    teacher_steps: int
    teacher_rate: float
    rate: float
    make: Callable[[argparse.Namespace], tuple[PreTrainedModel, PreparedData]]


def bbc_news(options: argparse.Namespace) -> tuple[PreTrainedModel, PreparedData]:
    return classifier(split("bundled:bbc-news", options), length=128)


def reviews(options: argparse.Namespace) -> tuple[PreTrainedModel, PreparedData]:
    lines = options.reviews.read_text(encoding="utf-8", errors="ignore").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    texts = {text.strip(): int(float(rating) > 0) for _, rating, text in rows}  # each text once
    data = Dataset.from_dict({"text": list(texts), "label": list(texts.values())})
    data = data.cast_column("label", ClassLabel(names=["negative", "positive"]))
    return classifier(split(data, options), length=64)


def split(source: Any, options: argparse.Namespace) -> Any:
    """At most `--limit` rows, one in five of them for the test."""
    return load_dataset_any(source, test_fraction=0.2, seed=SEED, limit=options.limit)


def classifier(rows: Any, length: int) -> tuple[PreTrainedModel, PreparedData]:
    folder = bundled_model("minilm-l6")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = prepare(rows, "text-classification", tokenizer, max_length=length)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=data.num_labels)
    return model, data


def language(options: argparse.Namespace) -> tuple[PreTrainedModel, PreparedData]:
    rows = split("bundled:bbc-news", options)
    data = prepare(rows, "causal-lm", train_tokenizer(rows["train"]["text"]), max_length=256)
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=256, pad_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config), data


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, VOCABULARY, special_tokens=["<end>"], show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(f"{folder}/tokenizer.json")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json", eos_token="<end>", pad_token="<end>"
        )


JOBS = {
    "bbc-news": Job("text-classification", 8, 16, 100, 1e-4, 1e-4, bbc_news),
    "reviews": Job("text-classification", 4, 32, 150, 1e-4, 1e-4, reviews),
    "language": Job("causal-lm", 16, 8, 800, 2e-3, 1e-3, language),
}


def arguments(kind: type[TrainingArguments], steps: int, batch: int, rate: float, **more: Any) -> TrainingArguments:
    """Quiet, with nothing on disk but an empty folder."""
    return kind(
        output_dir=tempfile.mkdtemp(prefix="quality-"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        warmup_steps=0.1,  # a fraction
        lr_scheduler_type="linear",
        seed=SEED,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


def fit(trainer_class: type, model: PreTrainedModel, args: TrainingArguments, data: PreparedData, **more: Any) -> None:
    trainer = trainer_class(model=model, args=args, train_dataset=data.train, data_collator=data.collator, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    Path(args.output_dir).rmdir()


def make_teacher(name: str, job: Job, options: argparse.Namespace) -> tuple[PreTrainedModel, PreparedData]:
    """The dense model of a job, trained once and kept in `--work`."""
    transformers.set_seed(SEED)
    model, data = job.make(options)
    folder = options.work / f"{name}-{options.limit}-{options.teacher_steps or job.teacher_steps}"
    if (folder / "config.json").is_file():
        return type(model).from_pretrained(folder), data
    steps = options.teacher_steps or job.teacher_steps
    fit(ExactTrainer, model, arguments(TrainingArguments, steps, job.batch, job.teacher_rate), data)
    model.eval().save_pretrained(folder)
    return model, data


class Bench:
    """The cells of one output file, and how a missing one is measured."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.cells: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.header = {
            "benchmark": "quality",
            "commit": package_commit(),
            "date": datetime.date.today().isoformat(),
            "environment": asdict(Environment.collect()),
            "threads": options.threads,
            "load_average_at_start": list(os.getloadavg()),
        }
        self.settings = {
            name: getattr(options, name) for name in ("steps", "transfer_steps", "limit", "teacher_steps")
        }
        self.settings |= {"seed": SEED, "jobs": {n: {"near": job.near, "batch": job.batch} for n, job in JOBS.items()}}
        if options.output and options.output.is_file():
            old = json.loads(options.output.read_text())
            if old["settings"] != self.settings:
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            self.cells = {(cell["job"], cell["kind"], cell["stage"]): cell for cell in old["cells"]}

    def run(self, name: str, job: Job) -> None:
        """All missing cells of a job."""
        chosen = {n: config for n, config in variants(job.near).items() if n in self.options.kinds}
        if all((name, kind, "distilled") in self.cells for kind in chosen):
            return
        teacher, data = make_teacher(name, job, self.options)
        reference = evaluate_quality(teacher, data.test, data.collator, job.task)
        for kind, config in chosen.items():
            if (name, kind, "distilled") not in self.cells:
                self.run_kind(name, job, kind, config, teacher, data, reference)

    def run_kind(
        self,
        name: str,
        job: Job,
        kind: str,
        config: AttentionConfig,
        teacher: PreTrainedModel,
        data: PreparedData,
        reference: Evaluation,
    ) -> None:
        """The stages of one kind, each from the model of the one before."""
        transformers.set_seed(SEED)
        model = convert_attention(teacher, config)

        def measure(stage: str, start: float) -> None:
            found = evaluate_quality(model, data.test, data.collator, job.task)
            self.add(name, kind, config, stage, found, reference, time.perf_counter() - start)

        measure("converted", time.perf_counter())
        if any(attention.is_learned for attention in find_attentions(model).values()):
            start = time.perf_counter()
            args = arguments(TrainingArguments, self.options.transfer_steps, job.batch, 1e-2)
            fit(TransferTrainer, model, args, data)
            measure("transferred", start)
        start = time.perf_counter()
        losses = {"kd": 1.0, "ce": 0.5}
        args = arguments(DistillationArguments, self.options.steps, job.batch, job.rate, losses=losses)
        fit(DistillationTrainer, model, args, data, teacher=convert_attention(teacher, AttentionConfig()))
        measure("distilled", start)

    def add(
        self,
        job: str,
        kind: str,
        config: AttentionConfig,
        stage: str,
        found: Evaluation,
        reference: Evaluation,
        seconds: float,
    ) -> None:
        compared, score = compare_quality(reference, found), found.quality.main
        cell = {
            "job": job,
            "kind": kind,
            "settings": config.to_dict(),
            "stage": stage,
            "score": score.name,
            "value": score.value,
            "standard_error": score.standard_error,
            "difference_from_teacher": compared.difference,
            "difference_error": compared.standard_error,
            "agreement_with_teacher": compared.agreement,
            "samples": found.quality.samples,
            "targets": found.quality.targets,
            "seconds": round(seconds, 1),
        }
        self.cells[job, kind, stage] = cell
        print(f"{job} {kind} {stage}: {format_score(score)} ({seconds:.0f} s)", flush=True)
        if self.options.output:
            report = self.header | {"settings": self.settings, "cells": list(self.cells.values())}
            part = self.options.output.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(self.options.output)

    def table(self) -> str:
        """Kinds down, jobs and stages across."""
        jobs = list(dict.fromkeys(job for job, _, _ in self.cells))
        kinds = list(dict.fromkeys(kind for _, kind, _ in self.cells))
        header = ["", *(f"{job}, {stage}" for job in jobs for stage in STAGES)]
        rows = [[kind, *(self.shown(job, kind, stage) for job in jobs for stage in STAGES)] for kind in kinds]
        return markdown(header, rows)

    def shown(self, job: str, kind: str, stage: str) -> str:
        cell = self.cells.get((job, kind, stage))
        return format_score(Score(cell["score"], cell["value"], cell["standard_error"], True)) if cell else ""


def describe_training(kinds: list[str]) -> str:
    """Which kinds need training after conversion, as their classes say."""
    named = {n: config.kind for n, config in variants(8).items() if n in kinds and config.kind != "full"}
    needing = [name for name, config in variants(8).items() if name in named and needs_training(config)]
    others = [name for name in named if name not in needing]
    return (
        f"Need training after conversion: {', '.join(needing) or 'none'}. "
        f"Usable as converted, if what they leave out does not matter: {', '.join(others) or 'none'}."
    )


def needs_training(config: AttentionConfig) -> bool:
    return ATTENTIONS[config.kind].needs_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(variants(8))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--kinds", nargs="+", choices=known, default=known)
    parser.add_argument("--steps", type=int, default=20, help="of distillation (default: 20)")
    parser.add_argument("--transfer-steps", type=int, default=20, help="of attention transfer (default: 20)")
    parser.add_argument("--teacher-steps", type=int, help="of the dense model; default: 100 to 800, by job")
    parser.add_argument("--limit", type=int, default=1500, help="rows of each data set, a fifth for the test")
    parser.add_argument("--reviews", type=Path, help="tab-separated, without header: id, rating, text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="where the dense models are kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(options)
    with using_threads(options.threads):
        for name in options.jobs:
            if name != "reviews" or options.reviews:
                bench.run(name, JOBS[name])
    print(f"\n{bench.table()}\n\n{describe_training(options.kinds)}")


if __name__ == "__main__":
    main()
