"""What is wrong with a checkpoint that was damaged or changed on a disk, in one message.

check_state("out/checkpoint-500")                     # trainer_state.json, before anything is loaded
with clear_faults("out/checkpoint-500", "optimizer.pt"):
    trainer.load(...)                                 # whatever fails inside is a CheckpointError
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerState

from ..errors import CheckpointError, HfEfficientError, shown
from ..io.json import read_json

STATE = "trainer_state.json"
MAX_STEPS = 1 << 40
NUMBER = (int, float)
NONE = type(None)

# What each field of the state may be; True is no number here.
KINDS: dict[str, tuple[type, ...]] = {
    "epoch": (*NUMBER, NONE),
    "global_step": (int,),
    "max_steps": (int,),
    "logging_steps": NUMBER,
    "eval_steps": (*NUMBER, NONE),
    "save_steps": NUMBER,
    "train_batch_size": (int, NONE),
    "num_train_epochs": NUMBER,
    "num_input_tokens_seen": NUMBER,
    "total_flos": NUMBER,
    "log_history": (list, NONE),
    "best_metric": (*NUMBER, NONE),
    "best_global_step": (int, NONE),
    "best_model_checkpoint": (str, NONE),
    "is_local_process_zero": (bool,),
    "is_world_process_zero": (bool,),
    "is_hyper_param_search": (bool,),
    "trial_name": (str, NONE),
    "trial_params": (dict, NONE),
    "stateful_callbacks": (dict, NONE),
}
# What optimizers keep for each weight, of its shape.
SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def check_state(checkpoint: str | Path) -> None:
    """CheckpointError if trainer_state.json is not what a training writes."""
    with clear_faults(checkpoint, STATE):
        try:
            values = read_json(Path(checkpoint, STATE))
        except CheckpointError as error:  # its advice is another: `clear_faults` says what to do
            raise ValueError(str(error.__cause__ or error)) from error
        if not isinstance(values, dict):
            raise ValueError(f"it is not a mapping but {shown(values)}")
        if unknown := values.keys() - {item.name for item in fields(TrainerState)}:
            raise ValueError(f"unknown field {shown(min(unknown))}")
        for name, value in values.items():
            if name in KINDS and type(value) not in KINDS[name]:
                raise ValueError(f"{name} is {shown(value)}")
        step, last = values.get("global_step", 0), values.get("max_steps", 0)
        if not 0 <= step <= (last if 0 < last < MAX_STEPS else MAX_STEPS):
            raise ValueError(f"global_step is {shown(step)} of {shown(last)}")
        for name in ("max_steps", "num_train_epochs", "epoch", "train_batch_size"):
            value = values.get(name) or 0
            if not math.isfinite(value) or not -1 <= value <= MAX_STEPS:
                raise ValueError(f"{name} is {shown(value)}")
        number = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
        if number and number[1] != str(step):
            raise ValueError(f"global_step is {step} in {Path(checkpoint).name}")
        callbacks = (values.get("stateful_callbacks") or {}).values()
        if any(type(entry) not in (dict, list) for entry in callbacks):
            raise ValueError("stateful_callbacks is not a mapping of mappings")
        if any(type(entry) is not dict for entry in values.get("log_history") or []):
            raise ValueError("log_history is not a list of mappings")


@contextmanager
def clear_faults(checkpoint: str | Path, name: str) -> Iterator[None]:
    """Whatever fails within becomes a CheckpointError that names the file `name`, what is wrong, and what to do."""
    try:
        yield
    except (HfEfficientError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if should_reduce_batch_size(error):  # memory, which is nobody's fault
            raise
        folder = Path(checkpoint)
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{folder / name} is damaged, or of another training: {reason}. Delete the folder {folder}: resuming "
            "then goes on from the checkpoint before it; if there is none, training starts again."
        ) from error


def check_schedule(state: Any, expected: Mapping[str, Any]) -> None:
    """ValueError if what was saved of a scheduler has other fields than it keeps, or no number in a number's place."""
    if not isinstance(state, dict) or state.keys() != expected.keys():
        raise ValueError(f"it holds {shown(state)}")
    for name, value in expected.items():
        if type(value) in NUMBER and type(state[name]) not in NUMBER:
            raise ValueError(f"{name} is {shown(state[name])}")
        if isinstance(value, list) and (not isinstance(state[name], list) or len(state[name]) != len(value)):
            raise ValueError(f"{name} is {shown(state[name])}")


def check_moments(optimizer: Any) -> None:
    """ValueError if what was saved of a weight has not its shape."""
    for weight, moments in optimizer.state.items():
        for name in SHAPED:
            if torch.is_tensor(moments.get(name)) and moments[name].shape != weight.shape:
                raise ValueError(f"{name} of shape {tuple(moments[name].shape)} for a weight of {tuple(weight.shape)}")
