"""How each stage of a recipe is carried out: a checkpoint folder in, a checkpoint folder and a few facts out.

    facts = RUNNERS["prune"](run, settings, source, target)

A new stage is one function and one entry of `RUNNERS`. Stages call the same public functions that a user would.
"""

import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .attention.convert import convert_attention
from .bundled import resolve_model
from .data import TASKS, PreparedData, check_labels, load_dataset_any, prepare
from .distillation.arguments import DistillationArguments
from .distillation.trainer import DistillationTrainer
from .errors import CheckpointError
from .models.building import is_portable
from .pruning.prune import prune
from .recipe import Recipe
from .settings import DistillSettings, TrainingSettings
from .stages import AttentionStage, PruneStage
from .training import ExactTrainer
from .verify import output_digest

COMPLETE = "complete"  # marks a Trainer checkpoint that was written to its end
TEACHER = "0-teacher"


class Run:
    """What the stages of one run share: the recipe, the rows and the processor."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self._prepared: dict[int | None, PreparedData] = {}

    @cached_property
    def rows(self):
        data = self.recipe.data
        return load_dataset_any(
            data.name_or_path,
            test_fraction=data.test_fraction,
            seed=self.recipe.seed,
            limit=data.limit,
            label_column=data.label_column,
        )

    @cached_property
    def processor(self):
        """The tokenizer or image processor of the model; None for images that need none."""
        model = self.recipe.model
        if model.name_or_path is None:
            return None
        auto = transformers.AutoImageProcessor if "image" in self.columns else transformers.AutoTokenizer
        return auto.from_pretrained(resolve_model(model.name_or_path), trust_remote_code=model.trust_remote_code)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model that the recipe names, before any weight is loaded."""
        model = self.recipe.model
        if model.config is not None:
            return transformers.AutoConfig.for_model(**model.config)
        name = resolve_model(model.name_or_path)
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of the config without memory for its weights."""
        with torch.device("meta"):
            return getattr(transformers, TASKS[self.recipe.task].auto_class).from_config(config)

    @property
    def columns(self) -> tuple[str, ...]:
        return TASKS[self.recipe.task].columns

    def data(self, max_length: int | None = None) -> PreparedData:
        """Train and test inputs, cut at `max_length` tokens (default: as the recipe says); prepared once."""
        if max_length not in self._prepared:
            self._prepared[max_length] = self._prepare(max_length)
        return self._prepared[max_length]

    def _prepare(self, max_length: int | None) -> PreparedData:
        data = self.recipe.data
        options: dict[str, Any] = {"image_size": data.image_size} if "image" in self.columns else {}
        if "text" in self.columns:
            options["max_length"] = max_length or data.max_length
            options["text_pair_column"] = data.text_pair_column
        names = {f"{role}_column": getattr(data, f"{role}_column") for role in self.columns}
        return prepare(self.rows, self.recipe.task, self.processor, **names, **options)

    def load(self, folder: Path) -> PreTrainedModel:
        auto = getattr(transformers, TASKS[self.recipe.task].auto_class)
        return auto.from_pretrained(folder, trust_remote_code=self.recipe.model.trust_remote_code)

    def save(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Write a checkpoint; returns the facts by which a reload can be recognised."""
        model.save_pretrained(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        return {"class": type(model).__name__, "output_sha256": output_digest(model)}


def run_teacher(run: Run, settings: TrainingSettings | None, source: Path, target: Path) -> dict[str, Any]:
    """Load the model of the recipe and fine-tune it, if the recipe says so."""
    prepared = run.data(settings.max_length if settings else None)
    model = load_model(run, prepared)
    if settings is None:
        check_labels(model.config, prepared)
    else:
        arguments = training_arguments(TrainingArguments, run, settings, target)
        train(ExactTrainer, model, arguments, prepared)
    return {"train": len(prepared.train), "parameters": model.num_parameters()} | run.save(model, target)


def load_model(run: Run, prepared: PreparedData) -> PreTrainedModel:
    """The model that the recipe names, with a head for the labels of the data."""
    asked, labels = run.recipe.model, {}
    if prepared.num_labels is not None:
        labels = {"id2label": dict(enumerate(prepared.label_names)), "num_labels": prepared.num_labels}
        labels["label2id"] = {name: index for index, name in enumerate(prepared.label_names)}
    auto = getattr(transformers, TASKS[run.recipe.task].auto_class)
    if asked.config is not None:
        return auto.from_config(transformers.AutoConfig.for_model(**asked.config | labels))
    if run.recipe.teacher is None:
        labels = {}  # a finished model keeps its own head
    name = resolve_model(asked.name_or_path)
    return auto.from_pretrained(name, trust_remote_code=asked.trust_remote_code, **labels)


def run_attention(run: Run, settings: AttentionStage, source: Path, target: Path) -> dict[str, Any]:
    model = convert_attention(run.load(source), settings.config, layers=settings.layers)
    return run.save(model, target)


def run_prune(run: Run, settings: PruneStage, source: Path, target: Path) -> dict[str, Any]:
    model = run.load(source)
    small = prune(model, settings.config, calibration_batches(run, settings))
    counts = {"parameters_before": model.num_parameters(), "parameters_after": small.num_parameters()}
    return counts | {"loads_with": "portable" if is_portable(small) else "plugin"} | run.save(small, target)


def calibration_batches(run: Run, settings: PruneStage) -> list[dict[str, torch.Tensor]]:
    """The first training rows, in batches; the rows were shuffled when they were split."""
    prepared = run.data()
    count = min(settings.calibration.calibration_samples, len(prepared.train))
    loader = torch.utils.data.DataLoader(
        prepared.train.select(range(count)), batch_size=settings.calibration.batch_size, collate_fn=prepared.collator
    )
    return [dict(batch) for batch in loader]


def run_distill(run: Run, settings: DistillSettings, source: Path, target: Path) -> dict[str, Any]:
    student, teacher = run.load(source), run.load(run.folder / TEACHER)
    prepared = run.data(settings.max_length)
    arguments = training_arguments(
        DistillationArguments, run, settings, target, losses=settings.losses, temperature=settings.temperature
    )
    trainer = train(DistillationTrainer, student, arguments, prepared, teacher=teacher)
    return {"train": len(prepared.train)} | _last_losses(trainer) | run.save(student, target)


RUNNERS: dict[str, Callable[[Run, Any, Path, Path], dict[str, Any]]] = {
    "attention": run_attention,
    "prune": run_prune,
    "distill": run_distill,
}


def training_arguments(
    kind: type[TrainingArguments], run: Run, settings: TrainingSettings, target: Path, **more: Any
) -> TrainingArguments:
    return kind(
        output_dir=str(target / "trainer"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,  # transformers 5: a fraction below 1
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        seed=run.recipe.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


class MarkComplete(TrainerCallback):
    """A killed run may leave half a checkpoint; only marked ones are resumed from."""

    def on_save(self, args, state, control, **kwargs) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def train(
    kind: type[Trainer], model: PreTrainedModel, arguments: TrainingArguments, prepared: PreparedData, **more: Any
) -> Trainer:
    """Train from the start, or from the last complete checkpoint of a run that was stopped; then tidy up."""
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        data_collator=prepared.collator,
        callbacks=[MarkComplete()],
        **more,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(arguments.output_dir)))
    _remove_tree(Path(arguments.output_dir))
    return trainer


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete Trainer checkpoint; incomplete ones are removed."""
    complete = []
    for path in sorted(folder.glob("checkpoint-*")):
        if (path / COMPLETE).is_file():
            complete.append(path)
        else:
            _remove_tree(path)
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error}") from error


def _last_losses(trainer: Trainer) -> dict[str, float]:
    for entry in reversed(trainer.state.log_history):
        losses = {key: value for key, value in entry.items() if key.startswith("loss_")}
        if losses:
            return losses
    return {}
