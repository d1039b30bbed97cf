"""What can be removed: groups of units, found through the table of families, never by tracing.

A *unit* is one head (under grouped-query attention: one key/value head with its query heads) or one FFN neuron.
Removing it removes rows of the linears that make it and columns of the linear that reads it. A *group* is the units of
one attention module or one FFN. Where a position bias is shared by all layers of a stack (T5, which also hands a bias
of zeros from cross attention to cross attention), the heads of all layers form one group: they only leave together.

    for group in find_groups(model):
        print(group.stack, group.kind, group.layers, group.units)
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.dispatch import ATTACHED, variant_of
from ..errors import UnsupportedModelError
from ..families import FAMILIES, Attention, Family, Stack, family_of, find_stacks, layers_prefix

Slices = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Member:
    """One module of a group: parameter paths relative to `prefix`, each with how many rows or columns a unit has.

    `inputs` are linears whose rows (outputs) belong to the unit, `output` is the linear whose columns (inputs) do,
    `tables` are embeddings with columns of the unit, `learned` parameters of an attention variant with rows of it.
    """

    prefix: str
    inputs: Slices
    output: tuple[str, int]
    tables: Slices = ()
    learned: Slices = ()


@dataclass(frozen=True)
class Group:
    """Units that are scored and removed alike. `kind` is `heads`, `cross_heads` or `neurons`."""

    stack: str
    kind: str
    layers: tuple[int, ...]
    units: int
    members: tuple[Member, ...]


def check_prunable(model: PreTrainedModel) -> Family:
    """The family of a model whose heads and neurons can be told apart.

    Raises:
        UnsupportedModelError: this family cannot be pruned yet.
    """
    family = family_of(model.config)
    if family.not_prunable:
        raise UnsupportedModelError(
            f"{family.model_type} models cannot be pruned yet: {family.not_prunable}. `build_student` drops whole "
            "layers of them; families that can be pruned: "
            f"{', '.join(name for name, other in sorted(FAMILIES.items()) if not other.not_prunable)}."
        )
    return family


def find_groups(model: PreTrainedModel) -> list[Group]:
    """All groups of a model, stack by stack and layer by layer.

    Raises:
        UnsupportedModelError: this family cannot be pruned yet.
    """
    family = check_prunable(model)
    groups: list[Group] = []
    for stack, layers in find_stacks(model, family):
        prefix = layers_prefix(model, layers)
        found = [
            group for i, layer in enumerate(layers) for group in _layer_groups(i, layer, stack, family, prefix, model)
        ]
        if family.relative_bias:
            for kind in stack.attentions(model.config):
                found = _couple(found, kind)
        groups += found
    return groups


def _layer_groups(
    index: int, layer: nn.Module, stack: Stack, family: Family, prefix: str, model: PreTrainedModel
) -> list[Group]:
    config, place = model.config, f"{prefix}.{index}"
    group_size, width = stack.group_size(config), stack.head_width(config)
    groups = []
    for kind, attention in stack.attentions(config).items():
        units = layer.get_submodule(attention.key).out_features // width
        tables = (
            ((family.relative_bias, group_size),) if family.relative_bias and kind == "heads" and index == 0 else ()
        )
        learned = _learned(attention.module, layer, units, group_size)
        member = _attention_member(place, attention, group_size, width, tables, learned)
        groups.append(Group(stack.name, kind, (index,), units, (member,)))
    ups = tuple((up, 1) for up in family.up(stack, config))
    down = family.down(stack, config)
    neurons = layer.get_submodule(down).in_features
    groups.append(Group(stack.name, "neurons", (index,), neurons, (Member(place, ups, (down, 1)),)))
    return groups


def _learned(path: str, layer: nn.Module, units: int, group_size: int) -> Slices:
    """The learned parts of a variant: one row for each key/value head, or for each query head."""
    variant = variant_of(layer.get_submodule(path))
    if variant is None:
        return ()
    rows = {f"{path}.{ATTACHED}.{name}": len(parameter) for name, parameter in variant.named_parameters()}
    assert set(rows.values()) <= {units, units * group_size}, rows
    return tuple((name, count // units) for name, count in rows.items())


def _attention_member(
    place: str, attention: Attention, group_size: int, width: int, tables: Slices, learned: Slices
) -> Member:
    wide = group_size * width
    inputs = ((attention.query, wide), (attention.key, width), (attention.value, width))
    return Member(place, inputs, (attention.output, wide), tables, learned)


def _couple(groups: list[Group], kind: str) -> list[Group]:
    """Join all groups of one kind into one."""
    together = [group for group in groups if group.kind == kind]
    joined = Group(
        stack=together[0].stack,
        kind=kind,
        layers=tuple(layer for group in together for layer in group.layers),
        units=together[0].units,
        members=tuple(member for group in together for member in group.members),
    )
    return [joined] + [group for group in groups if group.kind != kind]


def output_weight(model: PreTrainedModel, member: Member) -> nn.Parameter:
    """The weight `[out, units x width]` whose columns read the units of a member."""
    return model.get_submodule(f"{member.prefix}.{member.output[0]}").weight


def unit_parameters(model: PreTrainedModel, member: Member) -> list[tuple[nn.Parameter, int, int]]:
    """Every parameter that a unit owns a part of, as (parameter, dimension of the units, length of one unit)."""
    found = []
    for path, width in member.inputs:
        linear = model.get_submodule(f"{member.prefix}.{path}")
        found.append((linear.weight, 0, width))
        if linear.bias is not None:
            found.append((linear.bias, 0, width))
    path, width = member.output
    found.append((model.get_submodule(f"{member.prefix}.{path}").weight, 1, width))
    for path, width in member.tables:
        found.append((model.get_submodule(f"{member.prefix}.{path}").weight, 1, width))
    for path, width in member.learned:
        found.append((model.get_parameter(f"{member.prefix}.{path}"), 0, width))
    return found


def expand(units: torch.Tensor, width: int) -> torch.Tensor:
    """Unit numbers to row or column numbers: unit 2 of width 3 is 6, 7, 8."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def unit_cost(model: PreTrainedModel, group: Group, metric: str, length: int) -> int:
    """What one unit of the group costs: parameters, or multiply-accumulates on one sequence of `length` tokens.

    A linear costs rows x columns for each token. A head of width D under full attention costs 2 length D more for each
    token (scores and weighted sum), with fewer keys under local attention, and 2 D (D + 1) under linear attention
    (Kwon 2022, section 4.1).
    """
    if metric == "parameters":
        return sum(p.numel() // group.units for member in group.members for p, _, _ in unit_parameters(model, member))
    total = 0
    for member in group.members:
        linears = [path for path, _ in (*member.inputs, member.output)]
        weights = [model.get_submodule(f"{member.prefix}.{path}").weight for path in linears]
        total += length * sum(weight.numel() // group.units for weight in weights)
        if group.kind != "neurons":
            total += length * _attention_macs(model, member, group, length)
    return total


def _attention_macs(model: PreTrainedModel, member: Member, group: Group, length: int) -> int:
    """Multiply-accumulates of scores and weighted sum, for one token and one unit."""
    stack = next(stack for stack in family_of(model.config).stacks if stack.name == group.stack)
    module = model.get_submodule(f"{member.prefix}.{stack.attentions(model.config)[group.kind].module}")
    variant, width = variant_of(module), stack.head_width(model.config)
    macs = 2 * length * width if variant is None else variant.macs(length, module.is_causal)
    return macs * stack.group_size(model.config)


def layer_costs(model: PreTrainedModel, groups: list[Group], metric: str, length: int) -> dict[tuple[str, int], int]:
    """What each whole layer costs: all its parameters, or the MACs of all its units."""
    if metric == "parameters":
        return {
            (stack.name, index): sum(p.numel() for p in layer.parameters())
            for stack, layers in find_stacks(model)
            for index, layer in enumerate(layers)
        }
    costs: dict[tuple[str, int], int] = {}
    for group in groups:
        for layer in group.layers:
            key = (group.stack, layer)
            share = group.units * unit_cost(model, group, metric, length) // len(group.layers)
            costs[key] = costs.get(key, 0) + share
    return costs


def total_cost(model: PreTrainedModel, metric: str, length: int) -> int:
    """The cost of all layers: what `ratio` is a fraction of."""
    return sum(layer_costs(model, find_groups(model), metric, length).values())
