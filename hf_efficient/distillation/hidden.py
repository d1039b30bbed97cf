"""The mapped hidden states of student and teacher, and the projections between their widths.

    pairs = make_pairs(student, teacher, layer_map="auto", stacks=task.stacks)
    for s, t in pairs("encoder", student_outputs, teacher_outputs):      # both [batch, length, teacher width]
        ...

Where the widths differ each pair has its own `Linear(student -> teacher, bias=False)` (FitNets, Romero et al. 2015).
The projections are only a tool of training: they are attached to the student while it trains, so that optimizer, DDP,
FSDP and DeepSpeed treat them as parameters, and never appear in a saved model. Checkpoints keep them in a file of
their own.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..errors import CheckpointError
from .layer_map import LayerMap, Pairs, map_layers, width

ATTRIBUTE = "_distillation_projections"
SIDE_FILE = "distillation_projections.safetensors"


class HiddenPairs:
    """Callable that yields the mapped (student, teacher) hidden states of one stack, student side projected.

    Attributes:
        pairs: for each stack, (student, teacher) positions in `hidden_states`.
        projections: one Linear for each pair, empty where the widths are equal.
    """

    def __init__(self, pairs: dict[str, Pairs], projections: nn.ModuleDict):
        self.pairs = pairs
        self.projections = projections

    def __len__(self) -> int:
        return sum(map(len, self.pairs.values()))

    def wanted(self, side: int) -> list[int] | bool:
        """`output_hidden_states` for a model; side 0 is the student, 1 the teacher."""
        if not selects_positions():
            return True
        return sorted({pair[side] for pairs in self.pairs.values() for pair in pairs})

    def __call__(self, stack: str, student: Any, teacher: Any) -> Iterator[tuple[Tensor, Tensor]]:
        field = f"{stack}_hidden_states" if len(self.pairs) > 1 else "hidden_states"
        for student_layer, teacher_layer in self.pairs[stack]:
            state = student[field][student_layer]
            name = _name(stack, student_layer, teacher_layer)
            if name in self.projections:
                weight = self.projections[name].weight
                state = self.projections[name](state.to(weight.dtype))
            yield state, teacher[field][teacher_layer]


@cache
def selects_positions() -> bool:
    """Whether `output_hidden_states=[1]` keeps `hidden_states[1]` alone, as transformers 5.23 does.

    5.17 counts layers without the embeddings there, which would be off by one without an error; so a model is asked.
    """
    config = BertConfig(vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        states = BertModel(config).eval()(torch.tensor([[0]]), output_hidden_states=[1]).hidden_states
    return [state is None for state in states] == [True, False]


def make_pairs(student: nn.Module, teacher: nn.Module, layer_map: LayerMap, stacks: tuple[str, ...]) -> HiddenPairs:
    """Resolve the layer map for these two models and make the projections they need.

    Raises:
        ConfigError: the map does not fit the models.
    """
    pairs = map_layers(student, teacher, layer_map, stacks)
    projections = nn.ModuleDict()
    sizes = width(student), width(teacher)
    if sizes[0] != sizes[1]:
        dtype = torch.promote_types(next(student.parameters()).dtype, torch.float32)
        for stack in stacks:
            for pair in pairs[stack]:
                linear = nn.Linear(*sizes, bias=False, dtype=dtype)
                nn.init.orthogonal_(linear.weight)
                projections[_name(stack, *pair)] = linear
    return HiddenPairs(pairs, projections)


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
    path = Path(folder, SIDE_FILE)
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary)
    os.replace(temporary, path)


def load_projections(folder: str | Path, projections: nn.ModuleDict) -> None:
    """Read the side file of a checkpoint back.

    Raises:
        CheckpointError: there is none, or it belongs to other layers or widths.
    """
    path = Path(folder, SIDE_FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {SIDE_FILE}: it was not written by a run with this hidden loss. Resume with the losses "
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


def _name(stack: str, student_layer: int, teacher_layer: int) -> str:
    return f"{stack}_{student_layer}_{teacher_layer}"


def _keys(projections: nn.ModuleDict) -> set[str]:
    return {f"{ATTRIBUTE}.{key}" for key in projections.state_dict()}


def _ignored(student: Any) -> set[str]:
    return set(getattr(student, "_keys_to_ignore_on_save", None) or ())
