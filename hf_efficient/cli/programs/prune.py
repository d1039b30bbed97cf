"""What `scripts/prune.py` does: flags in, a pruned checkpoint folder out, or a sweep over ratios with its picture.

    run(parse(["--model", "out/teacher", "--dataset", "bundled:bbc-news", "--task", "text-classification",
               "--ratio", "0.5", "--output_dir", "out/small"]))

The folder holds the model with its tokenizer and, but for a model that is too large to be loaded and is read layer by
layer, `plan.json`; that of a sweep `sweep.json`, `sweep.png`, and, where
heads or neurons leave, `importance.png`: their scores, layer by layer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser, PreTrainedModel
from transformers.hf_argparser import HfArg

from ...data.datasets import load_dataset_any
from ...data.preparation import PreparedData, check_labels, prepare
from ...data.tasks import TASKS
from ...errors import ConfigError, unknown_name
from ...io.disk import check_empty, new_folder, write_atomic
from ...io.text import show
from ...measurement.quality import evaluate_quality
from ...models.loading import load_config, load_model, load_processor
from ...models.on_disk import StoredModel
from ...models.sentences import write_modules
from ...pruning.config import PruningConfig
from ...pruning.price.forecast import plan_table
from ...pruning.prune import described, prune, search
from ...stages.prune import BY_LAYER, CalibrationSettings, calibration_batches, is_by_layer
from ...training.progress import telling
from ..base import say
from .flags import load_modules
from .pictures import plot_importance, plot_sweep

PLAN, SWEEP, PICTURE, IMPORTANCE = "plan.json", "sweep.json", "sweep.png", "importance.png"


@dataclass
class ScriptArguments:
    """What is pruned, how much, and on which data; the help of each field says what it means."""

    model: str = HfArg(help="Hub id or folder of a trained model.")
    dataset: str = HfArg(help="bundled:NAME, Hub id, folder, or a .csv, .tsv, .json or .txt file.")
    task: str = HfArg(help=f"One of {', '.join(TASKS)}.")
    output_dir: str = HfArg(help="Must be empty or new.")
    ratio: float | None = HfArg(default=None, help="The fraction to remove. Give this or sweep.")
    sweep: list[float] | None = HfArg(
        default=None, help="Several ratios: each is tried and scored, nothing is kept but the numbers."
    )
    metric: str | None = HfArg(
        default=None, help="macs, parameters or latency. Default: macs; parameters where experts leave."
    )
    granularity: list[str] = HfArg(
        default_factory=lambda: ["head", "neuron"], help="Of head, neuron, expert and layer."
    )
    importance: str | None = HfArg(default=None, help="Default: fisher, of layers alone loss, of experts alone reap.")
    allocation: str = HfArg(default="global", help="global or uniform.")
    steps: int = HfArg(default=1, help="Score and remove in so many steps.")
    round_to: int = HfArg(default=8, help="Neurons stay in multiples of this.")
    reconstruct: bool = HfArg(default=True, help="Fit what is left to the dense model.")
    calibration_samples: int | None = HfArg(
        default=None, help="Training rows to look at, without labels. Default: 256, for language models 32."
    )
    generated_samples: int | None = HfArg(
        default=None, help="Rows that a language model writes itself, to look at too. Default: 32."
    )
    batch_size: int | None = HfArg(default=None, help="Of calibration and scoring. Default: 16, or 2 for them.")
    max_length: int | None = HfArg(default=None, help="In tokens.")
    text_column: str | None = HfArg(default=None, help="Default: found by its usual names.")
    label_column: str | None = HfArg(default=None, help="Default: found by its usual names.")
    limit: int | None = HfArg(default=None, help="At most this many rows of each split of the data.")
    test_fraction: float = HfArg(default=0.2, help="Held out where the data has no test split.")
    layer_by_layer: str = HfArg(
        default="auto",
        help="Read a folder layer by layer, and score nothing: always, never, or auto (weights of more than half of "
        "this machine's memory).",
    )
    seed: int = HfArg(default=0, help="Of the split, and of what is drawn.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        if (self.ratio is None) == (not self.sweep):
            raise ConfigError(f"Give ratio or sweep, one of them; got ratio={self.ratio!r} and sweep={self.sweep!r}.")
        if self.layer_by_layer not in BY_LAYER:
            raise unknown_name("layer_by_layer", self.layer_by_layer, BY_LAYER)
        if self.layer_by_layer == "always" and self.sweep:
            raise ConfigError(
                "A sweep scores every ratio, which takes the whole model. Give ratio, or --layer_by_layer never."
            )
        for ratio in self.ratios:
            self.config(ratio)  # a bad value is an error before anything is loaded
        self.calibration()

    @property
    def ratios(self) -> list[float]:
        return [self.ratio] if self.ratio is not None else sorted(set(self.sweep or []))

    def calibration(self) -> CalibrationSettings:
        names = ("calibration_samples", "generated_samples", "batch_size")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return CalibrationSettings.of_task(self.task, given, "flags")

    def config(self, ratio: float) -> PruningConfig:
        names = ("metric", "importance", "allocation", "steps", "round_to", "reconstruct", "seed")
        return PruningConfig(
            ratio=ratio, granularity=tuple(self.granularity), **{name: getattr(self, name) for name in names}
        )


def parse(words: Sequence[str]) -> ScriptArguments:
    """Read the flags; ConfigError for a value that is not allowed."""
    return HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(list(words))[0]


@telling(say)
def run(script: ScriptArguments) -> list[dict[str, Any]]:
    """Prune and save, or sweep; gives one row of numbers for the dense model and one for each ratio.

    Raises:
        CheckpointError: output_dir is not empty.
        ConfigError, DataError, UnsupportedModelError: see `prune`; of every ratio before anything is computed.
    """
    folder = check_empty(script.output_dir)
    trust = {"trust_remote_code": script.trust_remote_code}
    entry = TASKS[script.task]
    processor = load_processor(script.model, images=entry.is_of_images, whole=bool(entry.reads), **trust)
    if (modules := load_modules(script.task, script.model)) is not None:
        processor = modules.reading_as(processor)
    names = ("seed", "limit", "test_fraction")
    how = entry.reading(script.text_column, script.label_column)
    splits = load_dataset_any(script.dataset, **how, **{name: getattr(script, name) for name in names})
    columns = {name: getattr(script, name) for name in ("text_column", "label_column") if getattr(script, name)}
    data = prepare(splits, script.task, processor, max_length=script.max_length, **columns)
    if script.ratio is not None and is_by_layer(script.layer_by_layer, script.model):
        return _by_layer(script, data, modules, processor)
    model = load_model(TASKS[script.task].auto_class, script.model, **trust)
    check_labels(model.config, data)
    batches = calibration_batches(model, data, script.calibration(), script.seed)
    first = search(model, script.config(script.ratios[0]), batches)
    searches = [first.at(ratio) for ratio in script.ratios]  # the dense model is scored once, for all of them
    pooling = (modules.pooling if modules is not None else None) or "mean"
    rows = [_row(script, 0.0, 0.0, model, data, pooling)]
    for ratio, one in zip(script.ratios, searches, strict=True):
        plan = described(one)
        small = one.cutter.cut(plan).model
        rows.append(_row(script, ratio, plan.forecast.removed_macs, small, data, pooling))
        show(f"ratio {ratio}: {rows[-1]['metric']} {rows[-1]['score']:.4f}, dense {rows[0]['score']:.4f}")
    with new_folder(folder) as target:
        if script.ratio is None:
            write_atomic(target / SWEEP, json.dumps(rows, indent=1) + "\n")
            plot_sweep(rows, target / PICTURE)
            if groups := [group for group in first.dense.groups if group.kind in first.config.unit_kinds]:
                plot_importance(first.scores(first.dense.model, groups)[0], target / IMPORTANCE)
        else:
            show(plan_table(plan))
            small.save_pretrained(target)
            plan.save(target / PLAN)
            if processor is not None:
                processor.save_pretrained(target)
            if modules is not None:
                write_modules(modules, small.config, processor, target)
    return rows


def _by_layer(script: ScriptArguments, data: PreparedData, modules: Any, processor: Any) -> list[dict[str, Any]]:
    """From folder to folder; the numbers are sizes alone."""
    check_labels(load_config(script.model), data)
    batches = calibration_batches(None, data, script.calibration(), script.seed)
    config = script.config(script.ratios[0])
    folder = prune(script.model, config, batches, output_dir=script.output_dir)
    models = [(0.0, StoredModel.open(script.model)), (config.ratio, StoredModel.open(folder))]
    if modules is not None:
        write_modules(modules, models[1][1].model.config, processor, folder)
    show(f"{folder}: pruned layer by layer, and not scored")
    return [{"ratio": ratio, "parameters": stored.model.num_parameters()} for ratio, stored in models]


def _row(
    script: ScriptArguments, ratio: float, removed: float, model: PreTrainedModel, data: PreparedData, pooling: str
) -> dict[str, Any]:
    size = script.calibration().batch_size
    evaluation = evaluate_quality(model, data.test, data.collator, script.task, batch_size=size, pooling=pooling)
    score = evaluation.quality.scores[0]
    return {
        "ratio": ratio,
        "removed_macs": removed,
        "parameters": model.num_parameters(),
        "metric": score.name,
        "score": score.value,
        "error": score.standard_error,
    }
