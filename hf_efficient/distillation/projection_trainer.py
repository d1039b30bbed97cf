"""A trainer whose student has learned projections beside it while it trains, and in its checkpoints."""

from typing import Any

from torch import nn
from transformers.trainer_utils import TrainOutput

from ..training.trainers import StepTrainer
from .losses.projections import ATTRIBUTE, attach, detach, load_projections, own_tensors, save_projections


class ProjectionTrainer(StepTrainer):
    """As `StepTrainer`; the optimizer, DDP, FSDP and DeepSpeed treat `projections` as parameters of the student, which
    is saved without them."""

    @property
    def projections(self) -> nn.ModuleDict:
        """By the name of the place, where the widths of student and teacher differ."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer.train`. The projections are part of the student only while it trains."""
        if not self.projections:
            return super().train(*args, **kwargs)
        if not hasattr(self.model, ATTRIBUTE):
            attach(self.model, self.projections)
        try:
            return super().train(*args, **kwargs)
        finally:
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self.remove_projections()

    def remove_projections(self) -> None:
        """Take the projections off the student; `train` does it, except under FSDP and DeepSpeed, which own them."""
        if hasattr(self.model, ATTRIBUTE):
            detach(self.model, self.projections)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on the projections: decay towards 0 would pull the student's states with it."""
        return [name for name in super().get_decay_parameter_names(model) if ATTRIBUTE not in name.split(".")]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        tensors = None
        if hasattr(self.model, ATTRIBUTE):
            tensors = own_tensors(state_dict, self.projections)
        super()._save(output_dir, state_dict)
        if tensors and self.args.should_save:
            save_projections(output_dir or self.args.output_dir, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.projections and not self.is_fsdp_enabled:  # an FSDP checkpoint holds them with the model
            load_projections(resume_from_checkpoint, self.projections)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.projections and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_projections(self.state.best_model_checkpoint, self.projections)
