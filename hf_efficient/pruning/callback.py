"""Prune while training: the ratio rises on a schedule in a standard `Trainer` run.

    trainer = Trainer(model=model, ..., callbacks=[PruningCallback(PruningConfig(ratio=0.5, importance="movement"))])
    trainer.train()          # trainer.model is the small model now

During training what is removed is zero and stays zero, gradients and optimizer moments included, so the network has
the function of the smaller one while checkpoints keep the full shape. Heads and neurons leave for good when training
ends; single weights (granularity `"weight"`) are then exact zeros. Scores and removed parts are saved beside each
checkpoint, so a resumed run goes on exactly.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import CheckpointError, ConfigError
from ..io.disk import write_atomic
from ..models.anatomy import Anatomy
from ..models.rebuild import check_model
from ..training.trainers import restore_renamed
from .config import PruningConfig
from .gradual.removal import Removal
from .gradual.schedule import Gradual
from .gradual.units import UnitRemoval
from .gradual.weights import WeightRemoval
from .gradual.zeros import HeldZeros, check_sharding

STATE_FILE = "pruning_state.safetensors"
ROUNDING = 1e-3  # of weights a whole number leaves, which may be a little less than the ratio

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback):
    """Pruning during a Trainer run, of heads and neurons or of single weights.

    With `load_best_model_at_end` the best checkpoint is what remains: choose the metric and the evaluation steps so
    that it comes after `end`, or less than `ratio` is removed (a warning says so).

    Parameters:
        config: `granularity` may hold `head` and `neuron`, or be `weight` alone. `importance` is one that training
            gives (`taylor`, `fisher`, `movement`: see `pruning.gradual.removal`) or one that needs no data. MACs are
            counted at `sequence_length`, by default 128, for images the number of patches. `steps`, `reconstruct` and
            `layer_importance` are those of `prune`.
        start, end: when the schedule runs, as fractions of the run; after `end` the network only recovers.
        every: optimizer steps between two increases of the ratio.
        momentum: of the running averages of `taylor` and `fisher`.

    Raises:
        ConfigError: a value that is not allowed; when training begins, a ratio that cannot be reached.
        UnsupportedModelError: FSDP or DeepSpeed, when training begins.
    """

    def __init__(
        self, config: PruningConfig, start: float = 0.05, end: float = 0.7, every: int = 10, momentum: float = 0.9
    ):
        self.settings = Gradual(config, start, end, every, momentum)
        self.removal: Removal
        self._held: HeldZeros | None = None

    @property
    def config(self) -> PruningConfig:
        return self.settings.config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        check_model(model)
        check_sharding(args, "PruningCallback")
        trained = {id(weight) for group in kwargs["optimizer"].param_groups for weight in group["params"]}
        if not any(id(weight) in trained for weight in model.parameters()):
            raise ConfigError(
                "The Trainer's optimizer was discarded when pruning ended, or belongs to another model. To train the "
                "pruned model further, make a new Trainer (where single weights are zero, with the callback "
                "KeepZeros())."
            )
        self._release()
        kind = WeightRemoval if "weight" in self.config.granularity else UnitRemoval
        self.removal = kind(Anatomy.of(model), self.settings)
        self._held = HeldZeros(model)
        if state.global_step > 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore_renamed(model, checkpoint)
            self.removal.load_tensors(_read(checkpoint / STATE_FILE))
            self._held.hold(self.removal.zeros(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.removal.learn(model)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._held.apply(optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        ratio = self.settings.ratio(state.global_step, state.max_steps)
        if ratio > 0:
            self.removal.raise_to(model, ratio)
            self._held.hold(self.removal.zeros(model))
            self._held.apply(optimizer)

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_atomic(folder / STATE_FILE, save(self.removal.to_tensors()))

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Change the model object itself, so that `trainer.model` and whoever holds it have the result."""
        self._release()
        # Let go of the full weights and their moments; the Trainer keeps the empty optimizer.
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = []
        reached = self.removal.finish(model)
        if reached < self.config.ratio - ROUNDING:
            what = "weights" if "weight" in self.config.granularity else self.config.metric
            logger.warning(
                f"PruningCallback removed {reached:.3f} of the {what} instead of {self.config.ratio}: "
                "training ended, or its best checkpoint was saved, before the schedule did."
            )

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
        self._held = None


def _read(path: Path):
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing. Resume from a checkpoint in output_dir that a run with PruningCallback wrote."
        )
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Resume from another checkpoint, or start anew."
        ) from error
