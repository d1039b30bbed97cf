"""Carry out a plan: slice the weights, renumber the layers, describe the result.

    anatomy = Anatomy.of(model)
    small = apply_plan(anatomy, PruningPlan(layers={"encoder": (0, 2)}, units={"encoder.0.neurons": (1, 3, 4)}))

Pruned means gone: the result is a new, smaller model. Whatever the stock config can say is written there, so that a
uniform result is a stock model; the rest goes into the `efficient` block.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...errors import ConfigError, shown, unknown_name
from ...models.anatomy import Anatomy
from ...models.block import EfficientBlock, StackBlock
from ...models.classes import stock_config, with_block
from ...models.cutting import cut_experts, cut_layers, cut_units, kept_heads, layer_fields
from ...models.families import FAMILIES
from ...models.family import FFN
from ...models.groups import groups_of
from ...models.rebuild import rebuild
from ...models.registry import EFFICIENT_PREFIX, is_known, remember
from ...models.stacks import ModelStack, model_stacks
from ..plan import PruningPlan

HEADS = ("heads", "cross_heads")  # both are counted by the one config field for heads

Layers = dict[str, tuple[int, ...]]  # stack -> the layers that stay
Sizes = dict[str, dict[str, tuple[int, ...]]]  # stack -> heads, kv_heads, cross_heads, neurons -> one for each layer


def apply_plan(anatomy: Anatomy, plan: PruningPlan) -> PreTrainedModel:
    """A smaller copy of the model: only what the plan keeps; ConfigError if a first layer goes that has to stay."""
    check_plan(anatomy, plan)
    # Units first: their groups are named by the layers of the dense model, which then get new numbers.
    state = cut_units(anatomy.model.state_dict(), anatomy.groups, plan.units)
    state = cut_experts(state, anatomy.mixtures, plan.units)
    for stack in anatomy.stacks:
        state = cut_layers(state, stack, kept_layers(stack, plan))
    small = rebuild(anatomy.model, planned_config(anatomy, plan), state)
    if not is_known(small.config) and not any(
        ffn.num_neurons for stack in anatomy.stacks for ffn in stack.ffns.values()
    ):
        remember(small.config, anatomy.family)  # another size of the same architecture need not be derived again
    return small


def planned_config(anatomy: Anatomy, plan: PruningPlan) -> PreTrainedConfig:
    """The config of the smaller model; the model may be on the meta device."""
    layers = {stack.name: kept_layers(stack, plan) for stack in anatomy.stacks}
    sizes = _sizes(anatomy, plan, layers)
    fields: dict[str, Any] = {}
    unsaid: Sizes = {}  # what the stock config has no field for
    for stack in anatomy.stacks:
        changes, unsaid[stack.name] = _stock_fields(stack, sizes)
        if changes and anatomy.family.model_type not in FAMILIES:  # the table is known, others are asked
            if _stock_takes(anatomy, stack, changes, sizes[stack.name]):  # a field may say other widths too
                unsaid[stack.name] = {k: counts for k, counts in sizes[stack.name].items() if len(set(counts)) > 1}
            else:
                changes, unsaid[stack.name] = {}, dict(sizes[stack.name])
        kept = layers[stack.name]
        changes |= layer_fields(stack, kept) | _expert_fields(anatomy, stack, plan)
        fields = stack.changed(fields, changes)
    return with_block(anatomy.config, _new_block(anatomy, layers, unsaid, plan), **fields)


def _expert_fields(anatomy: Anatomy, stack: ModelStack, plan: PruningPlan) -> dict[str, int]:
    """How many experts are left, and how many of them work for a token, if that changes."""
    named = [one for one in anatomy.mixtures if one.stack == stack.name and one.name in plan.units]
    return named[0].entry.fields(stack.sizes, len(plan.units[named[0].name])) if named else {}


def check_plan(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Compare a plan, which may have been edited, with the model it is for.

    Raises:
        ConfigError: another type of model, a stack or group that the model does not have, numbers that are out of
            range or not ascending, nothing kept, units of a layer that leaves, experts that no config can say, a first
            layer that has to stay, a stack that may not become the deeper one.
    """
    family = anatomy.family
    if plan.model is not None and plan.model.removeprefix(EFFICIENT_PREFIX) != family.model_type:
        raise ConfigError(
            f"The plan was made for a model of type {shown(plan.model)}, this one is {anatomy.config.model_type!r}. "
            "Make a plan of this model: plan(model, config, calibration)."
        )
    depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}
    groups = {group.name: group.units for group in anatomy.groups}
    groups |= {mixture.name: mixture.experts for mixture in anatomy.mixtures}
    for what, entries, known in (("layers", plan.layers, depths), ("units", plan.units, groups)):
        for name, kept in entries.items():
            if name not in known:
                raise unknown_name(f"entry of the plan's {what}", name, known)
            in_order = list(kept) == sorted(set(kept))
            if not kept or not in_order or kept[0] < 0 or kept[-1] >= known[name]:
                raise ConfigError(
                    f"The plan keeps {shown(list(kept))} of {name}; give at least one of the numbers from 0 to "
                    f"{known[name] - 1}, ascending, each once."
                )
    places = [(group.name, group.stack, group.layers) for group in anatomy.groups]
    places += [(mixture.name, mixture.stack, (mixture.layer,)) for mixture in anatomy.mixtures]
    for name, stack, layers in places:
        if name in plan.units and not set(layers) & set(plan.layers.get(stack, layers)):
            raise ConfigError(
                f"The plan names units of {name}, but its `layers` do not keep layer {layers[0]} of the {stack}. "
                f"Delete {name} from `units`, or keep the layer."
            )
    _check_experts(anatomy, plan)
    remaining = {name: len(plan.layers.get(name, range(depth))) for name, depth in depths.items()}
    if family.first_stays and not all(plan.layers.get(name, (0,))[0] == 0 for name in depths):
        raise ConfigError(
            f"The first layer of {family.model_type} models is built unlike the others and has to stay. Keep layer 0."
        )
    if plan.layers and family.deepest and any(count > remaining[family.deepest] for count in remaining.values()):
        raise ConfigError(
            f"The plan keeps {remaining} layers; no stack of a {family.model_type} model may be deeper than its "
            f"{family.deepest}, by which `generate` sizes the cache. Drop layers of the others too."
        )


def _check_experts(anatomy: Anatomy, plan: PruningPlan) -> None:
    """One config field says how many experts all layers have, and those of one router lie in groups of one size."""
    counts: dict[str, set[int]] = {}
    for mixture in anatomy.mixtures:
        if mixture.layer not in plan.layers.get(mixture.stack, (mixture.layer,)):
            continue
        kept = plan.units.get(mixture.name, range(mixture.experts))
        counts.setdefault(mixture.field, set()).add(len(kept))
        if len(counts[mixture.field]) > 1:
            raise ConfigError(
                f"The plan keeps {len(kept)} experts of {mixture.name} and other numbers elsewhere; the config of the "
                "model says one number for all layers. Keep as many everywhere."
            )
        if len(set(mixture.per_group(kept))) > 1 or len(kept) < mixture.fewest:
            raise ConfigError(
                f"The plan keeps {mixture.per_group(kept)} experts of the {mixture.groups} groups of {mixture.name}; "
                f"its router needs as many of each, and at least {mixture.fewest} together."
            )


def kept_layers(stack: ModelStack, plan: PruningPlan) -> tuple[int, ...]:
    """The layers of a stack that stay; all, where the plan does not name it."""
    return plan.layers.get(stack.name, tuple(range(len(stack.layers))))


def _sizes(anatomy: Anatomy, plan: PruningPlan, layers: Layers) -> Sizes:
    """How many units each kept layer has after the plan."""
    counts: dict[tuple[str, str, int], int] = {}
    for group in anatomy.groups:
        for layer in group.layers:
            counts[group.stack, group.kind, layer] = len(plan.units.get(group.name, range(group.units)))
    sizes: Sizes = {}
    for stack in anatomy.stacks:
        kinds = sorted({kind for name, kind, _ in counts if name == stack.name})
        own = {}
        for kind in kinds:  # a layer without such units is said to have as many as the largest, which changes nothing
            most = max(count for key, count in counts.items() if key[:2] == (stack.name, kind))
            own[kind] = tuple(counts.get((stack.name, kind, layer), most) for layer in layers[stack.name])
        if stack.group_size > 1 and "heads" in own:  # a unit of `heads` is a key/value head with its query heads
            own |= {"kv_heads": own["heads"], "heads": tuple(n * stack.group_size for n in own["heads"])}
        sizes[stack.name] = own
    return sizes


def _stock_fields(stack: ModelStack, sizes: Sizes) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Split the sizes of a stack into stock config fields and what only the block can say."""
    fields: dict[str, Any] = {}
    unsaid = dict(sizes[stack.name])
    for kind, ffn in stack.ffns.items():
        neurons = _neuron_counts(ffn, stack, sizes) if ffn.neurons else set(sizes[stack.name].get(kind, ()))
        if len(neurons) == 1 and (ffn.neurons or neurons == {stack.width_of(kind)}):
            unsaid.pop(kind, None)
            if ffn.neurons and neurons != {stack.width_of(kind)}:
                fields[ffn.neurons] = neurons.pop()
    heads = _counts(HEADS, "heads", stack, sizes)
    if len(heads) == 1 and _is_legal(count := heads.pop(), stack):
        if count != stack.num_heads:
            # Fewer heads do not fill the hidden size any more, so their width has to be said too.
            fields |= {stack.entry.heads: count, stack.entry.head_dim: stack.head_width}
            if stack.entry.kv_heads and not stack.entry.one_kv_head:
                fields[stack.entry.kv_heads] = count // stack.group_size
        for kind in (*HEADS, "kv_heads"):
            unsaid.pop(kind, None)
    return fields, unsaid


def _stock_takes(anatomy: Anatomy, stack: ModelStack, changes: dict[str, Any], sizes: dict[str, tuple]) -> bool:
    """Whether the stock class, built with these fields, has these sizes."""
    heads = sizes.get("heads", (0,))[0]
    try:
        config = stock_config(with_block(anatomy.config, EfficientBlock(), **stack.changed({}, changes)))
        with torch.device("meta"), no_init_weights():
            model = getattr(anatomy.model, "_stock_class", type(anatomy.model))(config)
        [new] = [one for one in model_stacks(model, anatomy.family) if one.name == stack.name]
        groups = groups_of(new)
        cut = {f"{member.prefix}.{part.name}" for one in groups for member in one.members for part in member.slices}
        whole = anatomy.model.state_dict()
        others = ((name, tensor) for name, tensor in model.state_dict().items() if name not in cut and name in whole)
        if any(tensor.shape != whole[name].shape for name, tensor in others):  # the field says other sizes too
            return False
        wanted = {kind: sizes[kind][0] for kind in sizes if kind in stack.ffns}
        return all(one.units == wanted.get(one.kind, heads // new.group_size) for one in groups)
    except Exception:  # whatever a config or a model may raise at sizes that it does not like
        return False


def _counts(kinds: tuple[str, ...], name: str, stack: ModelStack, sizes: Sizes) -> set[int]:
    """The sizes that have to be one number to be said by the config field `stack.<name>`: stacks may share it."""
    field = (stack.entry.config, getattr(stack.entry, name))
    sharing = [other for other in stack.family.stacks if (other.config, getattr(other, name)) == field]
    counts = [sizes[other.name].get(kind, ()) for other in sharing if other.name in sizes for kind in kinds]
    return {count for of_layers in counts for count in of_layers}


def _neuron_counts(ffn: FFN, stack: ModelStack, sizes: Sizes) -> set[int]:
    """The same of FFNs, of which several of one stack may share a field too."""
    field = (stack.entry.config, ffn.neurons)
    return {
        count
        for other in stack.family.stacks
        for kind, name in (("neurons", other.neurons), *((one.kind, one.neurons) for one in other.more_ffns))
        if other.name in sizes and (other.config, name) == field
        for count in sizes[other.name].get(kind, ())
    }


def _is_legal(heads: int, stack: ModelStack) -> bool:
    """Whether the stock class can be built with so many heads."""
    if heads == stack.num_heads:
        return True
    if stack.entry.attention.shared:  # of which the stock model would give a layer the part of other heads
        return False
    divides = stack.width % heads == 0 or not stack.family.heads_divide_hidden
    return stack.entry.head_dim is not None and divides


def _new_block(anatomy: Anatomy, layers: Layers, sizes: Sizes, plan: PruningPlan) -> EfficientBlock:
    """The old block for the kept layers, with `sizes`; kept layers are numbered as in the very first model."""
    old, stacks, original = anatomy.block, {}, {}
    for stack in anatomy.stacks:
        kept, entry = layers[stack.name], old.stack(stack.name)
        # What the stock config says anyway need not be said twice.
        stock = dict.fromkeys(HEADS, stack.num_heads) | {"kv_heads": stack.num_kv_heads}
        stock |= {kind: stack.width_of(kind) for kind in stack.ffns}
        own = {kind: values for kind, values in sizes[stack.name].items() if set(values) != {stock[kind]}}
        heads = kept_heads(stack, plan.units, entry.kept_heads)
        small = StackBlock(
            attention=tuple(entry.attention[i] for i in kept) if entry.attention else (),
            cross_attention=tuple(entry.cross_attention[i] for i in kept) if entry.cross_attention else (),
            sizes=own,
            kept_heads=tuple(heads[i] for i in kept) if heads and "heads" in own else (),
        )
        if own or small.is_converted():
            stacks[stack.name] = small
        before = old.kept_layers.get(stack.name, tuple(range(stack.depth)))
        if len(kept) < stack.depth or stack.name in old.kept_layers:
            original[stack.name] = tuple(before[i] for i in kept)
    family = anatomy.family
    if family.model_type not in FAMILIES:
        gone = {stack.name for stack in anatomy.stacks if len(layers[stack.name]) < stack.depth}
        left = tuple(one.with_layers(layers[one.name]) if one.name in gone else one for one in family.stacks)
        old = replace(old, family=replace(family, stacks=left))
    return replace(old, stacks=stacks, kept_layers=original)
