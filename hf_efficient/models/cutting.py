"""The weights of a smaller model: units, experts and layers cut out of a state dict.

state = cut_units(model.state_dict(), anatomy.groups, {"encoder.0.neurons": (1, 3, 4)})
state = cut_experts(state, anatomy.mixtures, {"decoder.0.experts": (0, 2)})
state = cut_layers(state, stack, kept=(0, 2))
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import Group, expand
from .mixtures import Mixture
from .stacks import ModelStack


def cut_units(
    state: Mapping[str, Tensor], groups: Iterable[Group], kept: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Only the units that are kept, of the groups that are named."""
    small = dict(state)
    for group in groups:
        if group.name in kept:
            units = torch.tensor(kept[group.name])
            for member in group.members:
                for part in member.slices:
                    name = f"{member.prefix}.{part.name}"
                    # along part.dim: blocks of units x width, of which units become fewer
                    small[name] = small[name].index_select(part.dim, part.kept_rows(units, small[name]))
    return small


def cut_experts(
    state: Mapping[str, Tensor], mixtures: Iterable[Mixture], kept: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Only the experts that are kept, of the mixtures that are named; those in a list move up."""
    small = dict(state)
    for mixture in mixtures:
        if mixture.name not in kept:
            continue
        experts = torch.tensor(kept[mixture.name])
        for path, dim in mixture.entry.dims.items():
            name = mixture.path(path)
            if name in small:
                small[name] = small[name].index_select(dim, experts.to(small[name].device))
        if mixture.names:
            small = _cut_list(small, mixture, kept[mixture.name])
    return small


def _cut_list(state: Mapping[str, Tensor], mixture: Mixture, kept: Sequence[int]) -> dict[str, Tensor]:
    start = f"{mixture.path(mixture.entry.module)}."
    new_names = {mixture.names[old]: mixture.names[new] for new, old in enumerate(kept)}
    small: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, rest = key.removeprefix(start).partition(".")
        if not key.startswith(start) or name not in mixture.names:
            small[key] = value
        elif name in new_names:
            small[f"{start}{new_names[name]}.{rest}"] = value
    return small


def cut_layers(state: Mapping[str, Tensor], stack: ModelStack, kept: Sequence[int]) -> dict[str, Tensor]:
    """Without the layers of a stack that are not kept, and with the gaps closed, if they are to be."""
    moves = stack.entry.gaps is None
    new_index = {stack.place(old): index if moves else stack.place(old) for index, old in enumerate(kept)}
    bias, small = stack.family.relative_bias, {}
    for key, value in state.items():
        if not key.startswith(f"{stack.prefix}."):
            small[key] = value
            continue
        number, rest = key[len(stack.prefix) + 1 :].split(".", 1)
        if bias and rest.startswith(f"{bias}."):
            small[key] = value  # T5 keeps the one table of all layers in layer 0, whichever layer that is now
        elif int(number) in new_index:
            small[f"{stack.prefix}.{new_index[int(number)]}.{rest}"] = value
    return small


def layer_fields(stack: ModelStack, kept: Sequence[int]) -> dict[str, Any]:
    """The config fields that say of a stack that it has these layers alone; none where the others leave gaps, or where
    all are kept."""
    if stack.entry.gaps is not None or len(kept) == stack.depth:
        return {}
    of_depth = dict.fromkeys(stack.family.of_depth)
    return {stack.entry.num_layers: len(kept)} | of_depth | stack.per_layer(kept)


def kept_heads(
    stack: ModelStack, kept: Mapping[str, Sequence[int]], before: Sequence[tuple[int, ...]] = ()
) -> tuple[tuple[int, ...], ...]:
    """The query heads of the very first model that are left in each layer, where heads share what the model makes for
    all of them; () where they do not.

    Parameters:
        kept: the units that are kept, by the names of groups; all of those that are not named.
        before: the same of the model that is cut, if it was cut before.
    """
    if not stack.entry.attention.shared:
        return ()
    heads = []
    for index, old in enumerate(before or [tuple(range(stack.num_heads))] * stack.depth):
        units = kept.get(f"{stack.name}.{index}.heads", range(len(old) // stack.group_size))
        heads.append(tuple(old[row] for row in expand(torch.tensor(units), stack.group_size).tolist()))
    return tuple(heads)
