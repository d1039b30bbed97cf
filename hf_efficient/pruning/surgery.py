"""Carry out a plan: slice the weights, renumber the layers, describe the result.

Pruned means gone: the result is a new, smaller model. Whatever the stock config can say is written there, so that a
uniform result is a stock model; the rest goes into the `efficient` block.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..families import Family, family_of, find_stacks, layers_prefix
from ..models.block import EfficientBlock, StackBlock
from ..models.building import rebuild
from ..models.configs import block_of, with_block
from .groups import expand, find_groups
from .plan import PruningPlan

Sizes = dict[str, dict[str, tuple[int, ...]]]  # stack -> heads, kv_heads, cross_heads, neurons -> one for each layer


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A smaller copy of `model`: only what the plan keeps."""
    family = family_of(model.config)
    state = slice_units(model.state_dict(), plan)
    layers = {stack.name: _kept(stack.name, modules, plan) for stack, modules in find_stacks(model, family)}
    for stack, modules in find_stacks(model, family):
        state = _renumber(state, layers_prefix(model, modules), layers[stack.name], family)
    sizes = _sizes(model, plan, layers)
    fields, sizes = _stock_fields(sizes, family, model)
    fields |= {stack.num_layers: len(layers[stack.name]) for stack in family.stacks if stack.name in layers}
    block = _new_block(block_of(model.config), layers, sizes, family, fields, model)
    return rebuild(model, with_block(model.config, block, **fields), state)


def slice_units(state: dict[str, torch.Tensor], plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The state dict with only the rows and columns of the kept units."""
    state = dict(state)
    for group, kept in plan.units.items():
        units = torch.tensor(kept)
        for member in group.members:
            for path, width in member.inputs:
                for name in ("weight", "bias"):
                    _select(state, f"{member.prefix}.{path}.{name}", 0, units, width)
            path, width = member.output
            _select(state, f"{member.prefix}.{path}.weight", 1, units, width)
            for path, width in member.tables:
                _select(state, f"{member.prefix}.{path}.weight", 1, units, width)
            for path, width in member.learned:
                _select(state, f"{member.prefix}.{path}", 0, units, width)
    return state


def _select(state: dict[str, torch.Tensor], key: str, dim: int, units: torch.Tensor, width: int) -> None:
    if key in state:
        state[key] = state[key].index_select(dim, expand(units, width).to(state[key].device))


def _kept(stack: str, modules, plan: PruningPlan) -> tuple[int, ...]:
    return plan.layers.get(stack, tuple(range(len(modules))))


def _renumber(
    state: dict[str, torch.Tensor], prefix: str, kept: tuple[int, ...], family: Family
) -> dict[str, torch.Tensor]:
    """Drop the layers that are not kept and close the gaps. A shared relative bias always stays in layer 0."""
    new = {old: index for index, old in enumerate(kept)}
    result = {}
    for key, value in state.items():
        if not key.startswith(f"{prefix}."):
            result[key] = value
            continue
        number, rest = key[len(prefix) + 1 :].split(".", 1)
        if family.relative_bias and rest.startswith(f"{family.relative_bias}."):
            result[key] = value
        elif int(number) in new:
            result[f"{prefix}.{new[int(number)]}.{rest}"] = value
    return result


def _sizes(model: PreTrainedModel, plan: PruningPlan, layers: dict[str, tuple[int, ...]]) -> Sizes:
    """How many units each kept layer has after the plan."""
    group_size = family_of(model.config).group_size(model.config)
    counts: dict[tuple[str, str, int], int] = {}
    for group in find_groups(model):
        for layer in group.layers:
            counts[group.stack, group.kind, layer] = len(plan.units.get(group, range(group.units)))
    sizes: Sizes = {}
    for stack, kept in layers.items():
        kinds = sorted({kind for name, kind, _ in counts if name == stack})
        own = {kind: tuple(counts[stack, kind, layer] for layer in kept) for kind in kinds}
        if group_size > 1:
            own |= {"kv_heads": own["heads"], "heads": tuple(n * group_size for n in own["heads"])}
        sizes[stack] = own
    return sizes


def _stock_fields(sizes: Sizes, family: Family, model: PreTrainedModel) -> tuple[dict[str, Any], Sizes]:
    """Split the sizes into stock config fields and what only the block can say."""
    config, fields = model.config, {}
    neurons = {n for own in sizes.values() for n in own["neurons"]}
    if len(neurons) == 1:
        fields[family.neurons] = neurons.pop()
    heads = {n for own in sizes.values() for kind in ("heads", "cross_heads") for n in own.get(kind, ())}
    if len(heads) == 1 and _is_legal(count := heads.pop(), family, config):
        if count != family.num_heads(config):
            fields |= {family.heads: count, family.head_dim: family.head_width(config)}
            if family.kv_heads:
                fields[family.kv_heads] = count // family.group_size(config)
        heads_said = True
    else:
        heads_said = False
    said = set() if not heads_said else {"heads", "kv_heads", "cross_heads"}
    said |= {"neurons"} if family.neurons in fields else set()
    left = {stack: {kind: n for kind, n in own.items() if kind not in said} for stack, own in sizes.items()}
    return fields, left


def _is_legal(heads: int, family: Family, config) -> bool:
    if heads == family.num_heads(config):
        return True
    divides = getattr(config, family.hidden) % heads == 0 or not family.heads_divide_hidden
    return family.head_dim is not None and divides


def _new_block(
    old: EfficientBlock, layers: dict[str, tuple[int, ...]], sizes: Sizes, family: Family, fields: dict, model
) -> EfficientBlock:
    stacks, kept_layers = {}, {}
    for stack in family.stacks:
        if stack.name not in layers:
            continue
        kept, entry = layers[stack.name], old.stack(stack.name)
        attention = tuple(entry.attention[i] for i in kept) if entry.attention else ()
        cross_attention = tuple(entry.cross_attention[i] for i in kept) if entry.cross_attention else ()
        own = {
            kind: values
            for kind, values in sizes[stack.name].items()
            if not _as_stock(kind, values, family, fields, model)
        }
        small = StackBlock(attention=attention, cross_attention=cross_attention, sizes=own)
        if own or small.is_converted():
            stacks[stack.name] = small
        count = getattr(model.config, stack.num_layers)
        before = old.kept_layers.get(stack.name, tuple(range(count)))
        if len(kept) < count or stack.name in old.kept_layers:
            kept_layers[stack.name] = tuple(before[i] for i in kept)
    return replace(old, stacks=stacks, kept_layers=kept_layers)


def _as_stock(kind: str, values: tuple[int, ...], family: Family, fields: dict, model) -> bool:
    """True if these sizes are what the stock config says anyway."""
    config = model.config
    stock = {
        "heads": fields.get(family.heads, family.num_heads(config)),
        "cross_heads": fields.get(family.heads, family.num_heads(config)),
        "kv_heads": family.num_kv_heads(config),
        "neurons": fields.get(family.neurons, getattr(config, family.neurons)),
    }
    return all(value == stock[kind] for value in values)
