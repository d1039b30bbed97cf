"""Learned maps from the student's width to the teacher's, and how they live beside a model that must not keep them.

Where the widths differ each compared pair has its own `Linear(student -> teacher, bias=False)` (FitNets, Romero et al.
2015). The projections are only a tool of training: they are attached to the student while it trains, so that the
optimizer, DDP, FSDP and DeepSpeed treat them as parameters, and never appear in a saved model. Checkpoints keep them
in a file of their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...io.disk import write_atomic

ATTRIBUTE = "_distillation_projections"
SIDE_FILE = "distillation_projections.safetensors"


def make_projections(widths: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> nn.ModuleDict:
    """From student to teacher widths by name, in float32 or wider; they keep angles at the start. None where equal."""
    projections = nn.ModuleDict()
    for name, (own, other) in widths.items():
        if own != other:
            linear = nn.Linear(own, other, bias=False, dtype=torch.promote_types(dtype, torch.float32))
            nn.init.orthogonal_(linear.weight)
            projections[name] = linear
    return projections


def project(projections: nn.ModuleDict, name: str, state: Tensor) -> Tensor:
    """`state` in the teacher's width: [..., student width] -> [..., teacher width]."""
    if name not in projections:
        return state
    linear: Any = projections[name]
    return linear(state.to(linear.weight.dtype))


def attach(student: Any, projections: nn.ModuleDict) -> None:
    """Make the projections parameters of the student that `save_pretrained` leaves out."""
    student.add_module(ATTRIBUTE, projections)
    student._keys_to_ignore_on_save = _ignored(student) | _keys(projections)


def detach(student: Any, projections: nn.ModuleDict) -> None:
    """Undo `attach`: the student is again the model it was."""
    delattr(student, ATTRIBUTE)
    student._keys_to_ignore_on_save = _ignored(student) - _keys(projections)


def save_projections(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write the side file; a run that is killed while writing leaves the former file as it was."""
    content = safetensors.torch.save({key: value.detach().contiguous() for key, value in tensors.items()})
    write_atomic(Path(folder, SIDE_FILE), content)


def load_projections(folder: str | Path, projections: nn.ModuleDict) -> None:
    """Read the side file back; CheckpointError if it is not there, or of other losses, layers or widths."""
    path = Path(folder, SIDE_FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {SIDE_FILE}: it was not written by a run with these losses. Resume with the losses "
            "of that run, or start again from its weights without resume_from_checkpoint."
        )
    try:
        projections.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this student, teacher and layer_map: {error}") from error


def own_tensors(state_dict: dict[str, Tensor] | None, projections: nn.ModuleDict) -> dict[str, Tensor]:
    """The projections' tensors, from a gathered state dict (FSDP, DeepSpeed) where there is one."""
    prefix = ATTRIBUTE + "."
    gathered = {k.removeprefix(prefix): v for k, v in (state_dict or {}).items() if k.startswith(prefix)}
    return gathered or projections.state_dict()


def _keys(projections: nn.ModuleDict) -> set[str]:
    return {f"{ATTRIBUTE}.{key}" for key in projections.state_dict()}


def _ignored(student: Any) -> set[str]:
    return set(getattr(student, "_keys_to_ignore_on_save", None) or ())
