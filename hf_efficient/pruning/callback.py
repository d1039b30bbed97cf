"""Prune while training: the ratio rises on a schedule in a standard `Trainer` run, and the model shrinks at the end.

    trainer = Trainer(model=model, ..., callbacks=[PruningCallback(PruningConfig(ratio=0.5))])
    trainer.train()          # trainer.model is the small model now

During training the removed units are zero and stay zero, gradients and optimizer moments included, so the network has
the function of the smaller one while checkpoints keep the full shape. The scores are a running average of the Taylor
scores that the training gradients give for free. What is removed can be read from the weights alone, so a resumed run
goes on exactly; the scores are saved beside the checkpoint.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..models.building import check_model
from .config import PruningConfig
from .groups import Group, expand, find_groups, output_weight, unit_parameters
from .importance import gradient_scores, magnitude, random
from .plan import PruningPlan
from .prune import DEFAULT_LENGTH, allocate, total_cost
from .schedule import ratio_at
from .surgery import apply_plan

STATE_FILE = "pruning_scores.safetensors"


class PruningCallback(TrainerCallback):
    """Structured pruning of heads and neurons during a Trainer run.

    Parameters:
        config: `granularity` may hold `head` and `neuron`; drop layers with `prune` before training.
        start, end: when the schedule runs, as fractions of the run; after `end` the network only recovers.
        every: optimizer steps between two increases of the ratio.
        sequence_length: the length at which MACs are counted.
        momentum: of the running average of the scores.
    """

    def __init__(
        self,
        config: PruningConfig,
        start: float = 0.05,
        end: float = 0.7,
        every: int = 10,
        sequence_length: int = DEFAULT_LENGTH,
        momentum: float = 0.9,
    ):
        if "layer" in config.granularity:
            raise ConfigError(
                "PruningCallback removes heads and neurons while training. Drop layers before: "
                "model = prune(model, PruningConfig(granularity='layer', ...), calibration)."
            )
        if not 0 <= start < end <= 1:
            raise ConfigError(
                f"start and end are fractions of the run with 0 <= start < end <= 1, got {start}, {end}."
            )
        if every < 1:
            raise ConfigError(f"every must be at least 1 optimizer step, got {every}.")
        self.config, self.start, self.end, self.every = config, start, end, every
        self.sequence_length, self.momentum = sequence_length, momentum
        self.scores: dict[Group, torch.Tensor] = {}
        self.removed: dict[Group, torch.Tensor] = {}  # bool [units]
        self.total = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        check_model(model)
        if args.fsdp or args.deepspeed:
            raise UnsupportedModelError(
                "PruningCallback needs whole parameters on every process; FSDP and DeepSpeed shard them. "
                "Use DDP, or prune with `prune(...)` and then distil under FSDP."
            )
        kinds = {"head": ("heads", "cross_heads"), "neuron": ("neurons",)}
        wanted = [kind for name in self.config.granularity for kind in kinds[name]]
        groups = [group for group in find_groups(model) if group.kind in wanted]
        self.removed = {group: _zero_units(model, group) for group in groups}
        self.scores = {group: torch.zeros(group.units) for group in groups}
        self.total = total_cost(model, self.config.metric, self.sequence_length)
        if state.global_step > 0:
            self._load_scores(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.config.importance == "taylor":
            for group, score in self.scores.items():
                score.mul_(self.momentum).add_(gradient_scores(model, group), alpha=1 - self.momentum)
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
            tensors = {f"{g.stack}.{g.kind}.{g.layers[0]}": score for g, score in self.scores.items()}
            save_file(tensors, folder / f"{STATE_FILE}.tmp")
            (folder / f"{STATE_FILE}.tmp").replace(folder / STATE_FILE)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Shrink the model object itself, so that `trainer.model` and whoever holds it have the small one."""
        units = {group: ~_zero_units(model, group) for group in self.removed}
        kept = {group: tuple(mask.nonzero().flatten().tolist()) for group, mask in units.items()}
        become(model, apply_plan(model, PruningPlan(units=kept)))

    def _load_scores(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.exists():
            raise CheckpointError(f"{path} is missing: this checkpoint was not written by a run with PruningCallback.")
        tensors = load_file(path)
        self.scores = {group: tensors[f"{group.stack}.{group.kind}.{group.layers[0]}"] for group in self.scores}

    def _raise_to(self, model: PreTrainedModel, ratio: float) -> None:
        scores = self._current_scores(model)
        for group, score in scores.items():  # what is gone stays gone
            score[self.removed[group]] = -1.0
        kept = allocate(model, scores, self.config, self.sequence_length, ratio * self.total)
        for group, units in kept.items():
            mask = torch.ones(group.units, dtype=torch.bool)
            mask[list(units)] = False
            self.removed[group] |= mask

    def _current_scores(self, model: PreTrainedModel) -> dict[Group, torch.Tensor]:
        groups = list(self.scores)
        if self.config.importance == "taylor":
            return {group: score.clone() for group, score in self.scores.items()}
        score = {"magnitude": magnitude, "random": random}[self.config.importance]
        options = {"metric": self.config.metric, "length": self.sequence_length, "seed": self.config.seed}
        return score(model, groups, **options)

    def _zero_rows(self, model: PreTrainedModel):
        """(parameter, dimension, row numbers) of everything that belongs to removed units."""
        for group, mask in self.removed.items():
            if not mask.any():
                continue
            units = mask.nonzero().flatten()
            for member in group.members:
                for parameter, dim, width in unit_parameters(model, member):
                    yield parameter, dim, expand(units, width).to(parameter.device)

    @torch.no_grad()
    def _apply(self, model: PreTrainedModel, optimizer) -> None:
        for parameter, dim, rows in self._zero_rows(model):
            parameter.index_fill_(dim, rows, 0)
            for moment in optimizer.state.get(parameter, {}).values() if optimizer is not None else ():
                if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                    moment.index_fill_(dim, rows, 0)


def _zero_units(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """Bool `[units]`: the units that nothing reads, because all their output columns are zero."""
    zero = torch.ones(group.units, dtype=torch.bool)
    for member in group.members:
        columns = output_weight(model, member).detach().ne(0).any(0)
        zero &= ~columns.reshape(group.units, -1).any(1).cpu()
    return zero


def become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Turn the object `model` into `other`, so that every reference to it sees the new structure."""
    model.__class__ = other.__class__
    model.__dict__ = other.__dict__
