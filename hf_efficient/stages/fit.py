"""How a stage of a recipe trains: the arguments and the trainer that its settings mean, and a run that goes on.

trainer = make_trainer(ExactTrainer, model, training_arguments(TrainingArguments, run, settings, target), prepared)
fit(trainer)
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..data.preparation import PreparedData
from ..io.disk import remove_own
from ..pruning.gradual.zeros import KeepZeros, was_sparsified
from ..training.batch import base_of
from ..training.lengths import BY_LENGTH
from ..training.precision import precision_arguments
from ..training.progress import StepLines
from ..training.ranks import count, from_main, meet, on_cpu, on_main
from ..training.trainers import ExactTrainer, MarkComplete, SaveNowAndThen, in_smaller_batches, last_checkpoint
from .base import Run
from .settings import TrainingSettings


def trained(run: Run, settings: TrainingSettings, work: Callable[[int], Any]) -> tuple[Any, dict[str, Any]]:
    """What `work(batch_size)` gives, and what the report says where memory allowed only smaller batches."""
    result, size = in_smaller_batches(work, settings.batch_size, run.recipe.seed)
    if size == settings.batch_size:
        return result, {}
    return result, {"batch_size_used": size, "gradient_accumulation_steps": settings.batch_size // size}


def training_arguments(
    kind: type[TrainingArguments], run: Run, settings: TrainingSettings, target: Path, batch_size: int, **more: Any
) -> TrainingArguments:
    """`batch_size`: a divisor of the one in the settings, which as many accumulated batches make up. It is that of all
    processes together."""
    precision = precision_arguments(settings.mixed_precision)
    if settings.group_by_length and run.task.has_lengths:
        more["train_sampling_strategy"] = BY_LENGTH
    return kind(
        output_dir=str(target / "trainer"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=batch_size // count(),
        per_device_eval_batch_size=batch_size // count(),
        gradient_accumulation_steps=settings.batch_size // batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,  # transformers 5: a fraction below 1
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        seed=run.recipe.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        # Without being told, accelerate shares no work there and refuses bf16.
        use_cpu=(count() > 1 and on_cpu()) or (bool(precision) and not torch.accelerator.is_available()),
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **precision,
        **more,
    )


class KeepUseCache(TrainerCallback):
    """The Trainer turns the cache off in the config of its model; what is saved in the end says it as before."""

    def __init__(self, model: Any):
        self.caches = getattr(base_of(model).config, "use_cache", None)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.caches is not None:
            base_of(model).config.use_cache = self.caches


def first_batches(prepared: PreparedData, samples: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The first training rows, in batches; the rows were shuffled when they were split."""
    rows = prepared.train.select(range(min(samples, len(prepared.train))))
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=prepared.collator)
    return [dict(batch) for batch in loader]


def make_trainer(
    kind: type[Trainer],
    model: PreTrainedModel,
    arguments: TrainingArguments,
    prepared: PreparedData,
    callbacks: Sequence[TrainerCallback] = (),
    **more: Any,
) -> Any:
    """`callbacks` come first: a checkpoint is complete when they have written what is theirs."""
    first = [KeepUseCache(model), *([KeepZeros()] if was_sparsified(model) else [])]
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        data_collator=prepared.collator,
        callbacks=[*first, *callbacks, StepLines(), SaveNowAndThen(), MarkComplete()],
        **more,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def make_tuner(
    run: Run, model: PreTrainedModel, settings: TrainingSettings, prepared: PreparedData, target: Path, batch_size: int
) -> Any:
    """The trainer of a model by its labels alone.

    Of several processes that of a student without a teacher: it alone divides by what counts in all of them.
    """
    if count() == 1:
        arguments = training_arguments(TrainingArguments, run, settings, target, batch_size)
        return make_trainer(ExactTrainer, model, arguments, prepared)
    from ..distillation.arguments import DistillationArguments
    from ..distillation.trainer import DistillationTrainer

    labels = training_arguments(DistillationArguments, run, settings, target, batch_size, losses={"ce": 1.0})
    return make_trainer(DistillationTrainer, model, labels, prepared)


def fit(trainer: Trainer) -> None:
    """Train from the start, or from the last complete checkpoint of a run that was stopped; then tidy up."""
    folder = str(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=from_main(lambda: last_checkpoint(Path(folder))))
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # whose forward was mixed precision
    meet()  # each writes its own part of a checkpoint
    on_main(lambda: remove_own(folder))


def logged_losses(trainer: Trainer) -> dict[str, Any]:
    """What was logged while training: the terms of the last entry, and all as a curve."""
    curve = [
        {"step": entry["step"]} | {name: entry[name] for name in entry if name == "loss" or name.startswith("loss_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    last = {name: value for name, value in (curve[-1] if curve else {}).items() if name.startswith("loss_")}
    return last | ({"curve": curve} if len(curve) > 1 else {})
