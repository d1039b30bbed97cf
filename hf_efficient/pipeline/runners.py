"""How each stage of a recipe is carried out: a checkpoint folder in, a checkpoint folder and a few facts out.

    facts = RUNNERS["prune"](run, settings, source, target)

A new stage is one function and one entry of `RUNNERS`. Stages call the same public functions that a user would.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    PreTrainedModel,
    TrainingArguments,
)

from ..conversion.convert import convert_attention
from ..conversion.positions import extend_positions
from ..data.preparation import PreparedData, check_labels
from ..distillation.arguments import DistillationArguments
from ..distillation.trainer import DistillationTrainer
from ..distillation.transfer import TransferTrainer
from ..io.disk import remove_own
from ..models.classes import block_of
from ..models.loading import load_model, load_processor
from ..models.rebuild import is_portable
from ..pruning.callback import PruningCallback
from ..pruning.config import PruningConfig
from ..pruning.cut.linears import count_zeros
from ..pruning.cut.vocabulary import prune_vocabulary
from ..pruning.gradual.schedule import Gradual
from ..pruning.prune import prune
from ..pruning.score.calibration import average_length
from ..recipes.settings import DistillSettings, TrainingSettings, TransferSettings
from ..recipes.stages import AttentionStage, ExportStage, PruneStage, QuantizeStage, VocabularyStage
from ..runtimes.export import export
from ..runtimes.quantization import quantize
from ..training.trainers import ExactTrainer
from .fit import fit, logged_losses, make_trainer, teacher_cut, trained, training_arguments
from .fresh import fresh_config
from .run import TEACHER, Run, column_texts

TRANSFER_ROWS = 128  # on which the error of an attention transfer is reported
LENGTH_ROWS = 256  # whose average length is the one at which MACs are counted while training


def run_teacher(run: Run, settings: TrainingSettings | None, source: Path, target: Path) -> dict[str, Any]:
    """Load the model of the recipe and fine-tune it, if the recipe says so."""
    prepared, used = run.data(settings.max_length if settings else None, config=run.config), {}
    if settings is None:
        model = new_teacher(run, prepared)
        check_labels(model.config, prepared)
    else:

        def fine_tuned(batch_size: int) -> PreTrainedModel:
            arguments = training_arguments(TrainingArguments, run, settings, target, batch_size)
            trainer = make_trainer(ExactTrainer, new_teacher(run, prepared), arguments, prepared)
            fit(trainer)
            return trainer.model

        model, used = trained(run, settings, fine_tuned)
    facts = {"train": len(prepared.train), "parameters": model.num_parameters()}
    return facts | used | run.save(model, target)


def new_teacher(run: Run, prepared: PreparedData) -> PreTrainedModel:
    """The model that the recipe names, with a head for the labels of the data."""
    asked, labels = run.recipe.model, {}
    if prepared.num_labels is not None:
        labels = {"id2label": dict(enumerate(prepared.label_names)), "num_labels": prepared.num_labels}
        labels["label2id"] = {name: index for index, name in enumerate(prepared.label_names)}
    if asked.config is not None:
        config = fresh_config(asked.config | labels, run.processor)
        return getattr(transformers, run.auto_class).from_config(config)
    options: dict[str, Any] = {"trust_remote_code": asked.trust_remote_code}
    if run.recipe.teacher is not None:  # a model that is taken as it is keeps its own head
        options |= labels | {"new_head": True}
    model = load_model(run.auto_class, asked.name_or_path, **options)
    if model.config.pad_token_id is None and not run.task.is_of_images:
        model.config.pad_token_id = run.processor.pad_token_id
    if block_of(model.config).kept_layers:  # it is the original now, and has all of its layers
        model.config.efficient = replace(block_of(model.config), kept_layers={}).to_dict()
    return model


def run_attention(run: Run, settings: AttentionStage, source: Path, target: Path) -> dict[str, Any]:
    longer = settings.longer

    def converted() -> PreTrainedModel:
        model = run.load(source)
        if longer.positions is not None:
            model = extend_positions(model, longer.positions, longer.position_method, longer.rope)
        return convert_attention(model, settings.config, layers=settings.layers)

    if settings.transfer is None:
        return run.save(converted(), target)

    def transferred(batch_size: int) -> tuple[PreTrainedModel, dict[str, Any]]:
        model = converted()
        return model, transfer(run, model, settings.transfer, target, batch_size)

    (model, facts), used = trained(run, settings.transfer, transferred)
    return facts | used | run.save(model, target)


def transfer(
    run: Run, model: PreTrainedModel, settings: TransferSettings, target: Path, batch_size: int
) -> dict[str, Any]:
    """Fit the learned parts to softmax attention; the errors before and after are those of test rows."""
    prepared = run.data(settings.max_length, config=model.config)
    arguments = training_arguments(TrainingArguments, run, settings, target, batch_size)
    trainer = make_trainer(TransferTrainer, model, arguments, prepared)
    rows = prepared.test.select(range(min(TRANSFER_ROWS, len(prepared.test))))
    before = trainer.evaluate(rows)["eval_transfer_error"]
    fit(trainer)
    after = trainer.evaluate(rows)["eval_transfer_error"]
    model.eval()
    return {"transfer_error_before": before, "transfer_error_after": after, "steps": trainer.state.global_step}


def run_prune(run: Run, settings: PruneStage, source: Path, target: Path) -> dict[str, Any]:
    model = run.load(source)
    calibration = settings.calibration
    batches = first_batches(run.data(config=model.config), calibration.calibration_samples, calibration.batch_size)
    small = prune(model, settings.config, batches)
    return _pruned(settings.config, model.num_parameters(), small) | run.save(small, target)


def _pruned(config: PruningConfig, parameters: int, small: PreTrainedModel) -> dict[str, Any]:
    """What the report says of a model that had so many `parameters` before."""
    counts: dict[str, Any] = {"parameters_before": parameters, "parameters_after": small.num_parameters()}
    if "weight" in config.granularity:
        zeros, total = count_zeros(small)
        counts |= {"zeros": zeros, "sparsity": round(zeros / total, 4)}
    return counts | {"loads_with": "portable" if is_portable(small) else "plugin"}


def first_batches(prepared: PreparedData, samples: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The first training rows, in batches; the rows were shuffled when they were split."""
    rows = prepared.train.select(range(min(samples, len(prepared.train))))
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=prepared.collator)
    return [dict(batch) for batch in loader]


def run_distill(run: Run, settings: DistillSettings, source: Path, target: Path) -> dict[str, Any]:
    (trainer, parameters), used = trained(run, settings, partial(distilled, run, settings, source, target))
    student = trainer.model
    pruned = {} if settings.prune is None else _pruned(settings.prune.config, parameters, student)
    facts = {"train": len(trainer.train_dataset)} | pruned | logged_losses(trainer) | used
    return facts | run.save(student, target)


def distilled(
    run: Run, settings: DistillSettings, source: Path, target: Path, batch_size: int
) -> tuple[DistillationTrainer, int]:
    """A trainer that has trained its student, and the parameters that the student had before."""
    student, teacher = run.load(source), run.load(run.folder / TEACHER)
    prepared = run.data(settings.max_length, config=student.config)
    arguments = training_arguments(
        DistillationArguments,
        run,
        settings,
        target,
        batch_size,
        losses=settings.losses,
        temperature=settings.temperature,
        **settings.options,
        teacher_max_length=teacher_cut(run.recipe, settings, teacher.config),
    )
    parameters, callbacks = student.num_parameters(), []
    if settings.prune is not None:
        batches = first_batches(prepared, LENGTH_ROWS, settings.batch_size)
        callbacks.append(pruning_callback(settings.prune, average_length(batches, student)))
    trainer = make_trainer(DistillationTrainer, student, arguments, prepared, callbacks, teacher=teacher)
    fit(trainer)
    return trainer, parameters


def run_vocabulary(run: Run, settings: VocabularyStage, source: Path, target: Path) -> dict[str, Any]:
    model, tokenizer = run.load(source), load_processor(str(source), images=False)
    small, short = prune_vocabulary(model, tokenizer, training_texts(run), max_tokens=settings.max_tokens)
    facts = {"tokens_before": len(tokenizer), "tokens_after": len(short)}
    facts |= {"parameters_before": model.num_parameters(), "parameters_after": small.num_parameters()}
    return facts | run.reading(short).save(small, target)


def run_quantize(run: Run, settings: QuantizeStage, source: Path, target: Path) -> dict[str, Any]:
    model, own = run.load(source), run.read_as(source)
    small = quantize(model, settings.method, group_size=settings.group_size)
    return {"method": settings.method} | own.save(small, target)


def run_export(run: Run, settings: ExportStage, source: Path, target: Path) -> dict[str, Any]:
    """Into a folder of its own, with what reads the inputs; checked on test rows, one, two and five at a time."""
    model, own, folder = run.load(source), run.read_as(source), target / settings.folder
    prepared = own.data(config=model.config)
    cuts = [(0, 2), (2, 3), (3, 8)]
    rows = [[prepared.test[i] for i in range(*cut) if i < len(prepared.test)] for cut in cuts]
    remove_own(folder)  # of a run that was stopped
    made = export(
        model,
        settings.format,
        folder,
        inputs=[prepared.collator(part) for part in rows if part],
        quantize=settings.quantize,
        min_agreement=settings.min_agreement,
    )
    if own.processor is not None:
        own.processor_for(model).save_pretrained(folder)
    facts = dataclasses.asdict(made)
    del facts["folder"], facts["checked"]
    return facts


def training_texts(run: Run) -> Iterator[str]:
    """All that the model reads of the training rows."""
    return column_texts(run, ("text", "text_pair"))


def pruning_callback(gradual: Gradual, length: int) -> PruningCallback:
    """`length`: of the training rows, where the settings do not say at which MACs are counted."""
    config = replace(gradual.config, sequence_length=gradual.config.sequence_length or length)
    return PruningCallback(config, gradual.start, gradual.end, gradual.every, gradual.momentum)


RUNNERS: dict[str, Callable[[Run, Any, Path, Path], dict[str, Any]]] = {
    "attention": run_attention,
    "prune": run_prune,
    "distill": run_distill,
    "vocabulary": run_vocabulary,
    "quantize": run_quantize,
    "export": run_export,
}
