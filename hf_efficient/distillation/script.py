"""What `scripts/distill.py` does: flags or YAML in, a distilled checkpoint folder out.

    script, args = parse(["--config", "distill.yaml", "--learning_rate", "1e-4"])
    metrics = run(script, args)

A YAML file has the same names as the flags; a flag wins over it. The result in `output_dir` is a plain transformers
model with its tokenizer and `all_results.json`.
"""

import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import evaluate
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from ..data import TASKS, PreparedData, check_labels, load_dataset_any, prepare
from ..errors import CheckpointError, ConfigError, unknown_name
from ..loading import load_config, load_model, load_processor
from ..safe_yaml import parse as parse_yaml
from ..training import MarkComplete, last_checkpoint
from .arguments import DistillationArguments
from .student import build_student
from .trainer import DistillationTrainer

IMAGES = "image-classification"


@dataclass
class ScriptArguments:
    """What is distilled, and on which data; the help of each field says what it means."""

    teacher: str = field(metadata={"help": "Hub id or folder of a trained teacher."})
    dataset: str = field(
        metadata={
            "help": "bundled:NAME, Hub id (user/name or user/name:config), save_to_disk folder, or a .csv, .tsv, "
            ".json, .jsonl, .parquet or .txt file."
        }
    )
    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    student: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the student. Give this or student_layers."}
    )
    student_layers: int | None = field(
        default=None, metadata={"help": "Cut the student from the teacher: keep this many layers of each stack."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Default: found by its usual names."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Second text of a pair, if there is one."})
    label_column: str | None = field(default=None, metadata={"help": "Default: found by its usual names."})
    target_column: str | None = field(default=None, metadata={"help": "Output text of seq2seq."})
    image_column: str | None = field(default=None, metadata={"help": "Default: found by its usual names."})
    max_length: int | None = field(
        default=None, metadata={"help": "In tokens; default: the tokenizer's, at most 512."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "In pixels, where the teacher has no image processor."}
    )
    limit: int | None = field(default=None, metadata={"help": "At most this many rows of each split of the data."})
    test_fraction: float = field(default=0.2, metadata={"help": "Held out where the data has no test split."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the models."})
    overwrite: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        if (self.student is None) == (self.student_layers is None):
            raise ConfigError(
                "Give student (an existing model) or student_layers (cut from the teacher), one of them; "
                f"got student={self.student!r} and student_layers={self.student_layers!r}."
            )
        if self.student_layers is not None and self.student_layers < 1:
            raise ConfigError(f"student_layers must be 1 or more, got {self.student_layers}.")


def parse(words: Sequence[str]) -> tuple[ScriptArguments, DistillationArguments]:
    """Read the flags, and below them the YAML file of `--config`.

    Raises:
        ConfigError: an unknown key in the file, or a value that is not allowed.
    """
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path, help="YAML file with the names of these flags; a flag wins over it.")
    config, rest = first.parse_known_args(words)
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), parents=[first])
    if config.config is not None:
        actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
        values = _read_yaml(config.config)
        for name in values:
            if name not in actions:
                raise unknown_name(f"key in {config.config}", name, actions)
            actions[name].required = False
        parser.set_defaults(**values)
    script, args = parser.parse_args_into_dataclasses(rest)[:2]
    return script, args


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"No such config file: {path}.")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of flag names to values, got {type(values).__name__}.")
    return values


def run(script: ScriptArguments, args: DistillationArguments) -> dict[str, float]:
    """Distil, evaluate and save; gives the metrics of the test split.

    Raises:
        CheckpointError: output_dir is in use, or has nothing to resume from.
        ConfigError, DataError, UnsupportedModelError: see `prepare` and `DistillationTrainer`.
    """
    resume = _checkpoint(script, args)
    trust = {"trust_remote_code": script.trust_remote_code}
    config = load_config(script.teacher, **trust)
    processor = load_processor(script.teacher, images=script.task == IMAGES, **trust)
    with args.main_process_first(desc="data"):
        data = _data(script, processor, seed=args.seed if args.data_seed is None else args.data_seed)
    check_labels(config, data)
    set_seed(args.seed)  # for what is new in the student, such as its head
    teacher = load_model(TASKS[script.task].auto_class, script.teacher, **trust)
    trainer = DistillationTrainer(
        _student(script, teacher),
        args,
        teacher=teacher,
        train_dataset=data.train,
        eval_dataset=data.test,
        data_collator=data.collator,
        callbacks=[MarkComplete()],
        processing_class=processor,
        compute_metrics=_accuracy() if TASKS[script.task].metric == "accuracy" else None,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # closes the process group, whose threads may else abort the interpreter
    return metrics


def _checkpoint(script: ScriptArguments, args: DistillationArguments) -> str | None:
    """The checkpoint to resume from; an output_dir in use is an error unless something was said about it."""
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if resume is not None and resume.lower() not in ("true", "latest"):
        if not Path(resume).is_dir():
            raise CheckpointError(f"resume_from_checkpoint: no such folder {resume!r}; `true` means the latest.")
        return resume
    if resume is not None:
        latest = last_checkpoint(folder)
        if latest is None:
            raise CheckpointError(f"{folder} has no checkpoint to resume from. Leave resume_from_checkpoint out.")
        return latest
    if folder.exists() and any(folder.iterdir()) and not script.overwrite:
        raise CheckpointError(
            f"{folder} is not empty. Choose another output_dir, continue with --resume_from_checkpoint true, or give "
            "--overwrite."
        )
    return None


def _data(script: ScriptArguments, processor: Any, seed: int) -> PreparedData:
    rows = load_dataset_any(
        script.dataset,
        seed=seed,
        limit=script.limit,
        test_fraction=script.test_fraction,
        label_column=script.label_column,
    )
    names = set(inspect.signature(prepare).parameters) & set(vars(script)) - {"dataset", "task"}
    return prepare(rows, script.task, processor, **{name: getattr(script, name) for name in names})


def _student(script: ScriptArguments, teacher: PreTrainedModel) -> PreTrainedModel:
    if script.student_layers is not None:
        return build_student(teacher, script.student_layers)
    labels: dict[str, Any] = {}
    if "label" in TASKS[script.task].columns:
        labels = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
    auto, name = TASKS[script.task].auto_class, str(script.student)
    return load_model(auto, name, trust_remote_code=script.trust_remote_code, **labels)


def _accuracy() -> Callable[[Any], dict[str, float]]:
    with as_file(files("hf_efficient") / "metrics" / "accuracy") as folder:
        metric = evaluate.load(str(folder), keep_in_memory=True)

    def compute(prediction: Any) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    return compute
