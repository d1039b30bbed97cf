"""Prune while training: the ratio rises on a schedule in a standard `Trainer` run, and the model shrinks at the end.

    trainer = Trainer(model=model, ..., callbacks=[PruningCallback(PruningConfig(ratio=0.5))])
    trainer.train()          # trainer.model is the small model now

During training the removed units are zero and stay zero, gradients and optimizer moments included, so the network has
the function of the smaller one while checkpoints keep the full shape. The scores are a running average of the Taylor
scores that the training gradients give for free. Scores and removed units are saved beside each checkpoint, so a
resumed run goes on exactly.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..models.building import check_model
from ..training import restore_renamed
from .calibration import average_length
from .config import PruningConfig
from .costs import Costs, make_costs, total_cost
from .groups import Group, find_groups, output_weight, unit_parameters
from .importance import IMPORTANCES, gradient_scores
from .plan import PruningPlan
from .schedule import ratio_at
from .search import allocate
from .surgery import apply_plan

STATE_FILE = "pruning_state.safetensors"

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback):
    """Structured pruning of heads and neurons during a Trainer run.

    With `load_best_model_at_end` the best checkpoint is what becomes small: choose the metric and the evaluation steps
    so that it comes after `end`, or less than `ratio` is removed (a warning says so).

    Parameters:
        config: `granularity` may hold `head` and `neuron`; drop layers with `prune` before training.
        start, end: when the schedule runs, as fractions of the run; after `end` the network only recovers.
        every: optimizer steps between two increases of the ratio.
        sequence_length: the length at which MACs are counted; by default 128, for images the number of patches.
        momentum: of the running average of the scores.

    Raises:
        ConfigError: a value that is not allowed; when training begins, a ratio that cannot be reached.
    """

    def __init__(
        self,
        config: PruningConfig,
        start: float = 0.05,
        end: float = 0.7,
        every: int = 10,
        sequence_length: int | None = None,
        momentum: float = 0.9,
    ):
        if "layer" in config.granularity:
            raise ConfigError(
                "PruningCallback removes heads and neurons while training. Drop layers before: "
                "model = prune(model, PruningConfig(granularity='layer', ...), calibration)."
            )
        if "weight" in config.granularity:
            raise ConfigError(
                "PruningCallback removes heads and neurons while training. Make weights zero afterwards: "
                "model = prune(model, PruningConfig(granularity='weight', ...), calibration)."
            )
        if config.metric == "latency":
            raise ConfigError(
                "PruningCallback counts MACs or parameters; metric='latency' is checked by timing small models, which "
                "are made only at its end. Choose metric='macs', or prune(model, config, calibration) and then train."
            )
        if not 0 <= start < end <= 1:
            raise ConfigError(
                f"start and end are fractions of the run with 0 <= start < end <= 1, got {start}, {end}."
            )
        if type(every) is not int or every < 1:
            raise ConfigError(f"every must be a whole number of optimizer steps, at least 1, got {every!r}.")
        if sequence_length is not None and (type(sequence_length) is not int or sequence_length < 1):
            raise ConfigError(
                f"sequence_length must be a whole number of tokens, at least 1, got {sequence_length!r}."
            )
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be from 0 to below 1, got {momentum}.")
        self.config, self.start, self.end, self.every = config, start, end, every
        self.sequence_length, self.momentum = sequence_length, momentum
        self.length = 0
        self.costs: Costs
        self.scores: dict[Group, torch.Tensor] = {}
        self.removed: dict[Group, torch.Tensor] = {}  # bool [units]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        check_model(model)
        if args.fsdp or args.deepspeed:
            raise UnsupportedModelError(
                "PruningCallback needs whole parameters on every process; FSDP and DeepSpeed shard them. "
                "Use DDP, or prune with `prune(...)` and then distil under FSDP."
            )
        _check_optimizer(model, kwargs.get("optimizer"))
        groups = [group for group in find_groups(model) if group.kind in self.config.unit_kinds]
        self.removed = {group: torch.zeros(group.units, dtype=torch.bool) for group in groups}
        self.scores = {group: torch.zeros(group.units) for group in groups}
        self.length = self.sequence_length or average_length([], model)
        self.costs = make_costs(model, self.config.metric, self.length)
        # A ratio that is out of reach must be an error now and not in the middle of the run.
        allocate(model, self.scores, self.config, self.costs, self.config.ratio * self.costs.total)
        if state.global_step > 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore_renamed(model, checkpoint)
            self._load_state(checkpoint / STATE_FILE)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = {parameter: parameter.grad for parameter in model.parameters()}
        for group, score in self.scores.items() if self.config.importance == "taylor" else ():
            new = gradient_scores(model, group, gradients)
            if new.isfinite().all():  # an fp16 overflow, whose step is skipped, must not stay in the average
                score.mul_(self.momentum).add_(new, alpha=1 - self.momentum)
        for parameter, dim, rows in self._zero_rows(model):
            if parameter.grad is not None:
                parameter.grad.index_fill_(dim, rows, 0)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._apply(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        first, last = int(self.start * state.max_steps), max(1, int(self.end * state.max_steps))
        if state.global_step > last or (state.global_step % self.every and state.global_step != last):
            return
        ratio = ratio_at(self.config.schedule, state.global_step, first, last, self.config.ratio)
        if ratio > 0:
            self._raise_to(model, ratio)
            self._apply(model, optimizer)

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {f"{group.name}.scores": score for group, score in self.scores.items()}
            tensors |= {f"{group.name}.removed": mask for group, mask in self.removed.items()}
            save_file(tensors, folder / f"{STATE_FILE}.tmp")
            (folder / f"{STATE_FILE}.tmp").replace(folder / STATE_FILE)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Shrink the model object itself, so that `trainer.model` and whoever holds it have the small one."""
        kept = {}
        for group, removed in self.removed.items():
            gone = removed & _zero_units(model, group)  # fewer, if the Trainer went back to its best checkpoint
            kept[group.name] = tuple((~gone).nonzero().flatten().tolist())
        become(model, apply_plan(model, PruningPlan(units=kept)))
        reached = 1 - total_cost(model, self.config.metric, self.length) / self.costs.total
        if reached < self.config.ratio - 1e-6:
            logger.warning(
                f"PruningCallback removed {reached:.3f} of the {self.config.metric} instead of {self.config.ratio}: "
                "training ended, or its best checkpoint was saved, before the schedule did."
            )

    def _load_state(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing. Resume from a checkpoint in output_dir that a run with PruningCallback wrote."
            )
        tensors = load_file(path)
        self.scores = {group: tensors[f"{group.name}.scores"] for group in self.scores}
        self.removed = {group: tensors[f"{group.name}.removed"] for group in self.removed}

    def _raise_to(self, model: PreTrainedModel, ratio: float) -> None:
        scores = self._current_scores(model)
        for group, score in scores.items():
            score[self.removed[group]] = -torch.inf  # what is gone stays gone
        kept = allocate(model, scores, self.config, self.costs, ratio * self.costs.total)
        for group, units in kept.items():
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[list(units)] = False
            self.removed[group] |= gone

    def _current_scores(self, model: PreTrainedModel) -> dict[Group, torch.Tensor]:
        if self.config.importance == "taylor":
            return {group: score.clone() for group, score in self.scores.items()}
        options = {"length": self.length, "seed": self.config.seed}
        return IMPORTANCES[self.config.importance](model, list(self.scores), **options)

    def _zero_rows(self, model: PreTrainedModel):
        """(parameter, dimension, row numbers) of everything that belongs to removed units."""
        for group, mask in self.removed.items():
            if not mask.any():
                continue
            units = mask.nonzero().flatten()
            for member in group.members:
                for parameter, part in unit_parameters(model, member):
                    yield parameter, part.dim, part.rows(units, parameter)

    @torch.no_grad()
    def _apply(self, model: PreTrainedModel, optimizer) -> None:
        for parameter, dim, rows in self._zero_rows(model):
            parameter.index_fill_(dim, rows, 0)
            for moment in optimizer.state.get(parameter, {}).values():
                if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                    moment.index_fill_(dim, rows, 0)


def _check_optimizer(model: PreTrainedModel, optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ConfigError(
            "The Trainer's optimizer still belongs to the model before it became small. "
            "To train the small model further, make a new Trainer."
        )


def _zero_units(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """Bool `[units]`: the units that nothing reads, because all their output columns are zero."""
    zero = torch.ones(group.units, dtype=torch.bool)
    for member in group.members:
        read = output_weight(model, member).detach().ne(0)
        zero &= ~member.output.by_unit(read).any(1).cpu()
    return zero


def become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Turn the object `model` into `other`, so that every reference to it sees the new structure."""
    model.__class__ = other.__class__
    model.__dict__ = other.__dict__
