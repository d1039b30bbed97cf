"""The stage that trains against the teacher; it may prune while it does.

- distill: {epochs: 3, losses: {kd: 1.0, hidden: 0.1}}
- distill: {max_steps: 300, lora: {r: 16, alpha: 32}}
- distill: {epochs: 3, prune: {ratio: 0.5, importance: movement, start: 0.1, end: 0.6, every: 10}}
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tasks import TASKS
from ..distillation.options import DistillationOptions
from ..distillation.terms import LOSSES, check_losses
from ..errors import ConfigError, unknown_name
from ..models.registry import token_limit
from ..pruning.config import PruningConfig
from ..pruning.gradual.schedule import WHILE_TRAINING, Gradual
from .base import Run, Stage, check_length
from .lora import Lora, merged
from .prune import check_pruning, pruned
from .settings import OPTION, TrainingSettings, check_keys, keys_of, make, number, option, part, read, ruled

if TYPE_CHECKING:
    from ..distillation.trainer import DistillationTrainer

LENGTH_ROWS = 256  # whose average length is the one at which MACs are counted while training


@dataclass(frozen=True)
class DistillStage(TrainingSettings, Stage):
    """Training against the teacher. `losses` gives the weight of each name in `distillation.terms.LOSSES`."""

    losses: dict[str, float] = ruled(
        lambda: {"kd": 1.0},
        "a mapping of losses to weights from 0 to 1e6, one of them above 0, such as {kd: 1.0, ce: 0.5}",
        lambda value: (
            isinstance(value, dict)
            and all(type(weight) in (int, float) and 0 <= weight <= 1e6 for weight in value.values())
            and any(value.values())
        ),
    )
    temperature: float = number(2.0, 0, 1000, above=True)
    prune: Gradual | None = ruled(  # while it is trained: a PruningCallback
        None,
        "a mapping of what to prune, such as {ratio: 0.5, importance: movement}",
        lambda value: isinstance(value, Gradual),
        optional=True,
    )
    lora: Lora | None = ruled(  # adapters are trained, and added to the weights in the end
        None,
        "a mapping such as {r: 16, alpha: 32, targets: all-linear}",
        lambda value: isinstance(value, Lora),
        optional=True,
    )
    # Arguments of `DistillationArguments`, which says what they mean; null: its default.
    temperature_final: float | None = option()
    temperature_squared: bool | None = option()
    divergence: str | None = option()
    jsd_beta: float | None = option()
    soft_positions: str | None = option()
    hidden_loss: str | None = option()
    attention_loss: str | None = option()
    relation_heads: int | None = option()
    relation_layers: Any = option()
    score_loss: str | None = option()
    embedding_loss: str | None = option()
    matryoshka_dims: Any = option()
    pooling: str | None = option()
    layer_map: Any = option()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.losses:
            if name not in LOSSES:
                raise ConfigError(f"losses: {unknown_name('loss', name, LOSSES)}")
        if self.lora is not None and self.prune is not None:
            raise ConfigError("lora: adapters cannot be pruned while they are trained. Put a stage prune before.")
        object.__setattr__(self, "losses", {name: float(weight) for name, weight in self.losses.items()})
        for name, value in self.options.items():
            try:
                DistillationOptions(**{name: value})
            except (ConfigError, TypeError) as error:
                raise ConfigError(f"{name}: {error}") from None

    @classmethod
    def read(cls, section: Any, path: str, task: str | None = None) -> "DistillStage":
        """Losses that are not given are those of the task, if it has its own."""
        usual = TASKS[task].losses if task in TASKS else None
        if isinstance(section, dict) and usual is not None:
            section = {"losses": dict(usual)} | section
        if isinstance(section, dict) and section.get("lora") is not None:
            section = section | {"lora": read(Lora, section["lora"], f"{path}.lora")}
        if isinstance(section, dict) and section.get("prune") is not None:
            gradual, timing = section["prune"], [name for name in keys_of(Gradual) if name != "config"]
            check_keys(gradual, [*WHILE_TRAINING, *timing], f"{path}.prune")
            config = make(PruningConfig, part(gradual, WHILE_TRAINING), f"{path}.prune")
            section = section | {"prune": make(Gradual, {"config": config} | part(gradual, timing), f"{path}.prune")}
        return read(cls, section, path)

    def to_dict(self) -> dict[str, Any]:
        """Options and `prune` only where they are asked for."""
        always = keys_of(TrainingSettings)
        written = {name: value for name, value in super().to_dict().items() if value is not None or name in always}
        return written if self.prune is None else written | {"prune": self.prune.to_dict()}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `DistillationArguments` that were given, beside losses and temperature."""
        names = [entry.name for entry in dataclasses.fields(self) if OPTION in entry.metadata]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def teaches_directions(self) -> bool:
        return bool(self.losses.get("embedding")) and self.embedding_loss in (None, "cosine")

    @property
    def training(self) -> TrainingSettings:
        return self

    @property
    def pruning(self) -> PruningConfig | None:
        return None if self.prune is None else self.prune.config

    def check_task(self, path: str, task: str) -> None:
        active = [name for name, weight in self.losses.items() if weight]
        try:
            check_losses(active, headless=not TASKS[task].trains)
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from None

    def check_lengths(self, path: str, run: Run, limit: int) -> int:
        """A teacher that reads only the beginning can answer for a whole text, and for nothing else."""
        check_length(f"{path}.max_length", self.max_length, limit)
        cut, task = self.teacher_cut(run, run.config), run.recipe.task
        by_token = any(weight and LOSSES[name].maps_layers for name, weight in self.losses.items())
        if cut is not None and (TASKS[task].kind not in ("examples", "scores") or by_token):
            raise ConfigError(
                f"{path}: the teacher takes {cut} tokens and the student gets more, so it can answer for a whole text "
                f"(tasks text-classification and reranking, loss kd), but nothing else. Set {path}.max_length to {cut}"
                + (", or losses to {ce: 1.0}." if TASKS[task].trains else ".")
            )
        return limit

    def teacher_cut(self, run: Run, teacher: Any) -> int | None:
        """Where the teacher's inputs must be cut, since it takes fewer tokens than the student gets; None: nowhere."""
        length, limit = self.max_length or run.recipe.data.max_length, token_limit(teacher, rotary=False)
        needed = any(weight and LOSSES[name].needs_teacher for name, weight in self.losses.items())
        return limit if needed and limit is not None and length is not None and length > limit else None

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        if self.pruning is not None:
            check_pruning(run, config, self.pruning, before)
        if run.modules is not None and run.modules.pooling is not None:
            run.modules.check_taught(self.pooling, self.teaches_directions, f"{path}.")
        width = getattr(config, "hidden_size", 0) if self.losses.get("embedding") else 0
        if self.matryoshka_dims and max(self.matryoshka_dims) >= width:
            raise ConfigError(
                f"{path}.matryoshka_dims is for the loss embedding, and lengths below {width or 'that of vectors'}; "
                f"got {self.matryoshka_dims}."
            )
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from .fit import logged_losses, trained

        (trainer, parameters), smaller = trained(run, self, partial(self.distilled, run, source, target))
        sizes = {} if self.pruning is None else pruned(self.pruning, parameters, trainer.model)
        facts = {"train": len(trainer.train_dataset)} | sizes | logged_losses(trainer) | smaller
        return facts | run.save(trainer.model, target)

    def distilled(self, run: Run, source: Path, target: Path, batch_size: int) -> "tuple[DistillationTrainer, int]":
        """A trainer that has trained its student, and the parameters that the student had before."""
        from ..distillation.arguments import DistillationArguments
        from ..distillation.trainer import DistillationTrainer
        from ..pruning.callback import PruningCallback
        from ..pruning.score.calibration import average_length
        from .fit import first_batches, fit, make_trainer, training_arguments

        student, teacher = run.load(source), run.load(run.teacher_folder)
        prepared = run.data(self.max_length, config=student.config)
        more = {"pooling": run.pooling} | self.options | {"losses": self.losses, "temperature": self.temperature}
        more["teacher_max_length"] = self.teacher_cut(run, teacher.config)
        arguments = training_arguments(DistillationArguments, run, self, target, batch_size, **more)
        parameters, callbacks = student.num_parameters(), []
        if self.prune is not None:
            gradual, rows = self.prune, first_batches(prepared, LENGTH_ROWS, self.batch_size)
            # Where the settings do not say at which length MACs are counted, it is that of the training rows.
            length = gradual.config.sequence_length or average_length(rows, student)
            config = dataclasses.replace(gradual.config, sequence_length=length)
            callbacks.append(PruningCallback(config, gradual.start, gradual.end, gradual.every, gradual.momentum))
        if self.lora is not None:
            student = self.lora.adapted(student)
        trainer = make_trainer(DistillationTrainer, student, arguments, prepared, callbacks, teacher=teacher)
        fit(trainer)
        if self.lora is not None:
            trainer.model = merged(trainer.model)
        return trainer, parameters
