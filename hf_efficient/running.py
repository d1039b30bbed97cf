"""How each stage of a recipe is carried out: a checkpoint folder in, a checkpoint folder and a few facts out.

    facts = RUNNERS["prune"](run, settings, source, target)

A new stage is one function and one entry of `RUNNERS`. Stages call the same public functions that a user would.
"""

import copy
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .attention.convert import convert_attention
from .attention.positions import extend_positions, token_limit
from .attention.transfer import TransferTrainer
from .bundled import resolve_model
from .data import TASKS, PreparedData, Task, check_labels, load_dataset_any, prepare, rows_digest
from .distillation.arguments import DistillationArguments
from .distillation.trainer import DistillationTrainer
from .errors import CheckpointError, ConfigError, unknown_name
from .exporting import export
from .families import FAMILIES, family_of
from .loading import load_config, load_model, load_processor
from .models.block import check_stock_sizes
from .models.building import is_portable
from .models.configs import block_of
from .new_tokenizer import token_fields, train_tokenizer
from .preparing import need_column
from .pruning.calibration import average_length
from .pruning.callback import PruningCallback
from .pruning.config import PruningConfig
from .pruning.linears import count_zeros
from .pruning.prune import prune
from .pruning.schedule import Gradual
from .pruning.vocabulary import prune_vocabulary
from .pruning.zeros import KeepZeros, was_sparsified
from .quantization import quantize
from .recipe import Recipe
from .settings import DistillSettings, TrainingSettings, TransferSettings, check_keys
from .stages import AttentionStage, ExportStage, PruneStage, QuantizeStage, VocabularyStage
from .training import ExactTrainer, MarkComplete, in_smaller_batches, last_checkpoint
from .verify import output_digest
from .workspace import MANIFEST

TEACHER = "0-teacher"
TRANSFER_ROWS = 128  # on which the error of an attention transfer is reported
TEXTS = ("text", "text_pair", "target", "tokens", "question", "context")  # the roles of columns that are read
LENGTH_ROWS = 256  # whose average length is the one at which MACs are counted while training


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
        model, images = self.recipe.model, self.task.is_of_images
        name = model.name_or_path or model.tokenizer
        if name is not None:
            return load_processor(name, images=images, trust_remote_code=model.trust_remote_code)
        if images:
            return None
        made = self.folder / TEACHER  # of a run that goes on
        if (made / "tokenizer.json").is_file():
            return load_processor(str(made), images=False)
        texts = column_texts(self, self.task.roles)
        return train_tokenizer(texts, model.tokenizer_size, close=self.recipe.task != "causal-lm")

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model that the recipe names, before any weight is loaded."""
        model = self.recipe.model
        if model.name_or_path is not None:
            return load_config(model.name_or_path, trust_remote_code=model.trust_remote_code)
        return fresh_config(model.config, self.processor)

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of the config without memory for its weights."""
        with torch.device("meta"):
            return getattr(transformers, self.auto_class).from_config(config)

    @property
    def processor_class(self) -> str | None:
        """The Auto class that loads what `save` writes beside the model, if anything."""
        if self.processor is None:
            return None
        return "AutoImageProcessor" if self.task.is_of_images else "AutoTokenizer"

    @property
    def auto_class(self) -> str:
        return self.task.auto_class

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    def data(self, max_length: int | None = None, *, config: PreTrainedConfig | None = None) -> PreparedData:
        """Train and test inputs, cut at `max_length` tokens (default: as the recipe says); prepared once.

        `config`: of the model that reads them. It gets no more tokens than its table of positions has rows.
        """
        max_length = max_length or self.recipe.data.max_length
        limit = None if config is None else longest_text(config)
        if limit is not None and max_length is not None:
            max_length = min(max_length, limit)
        if max_length not in self._prepared:
            self._prepared[max_length] = self._prepare(max_length)
        return self._prepared[max_length]

    def _prepare(self, max_length: int | None) -> PreparedData:
        data = self.recipe.data
        options = {"image_size": data.image_size} if self.task.is_of_images else {"max_length": max_length}
        names = {f"{role}_column": getattr(data, f"{role}_column") for role in self.task.roles}
        return prepare(self.rows, self.recipe.task, self.processor, **names, **options)

    def load(self, folder: Path) -> PreTrainedModel:
        try:
            return load_model(self.auto_class, folder, trust_remote_code=self.recipe.model.trust_remote_code)
        except CheckpointError as error:
            if folder.parent != self.folder or not (folder / MANIFEST).is_file():
                raise
            raise CheckpointError(
                f"{error} This was a finished stage, and its files are damaged: delete the folder {folder} to run it "
                "again. The stages after it can stay: they would come out the same."
            ) from error

    def save(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Write a checkpoint and make sure that it holds what was made."""
        model = model.to("cpu")
        model.save_pretrained(folder)
        if self.processor is not None:
            self.processor_for(model).save_pretrained(folder)
        if output_digest(self.load(folder)) != output_digest(model):
            raise CheckpointError(f"The checkpoint in {folder} gives another output than the model that was saved.")
        return {"class": type(model).__name__}

    def processor_for(self, model: PreTrainedModel) -> Any:
        """The processor; a tokenizer goes along with a model that was extended to longer inputs."""
        limit = token_limit(model.config)
        if self.task.is_of_images or limit == token_limit(self.config):
            return self.processor
        tokenizer = copy.deepcopy(self.processor)
        tokenizer.model_max_length = limit
        return tokenizer

    def reading(self, processor: Any) -> "Run":
        """The same run with another tokenizer."""
        other = Run(self.recipe, self.folder)
        other.rows, other.processor = self.rows, processor
        return other

    def read_as(self, folder: Path) -> "Run":
        """The run with the tokenizer that lies beside a checkpoint, if a stage made it another one."""
        if not any(stage.name == "vocabulary" for stage in self.recipe.stages):
            return self
        return self.reading(load_processor(str(folder), images=False))

    def inputs(self) -> dict[str, Any]:
        """What the recipe only names: a digest of the rows, and the files of a model folder with sizes and times."""
        asked = self.recipe.model.name_or_path
        folder = Path(resolve_model(asked)) if asked else Path()
        files = sorted(folder.iterdir()) if asked and folder.is_dir() else []
        return {
            "rows": {name: rows_digest(split) for name, split in self.rows.items()},
            "model": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()],
        }


def longest_text(config: PreTrainedConfig) -> int | None:
    """The tokens that a table of positions has rows for; None without one: the model then takes any length."""
    return family_of(config).longest_text(config)


def fresh_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The config of a model that is trained from nothing, and reads what its tokenizer makes.

    Raises:
        ConfigError: an unknown model type or field, or an absurd size.
    """
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if fields["model_type"] not in known:
        raise unknown_name("model.config.model_type", fields["model_type"], known.keys())
    config_class = known[fields["model_type"]]
    names = {field.name for field in dataclasses.fields(config_class)} | {"model_type", "num_labels", "head_dim"}
    check_keys(fields, sorted(names), "model.config")
    if tokenizer is not None:
        own = token_fields(tokenizer, config_class)
        fields = {name: value for name, value in own.items() if name in names or name.startswith("decoder")} | fields
    if fields["model_type"] in FAMILIES:
        check_stock_sizes(fields, FAMILIES[fields["model_type"]])
    try:
        return transformers.AutoConfig.for_model(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.config: {error}") from error


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


def trained(run: Run, settings: TrainingSettings, work: Callable[[int], Any]) -> tuple[Any, dict[str, Any]]:
    """What `work(batch_size)` gives, and what the report says where memory allowed only smaller batches."""
    result, size = in_smaller_batches(work, settings.batch_size, run.recipe.seed)
    if size == settings.batch_size:
        return result, {}
    return result, {"batch_size_used": size, "gradient_accumulation_steps": settings.batch_size // size}


def new_teacher(run: Run, prepared: PreparedData) -> PreTrainedModel:
    """The model that the recipe names, with a head for the labels of the data."""
    asked, labels = run.recipe.model, {}
    if prepared.num_labels is not None:
        labels = {"id2label": dict(enumerate(prepared.label_names)), "num_labels": prepared.num_labels}
        labels["label2id"] = {name: index for index, name in enumerate(prepared.label_names)}
    if asked.config is not None:
        config = fresh_config(asked.config | labels, run.processor)
        return getattr(transformers, run.auto_class).from_config(config)
    options = {"trust_remote_code": asked.trust_remote_code}
    if run.recipe.teacher is not None:  # a model that is taken as it is keeps its own head
        options |= labels | {"ignore_mismatched_sizes": True}
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
    facts = {"train": len(trainer.train_dataset)} | pruned | _losses(trainer) | used
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
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    made = export(
        model,
        settings.format,
        folder,
        inputs=[prepared.collator(part) for part in rows if part],
        quantize=settings.quantize,
    )
    if own.processor is not None:
        own.processor_for(model).save_pretrained(folder)
    facts = dataclasses.asdict(made)
    del facts["folder"], facts["checked"]
    return facts


def training_texts(run: Run) -> Iterator[str]:
    """All that the model reads of the training rows."""
    return column_texts(run, ("text", "text_pair"))


def column_texts(run: Run, roles: Sequence[str]) -> Iterator[str]:
    """The training texts in the columns of these roles; text pairs only where they are named."""
    data, rows = run.recipe.data, run.rows["train"]
    wanted = [role for role in roles if role in TEXTS and (role != "text_pair" or data.text_pair_column)]
    columns = [need_column(rows, role, getattr(data, f"{role}_column")) for role in wanted]
    return (value if isinstance(value, str) else " ".join(value) for column in columns for value in rows[column])


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


def training_arguments(
    kind: type[TrainingArguments], run: Run, settings: TrainingSettings, target: Path, batch_size: int, **more: Any
) -> TrainingArguments:
    """`batch_size`: a divisor of the one in the settings, which as many accumulated batches make up."""
    return kind(
        output_dir=str(target / "trainer"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
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
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def teacher_cut(recipe: Recipe, settings: DistillSettings, teacher: PreTrainedConfig) -> int | None:
    """Where the teacher's inputs must be cut, since it takes fewer tokens than the student gets; None: nowhere."""
    length, limit = settings.max_length or recipe.data.max_length, longest_text(teacher)
    needed = any(weight for name, weight in settings.losses.items() if name != "ce")
    return limit if needed and limit is not None and length is not None and length > limit else None


def make_trainer(
    kind: type[Trainer],
    model: PreTrainedModel,
    arguments: TrainingArguments,
    prepared: PreparedData,
    callbacks: Sequence[TrainerCallback] = (),
    **more: Any,
) -> Any:
    """`callbacks` come first: a checkpoint is complete when they have written what is theirs."""
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        data_collator=prepared.collator,
        callbacks=[*([KeepZeros()] if was_sparsified(model) else []), *callbacks, MarkComplete()],
        **more,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def fit(trainer: Trainer) -> None:
    """Train from the start, or from the last complete checkpoint of a run that was stopped; then tidy up."""
    folder = str(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(folder)))
    shutil.rmtree(folder)


def _losses(trainer: Trainer) -> dict[str, Any]:
    """What was logged while training: the terms of the last entry, and all as a curve."""
    curve = [
        {"step": entry["step"]} | {name: entry[name] for name in entry if name == "loss" or name.startswith("loss_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    last = {name: value for name, value in (curve[-1] if curve else {}).items() if name.startswith("loss_")}
    return last | ({"curve": curve} if len(curve) > 1 else {})
