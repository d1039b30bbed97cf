"""The stage that prunes in one go, with rows to look at.

- prune: {ratio: 0.5}
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..models.registry import token_limit
from ..pruning.config import PruningConfig
from .base import Run, Stage
from .settings import MAX_BATCH, MAX_STEPS, Settings, check_keys, integer, keys_of, make, one_of, part, read

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..data.preparation import PreparedData
    from ..pruning.plan import PruningPlan


BY_LAYER = ("auto", "always", "never")


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """The rows that pruning looks at: of the data, and, of a language model, in its own words.

    `layer_by_layer`: whether the model is read so (docs/scaling.md), which leaves out its own words; `auto`: where its
    weights take more than half of this machine's memory.
    """

    calibration_samples: int = integer(256, 1, MAX_STEPS)
    batch_size: int = integer(16, 1, MAX_BATCH)
    generated_samples: int = integer(0, 0, MAX_STEPS)
    layer_by_layer: str = one_of("auto", BY_LAYER)

    def to_dict(self) -> dict[str, Any]:
        """`layer_by_layer` and `generated_samples` only where they say something."""
        usual = {"layer_by_layer": "auto", "generated_samples": 0}.items()
        return {name: value for name, value in super().to_dict().items() if (name, value) not in usual}

    @classmethod
    def of_task(cls, task: str | None, given: Mapping[str, Any], path: str) -> "CalibrationSettings":
        """What is given; the task's own defaults where the number of rows is not."""
        usual = {} if "calibration_samples" in given else TASK_DEFAULTS.get(task or "", {})
        settings = read(cls, usual | dict(given), path)
        if settings.generated_samples and task not in TASK_DEFAULTS:
            raise ConfigError(
                f"{path}.generated_samples is {settings.generated_samples}, but models of task {task!r} write no "
                f"texts to look at. Leave it out; it is for {', '.join(TASK_DEFAULTS)}."
            )
        return settings


# Rows of a language model are long, and its answers are as wide as the vocabulary: few of them in a batch. What it
# writes itself keeps what the texts do not speak of.
TASK_DEFAULTS = {"causal-lm": {"calibration_samples": 32, "batch_size": 2, "generated_samples": 32}}


@dataclass(frozen=True)
class PruneStage(Stage):
    """`prune(model, stage.config, calibration)` with `calibration_samples` rows in batches of `batch_size`, and
    `generated_samples` as long that a language model writes itself (`self_calibration`).

    Weights that a stage made zero stay zero in all that is trained after it:

        - prune: {granularity: [weight], mask_structure: "2:4", importance: obs}
        - distill: {epochs: 1}
    """

    config: PruningConfig
    calibration: CalibrationSettings

    @property
    def pruning(self) -> PruningConfig:
        return self.config

    @property
    def is_shared(self) -> bool:
        return True

    @classmethod
    def read(cls, section: Any, path: str, task: str | None = None) -> "PruneStage":
        names, rows = keys_of(PruningConfig), keys_of(CalibrationSettings)
        check_keys(section, [*names, *rows], path)
        calibration = CalibrationSettings.of_task(task, part(section, rows), path)
        config = make(PruningConfig, part(section, names), path)
        if config.importance == "movement":
            raise ConfigError(
                f"{path}.importance: 'movement' is learned while training. Put it in a distill stage: "
                "distill: {prune: {importance: movement}}."
            )
        return cls(config, calibration)

    def to_dict(self) -> dict[str, Any]:
        config = self.config.to_dict()
        if self.config.structure and self.config.without_weights() is None:
            del config["ratio"]  # mask_structure says it, also where that is overridden
        return config | self.calibration.to_dict()

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        check_pruning(run, config, self.config, before)
        return config

    def plan(self, run: Run, config: Any) -> "tuple[Any, PruningPlan]":
        from ..models.anatomy import Anatomy
        from ..pruning.cut.surgery import planned_config
        from ..pruning.prune import plan

        model = run.skeleton(config)
        sizes = plan(model, dataclasses.replace(self.config, sequence_length=counted_length(run, config, self.config)))
        return planned_config(Anatomy.of(model), sizes), sizes

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from ..pruning.prune import prune
        from ..training.ranks import from_main, on_main

        if from_main(lambda: is_by_layer(self.calibration.layer_by_layer, source)):
            return on_main(lambda: self._by_layer(run, source, target)) or {}
        model = run.load(source)
        batches = calibration_batches(model, run.data(config=model.config), self.calibration, run.recipe.seed)
        small = prune(model, self.config, batches)
        return pruned(self.config, model.num_parameters(), small) | run.save(small, target)

    def _by_layer(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        """From folder to folder, with what lies beside the model."""
        from ..models.loading import CONFIG, load_config
        from ..models.on_disk import StoredModel
        from ..pruning.prune import prune

        data = run.data(config=load_config(source))
        batches = calibration_batches(None, data, self.calibration, run.recipe.seed)
        if not (target / CONFIG).is_file():  # else it was finished, and the run killed a moment later
            prune(source, self.config, batches, output_dir=target)
        small = StoredModel.open(target).model
        run.write_modules(small.config, target)
        facts = pruned(self.config, StoredModel.open(source).model.num_parameters(), small)
        return facts | {"class": type(small).__name__}


def is_by_layer(choice: str, name: "str | Path") -> bool:
    """Whether a model is pruned layer by layer: one of `BY_LAYER`, and its size."""
    from ..models.on_disk import is_large

    return choice == "always" or (choice == "auto" and is_large(name))


def calibration_batches(
    model: "PreTrainedModel | None", data: "PreparedData", rows: CalibrationSettings, seed: int
) -> "list[dict[str, Tensor]]":
    """The first training rows, and as long ones in the words of the model itself, if it is there."""
    from ..pruning.score.calibration import average_length
    from ..pruning.score.own_words import self_calibration
    from ..training.ranks import same_everywhere
    from .fit import first_batches

    batches = first_batches(data, rows.calibration_samples, rows.batch_size)
    if rows.generated_samples and model is not None:
        length = max(2, average_length(batches, model))
        batches += map(dict, self_calibration(model, rows.generated_samples, length, rows.batch_size, seed))
        same_everywhere(value for batch in batches for value in batch.values())  # whatever each has written
    return batches


def counted_length(run: Run, config: Any, pruning: PruningConfig) -> int:
    """The tokens at which MACs are counted."""
    from ..pruning.score.calibration import DEFAULT_LENGTH

    length = pruning.sequence_length or run.recipe.data.max_length or DEFAULT_LENGTH
    return min(length, token_limit(config, rotary=False) or length)


def check_pruning(run: Run, config: Any, pruning: PruningConfig, before: Sequence[Stage]) -> None:
    """Raises ConfigError if the ratio cannot be reached; a second pruning starts from sizes that are not known yet."""
    from ..models.anatomy import Anatomy
    from ..pruning.choose.reach import check_reachable
    from ..pruning.price.costs import make_costs

    if any(stage.pruning is not None for stage in before):
        return
    anatomy = Anatomy.of(run.skeleton(config))
    # What can be reached in measured time is not known before it is measured: MACs stand in for it.
    metric = "macs" if pruning.metric == "latency" else pruning.metric
    length = pruning.sequence_length or counted_length(run, config, pruning)
    check_reachable(anatomy, pruning, make_costs(anatomy, metric, length))


def pruned(config: PruningConfig, parameters: int, small: "PreTrainedModel") -> dict[str, Any]:
    """What the report says of a model that had so many `parameters` before."""
    from ..models.rebuild import is_portable
    from ..pruning.cut.linears import count_zeros

    counts: dict[str, Any] = {"parameters_before": parameters, "parameters_after": small.num_parameters()}
    if "weight" in config.granularity:
        zeros, total = count_zeros(small)
        counts |= {"zeros": zeros, "sparsity": round(zeros / total, 4)}
    return counts | {"loads_with": "portable" if is_portable(small) else "plugin"}
