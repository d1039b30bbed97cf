"""What `scripts/distill.py` does: flags or YAML in, a distilled checkpoint folder out.

    script, args = read(["--config", "distill.yaml", "--learning_rate", "1e-4"])
    metrics = run(script, args)

The result in `output_dir` is a transformers model with its tokenizer and `all_results.json`; for
sentence-embeddings a folder of sentence-transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from ...data.preparation import check_labels
from ...data.sentence_modules import SentenceModules
from ...data.tasks import TASKS
from ...distillation.arguments import DistillationArguments
from ...distillation.cache.cache import TeacherCache
from ...distillation.student import build_student
from ...distillation.terms import LOSSES, check_losses
from ...distillation.trainer import DistillationTrainer
from ...errors import CheckpointError, ConfigError
from ...io.text import show
from ...measurement.scores import METRICS, check_metrics, for_trainer, load_metrics
from ...models.heads import state_problem
from ...models.loading import load_config, load_model
from ...models.sentences import modules_of, write_modules
from ...training.ranks import leave_processes
from ...training.trainers import MarkComplete, last_checkpoint
from .dry_run import describe
from .flags import DataArguments, parse


@dataclass
class ScriptArguments(DataArguments):
    """What is distilled, and on which data; the help of each field says what it means."""

    student: str | None = HfArg(default=None, help="Hub id or folder of the student. Give this or student_layers.")
    student_layers: int | None = HfArg(
        default=None, help="Cut the student from the teacher: keep this many layers of each stack."
    )
    student_heads: int | None = HfArg(
        default=None, help="With student_layers: keep this many attention heads of each layer."
    )
    student_neurons: int | None = HfArg(
        default=None, help="With student_layers: keep this many neurons of each feed-forward network."
    )
    student_hidden_size: int | None = HfArg(default=None, help="With student_layers: the width of the hidden states.")
    teacher_cache: str | None = HfArg(
        default=None, help="Folder of scripts/cache_teacher.py with the teacher's answers to these data."
    )
    metrics: list[str] | None = HfArg(
        default=None, help=f"Further scores of classes: {', '.join(METRICS)}; with trust_remote_code any of evaluate."
    )
    dry_run: bool = HfArg(
        default=False, help="Check all of it, try one batch, print what would be done, and write nothing."
    )
    overwrite: bool = HfArg(default=False, help="Write into an output_dir that is not empty.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics or [], self.task, trusted=self.trust_remote_code)
        if (self.student is None) == (self.student_layers is None):
            raise ConfigError(
                "Give student (an existing model) or student_layers (cut from the teacher), one of them; "
                f"got student={self.student!r} and student_layers={self.student_layers!r}."
            )
        if self.teacher is None and (self.student is None or self.teacher_cache is not None):
            raise ConfigError("Give teacher, whose layers student_layers cuts and whose answers teacher_cache holds.")
        if self.student_layers is None and (self.student_heads or self.student_neurons or self.student_hidden_size):
            raise ConfigError(
                "student_heads, student_neurons and student_hidden_size cut the teacher: give student_layers too."
            )
        if self.student_layers is not None and self.student_layers < 1:
            raise ConfigError(f"student_layers must be 1 or more, got {self.student_layers}.")
        if self.teacher_cache is not None and self.task == "masked-lm":
            raise ConfigError("masked-lm has other masks in every epoch: leave teacher_cache out.")

    @property
    def source(self) -> str:
        return str(self.student if self.teacher is None else self.teacher)


def read(words: Sequence[str]) -> tuple[ScriptArguments, DistillationArguments]:
    """The flags of `scripts/distill.py`; ConfigError for what is not allowed, or losses of another task."""
    script, args = parse(words, (ScriptArguments, DistillationArguments))
    check_losses(args.losses, headless=not TASKS[script.task].trains)
    if script.teacher is None and (needing := [name for name in args.losses if LOSSES[name].needs_teacher]):
        raise ConfigError(f"The losses {', '.join(needing)} need a teacher. Give teacher, or losses: {{ce: 1}}.")
    return script, args


def run(script: ScriptArguments, args: DistillationArguments) -> dict[str, float]:
    """Distil, evaluate and save; gives the metrics of the test split. A dry run gives those of nothing.

    Raises:
        CheckpointError: output_dir is in use, or has nothing to resume from.
        ConfigError, DataError, UnsupportedModelError: see `prepare` and `DistillationTrainer`.
    """
    resume, task = _checkpoint(script, args), TASKS[script.task]
    names = ["accuracy", *(script.metrics or [])] if task.metric == "accuracy" else []
    by_name = load_metrics(names, trusted=script.trust_remote_code)
    is_new = not Path(args.output_dir).exists()
    config = load_config(script.source, trust_remote_code=script.trust_remote_code)
    cache = None if script.teacher_cache is None else TeacherCache(script.teacher_cache)
    processor = script.load_processor()
    with args.main_process_first(desc="data"):
        data = script.load_data(processor, seed=args.seed if args.data_seed is None else args.data_seed)
    check_labels(config, data)
    modules = _modules(script, args)
    set_seed(args.seed)  # for what is new in the student, such as its head
    needs_model = script.teacher is not None and (cache is None or script.student_layers is not None)
    teacher = script.load_teacher() if needs_model else None
    scores = _span_accuracy if task.kind == "spans" else None  # a perplexity is exp of `eval_loss_ce`
    if by_name:
        scores = for_trainer(by_name, data.num_labels or 0)
    student = _student(script, config, teacher)
    for model in (student, teacher):
        state_problem(model, data.problem)
    if modules is not None:
        modules.check_width(student.config.hidden_size)
    trainer = DistillationTrainer(
        student,
        args,
        teacher=cache or teacher,
        train_dataset=data.train,
        eval_dataset=data.test,
        data_collator=data.collator,
        callbacks=[MarkComplete()],
        processing_class=processor,
        compute_metrics=scores,
        preprocess_logits_for_metrics=_predictions,
    )
    if script.dry_run:
        plan = describe(trainer)
        if args.process_index == 0:
            show(plan)
            if is_new:
                Path(args.output_dir).rmdir()  # the Trainer has made it
        return {}
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if modules is not None and args.should_save:
        write_modules(modules, trainer.model.config, processor, args.output_dir)
    leave_processes(trainer.accelerator)
    return metrics


def _modules(script: ScriptArguments, args: DistillationArguments) -> SentenceModules | None:
    """The chain of a student that comes with one, else that of the teacher; None where the task is not that of
    sentence-transformers."""
    directions = bool(args.losses.get("embedding")) and args.embedding_loss == "cosine"
    names = [name for name in (script.student, script.teacher) if name is not None]
    found = [modules_of(script.task, name, args.pooling, normalize=directions) for name in names]
    chains = [chain for chain in found if chain is not None]
    for chain in chains:
        if chain.pooling is not None:
            chain.check_taught(args.pooling, directions)
    return next((chain for chain in chains if not chain.is_new), chains[0] if chains else None)


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


def _student(script: ScriptArguments, config: Any, teacher: PreTrainedModel | None) -> PreTrainedModel:
    if script.student_layers is not None and teacher is not None:
        return build_student(
            teacher,
            script.student_layers,
            heads=script.student_heads,
            neurons=script.student_neurons,
            hidden_size=script.student_hidden_size,
        )
    labels: dict[str, Any] = {}
    if "label" in TASKS[script.task].columns:
        labels = {"id2label": config.id2label, "label2id": config.label2id}
    auto, name = TASKS[script.task].auto_class, str(script.student)
    return load_model(auto, name, trust_remote_code=script.trust_remote_code, new_head=True, **labels)


def _predictions(logits: Any, labels: Any) -> Any:
    if isinstance(logits, tuple):  # the first and the last token of an answer
        return tuple(each.argmax(dim=-1) for each in logits)
    return logits.argmax(dim=-1)


def _span_accuracy(prediction: Any) -> dict[str, float]:
    right = [guess == answer for guess, answer in zip(prediction.predictions, prediction.label_ids, strict=True)]
    return {"span_accuracy": float((right[0] & right[1]).mean())}
