"""Carry out a plan: slice the weights, renumber the layers, describe the result.

Pruned means gone: the result is a new, smaller model. Whatever the stock config can say is written there, so that a
uniform result is a stock model; the rest goes into the `efficient` block.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import ConfigError, shown, unknown_name
from ...models.block import EfficientBlock, StackBlock
from ...models.classes import block_of, with_block
from ...models.families import EFFICIENT_PREFIX, Family, Stack, family_of, find_stacks, layers_prefix
from ...models.rebuild import rebuild
from ..plan import PruningPlan
from .groups import find_groups

Sizes = dict[str, dict[str, tuple[int, ...]]]  # stack -> heads, kv_heads, cross_heads, neurons -> one for each layer


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A smaller copy of `model`: only what the plan keeps.

    Raises:
        ConfigError: the plan lets a first layer go that has to stay.
    """
    check_plan(model, plan)
    family = family_of(model.config)
    state = _slice_units(model, plan)
    for stack, modules in find_stacks(model, family):
        state = _renumber(state, layers_prefix(model, modules), _kept(stack.name, modules, plan), family)
    return rebuild(model, planned_config(model, plan), state)


def planned_config(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedConfig:
    """The config of the smaller model; `model` may be on the meta device."""
    family = family_of(model.config)
    layers = {stack.name: _kept(stack.name, modules, plan) for stack, modules in find_stacks(model, family)}
    sizes = _sizes(model, plan, layers)
    fields: dict[str, Any] = {}
    left: Sizes = {}
    for stack in (stack for stack in family.stacks if stack.name in layers):
        own, left[stack.name] = _stock_fields(stack, sizes, family, model.config)
        own |= _depth_fields(stack, family, layers[stack.name], model.config)
        fields |= {stack.config: stack.own_config(model.config).to_dict() | own} if stack.config else own
    block = _new_block(block_of(model.config), layers, left, family, model)
    return with_block(model.config, block, **fields)


def check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Compare a plan, which may have been edited, with the model it is for.

    Raises:
        ConfigError: another type of model, a stack or group that the model does not have, numbers that are out of
            range or not ascending, nothing kept, units of a layer that leaves, a first layer that has to stay, a stack
            that may not become the deeper one.
    """
    family = family_of(model.config)
    if plan.model is not None and plan.model.removeprefix(EFFICIENT_PREFIX) != family.model_type:
        raise ConfigError(
            f"The plan was made for a model of type {shown(plan.model)}, this one is {model.config.model_type!r}. "
            "Make a plan of this model: plan(model, config, calibration)."
        )
    depths = {stack.name: len(layers) for stack, layers in find_stacks(model, family)}
    found = find_groups(model)
    groups = {group.name: group.units for group in found}
    for what, given, known in (("layers", plan.layers, depths), ("units", plan.units, groups)):
        for name, kept in given.items():
            if name not in known:
                raise unknown_name(f"entry of the plan's {what}", name, known)
            in_order = list(kept) == sorted(set(kept))
            if not kept or not in_order or kept[0] < 0 or kept[-1] >= known[name]:
                raise ConfigError(
                    f"The plan keeps {shown(list(kept))} of {name}; give at least one of the numbers from 0 to "
                    f"{known[name] - 1}, ascending, each once."
                )
    for group in found:
        if group.name in plan.units and not set(group.layers) & set(plan.layers.get(group.stack, group.layers)):
            raise ConfigError(
                f"The plan names units of {group.name}, but its `layers` do not keep layer {group.layers[0]} of the "
                f"{group.stack}. Delete {group.name} from `units`, or keep the layer."
            )
    left = {name: len(plan.layers.get(name, range(depth))) for name, depth in depths.items()}
    if family.first_stays and not all(plan.layers.get(name, (0,))[0] == 0 for name in depths):
        raise ConfigError(
            f"The first layer of {family.model_type} models is built unlike the others and has to stay. Keep layer 0."
        )
    if plan.layers and family.deepest and any(count > left[family.deepest] for count in left.values()):
        raise ConfigError(
            f"The plan keeps {left} layers; no stack of a {family.model_type} model may be deeper than its "
            f"{family.deepest}, by which `generate` sizes the cache. Drop layers of the others too."
        )


def _slice_units(model: PreTrainedModel, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The state dict with only the rows and columns of the kept units."""
    state = dict(model.state_dict())
    for group in find_groups(model):
        if group.name in plan.units:
            units = torch.tensor(plan.units[group.name])
            for member in group.members:
                for part in member.slices:
                    name = f"{member.prefix}.{part.name}"
                    state[name] = state[name].index_select(part.dim, part.rows(units, state[name]))
    return state


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
    family = family_of(model.config)
    group_sizes = {stack.name: stack.group_size(model.config) for stack in family.stacks}
    counts: dict[tuple[str, str, int], int] = {}
    for group in find_groups(model):
        for layer in group.layers:
            counts[group.stack, group.kind, layer] = len(plan.units.get(group.name, range(group.units)))
    sizes: Sizes = {}
    for stack, kept in layers.items():
        kinds = sorted({kind for name, kind, _ in counts if name == stack})
        own = {kind: tuple(counts[stack, kind, layer] for layer in kept) for kind in kinds}
        if group_sizes[stack] > 1:
            own |= {"kv_heads": own["heads"], "heads": tuple(n * group_sizes[stack] for n in own["heads"])}
        sizes[stack] = own
    return sizes


def _depth_fields(stack: Stack, family: Family, kept: tuple[int, ...], config: PreTrainedConfig) -> dict[str, Any]:
    """The config fields that say how many layers a stack has, and those with an entry for each."""
    own = stack.own_config(config)
    fields: dict[str, Any] = {stack.num_layers: len(kept)} | dict.fromkeys(family.of_depth)
    return fields | {name: [getattr(own, name)[layer] for layer in kept] for name in family.per_layer}


def _stock_fields(
    stack: Stack, sizes: Sizes, family: Family, config: PreTrainedConfig
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Split the sizes of a stack into stock config fields and what only the block can say."""
    fields: dict[str, Any] = {}
    left = dict(sizes[stack.name])
    neurons = _counts(("neurons",), "neurons", stack, sizes, family)
    if len(neurons) == 1 and (stack.neurons or neurons == {stack.num_neurons(config)}):
        del left["neurons"]
        if stack.neurons and neurons != {stack.num_neurons(config)}:
            fields[stack.neurons] = neurons.pop()
    heads = _counts(_HEADS, "heads", stack, sizes, family)
    if len(heads) == 1 and _is_legal(count := heads.pop(), stack, family, config):
        if count != stack.num_heads(config):
            fields |= {stack.heads: count, stack.head_dim: stack.head_width(config)}
            if stack.kv_heads:
                fields[stack.kv_heads] = count // stack.group_size(config)
        for kind in (*_HEADS, "kv_heads"):
            left.pop(kind, None)
    return fields, left


_HEADS = ("heads", "cross_heads")


def _counts(kinds: tuple[str, ...], name: str, stack: Stack, sizes: Sizes, family: Family) -> set[int]:
    """The sizes that have to be one number to be said by the config field `stack.<name>`: stacks may share it."""
    field = (stack.config, getattr(stack, name))
    sharing = [other for other in family.stacks if (other.config, getattr(other, name)) == field]
    own = [sizes[other.name].get(kind, ()) for other in sharing if other.name in sizes for kind in kinds]
    return {count for counts in own for count in counts}


def _is_legal(heads: int, stack: Stack, family: Family, config: PreTrainedConfig) -> bool:
    if heads == stack.num_heads(config):
        return True
    divides = stack.width(config) % heads == 0 or not family.heads_divide_hidden
    return stack.head_dim is not None and divides


def _new_block(
    old: EfficientBlock, layers: dict[str, tuple[int, ...]], sizes: Sizes, family: Family, model: PreTrainedModel
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
            if not _as_stock(kind, values, stack, model.config)
        }
        small = StackBlock(attention=attention, cross_attention=cross_attention, sizes=own)
        if own or small.is_converted():
            stacks[stack.name] = small
        count = stack.depth(model.config)
        before = old.kept_layers.get(stack.name, tuple(range(count)))
        if len(kept) < count or stack.name in old.kept_layers:
            kept_layers[stack.name] = tuple(before[i] for i in kept)
    return replace(old, stacks=stacks, kept_layers=kept_layers)


def _as_stock(kind: str, values: tuple[int, ...], stack: Stack, config: PreTrainedConfig) -> bool:
    """True if these sizes are what the stock config says anyway."""
    stock = dict.fromkeys(_HEADS, stack.num_heads(config))
    stock |= {"kv_heads": stack.num_kv_heads(config), "neurons": stack.num_neurons(config)}
    return all(value == stock[kind] for value in values)
