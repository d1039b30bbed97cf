"""Checkpoints of a training run: all of one, or none. A `Trainer` that gets back every weight of a checkpoint.

transformers 5 writes some families (ViT) under the parameter names of older versions, and `from_pretrained` translates
them; but `Trainer` reads a checkpoint back without translating and drops what it does not know. A resumed run, or
`load_best_model_at_end`, then goes on from other weights, with a warning at most (seen in 5.23).
"""

import copy
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback

WEIGHTS = "model.safetensors"
COMPLETE = "complete"  # marks a checkpoint that was written to its end


class ExactTrainer(Trainer):
    """As `Trainer`; what it restores is what was saved."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        restore_renamed(self.model, self.state.best_model_checkpoint)


def restore_renamed(model, checkpoint: str | Path) -> None:
    """Load the weights through `from_pretrained` if the file has names that the model does not know."""
    path = Path(checkpoint) / WEIGHTS
    if not isinstance(model, PreTrainedModel) or not path.is_file():
        return  # adapters, FSDP and DeepSpeed have formats of their own
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    if names <= set(model.state_dict()):
        return
    saved = type(model).from_pretrained(checkpoint, config=copy.deepcopy(model.config), dtype=model.dtype)
    model.load_state_dict(saved.state_dict(), strict=False)  # what is not in the file stays as it is


class MarkComplete(TrainerCallback):
    """A killed run may leave half a checkpoint; only marked ones are resumed from."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run with `MarkComplete`, None if there is none."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)
