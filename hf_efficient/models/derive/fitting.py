"""An entry that was found on a tiny model, put on the real one: are all its layers built like those of the tiny model?

family = fitted(family, model)            # the model may be on the meta device
"""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..family import CONVERT, EXPERTS, FFN, HEADS, NEURONS, Attention, Family, Stack
from ..groups import inside
from ..linears import holds, input_dim, num_inputs, num_outputs, output_dim
from ..stacks import ModelStack, model_stacks, said
from .experts import is_whole
from .fields import width_said

OTHERWISE = "some of its layers are built otherwise"


def fitted(family: Family, model: PreTrainedModel) -> Family:
    """The entry without what does not hold for every layer, and with the FFN widths that no config field says."""
    for stack in model_stacks(model, family):
        counted = _counted(stack)
        family = replace(family, stacks=tuple(counted if one is stack.entry else one for one in family.stacks))
    for stack in model_stacks(model, family):
        family = replace(family, stacks=tuple(_measured(one, stack) for one in family.stacks))
    for stack in model_stacks(model, family):
        modules = [attention.module for attention in stack.attentions.values()]
        if not stack.attending or not all(holds(stack.layers[i], path) for i in stack.attending for path in modules):
            family = family.without(CONVERT, OTHERWISE, stack.name).without(HEADS, OTHERWISE, stack.name)
        elif stack.entry.attention.query and not all(_has_heads(stack, index) for index in stack.attending):
            family = family.without(HEADS, OTHERWISE, stack.name)
        indices = range(len(stack.layers))
        if any(not _has_neurons(stack.layers[i], stack, kind) for i in indices for kind in stack.ffns_in(i)):
            family = family.without(NEURONS, OTHERWISE, stack.name)
        experts = stack.entry.experts
        if experts and not all(is_whole(one, experts, said(stack.sizes, experts.count)) for one in stack.layers):
            family = family.without(EXPERTS, OTHERWISE, stack.name)
    return family


def _measured(entry: Stack, stack: ModelStack) -> Stack:
    """The entry with the layers that have its attention, and with the width of a head that no field says."""
    if entry is not stack.entry:
        return entry
    attention, layers = entry.attention, stack.layers
    here = [i for i, layer in enumerate(layers) if holds(layer, attention.module) and _is_of(layer, attention)]
    entry = replace(entry, attending=tuple(here) if len(here) < len(layers) else None)
    if here and attention.value_size:
        reader = layers[here[0]].get_submodule(attention.output)
        attention = replace(attention, value_size=num_inputs(reader) // stack.num_heads)
        entry = replace(entry, attention=attention)
    if here and attention.measure:
        queries = layers[here[0]].get_submodule(attention.measure)
        entry = replace(entry, head_size=num_outputs(queries) // stack.num_heads)
    elif here and entry.head_size and not attention.output:
        entry = entry.without(CONVERT, "neither a config field nor a linear says how wide a head is")
    elif here and entry.head_size:
        reader = layers[here[0]].get_submodule(attention.output)
        entry = replace(entry, head_size=num_inputs(reader) // stack.num_heads)
    return entry


def _is_of(layer: nn.Module, attention: Attention) -> bool:
    return attention.class_name in ("", type(layer.get_submodule(attention.module)).__name__)


def _counted(stack: ModelStack) -> Stack:
    """The entry, whose FFNs have the fields with the widths that these layers have, or these widths themselves."""
    entry = stack.entry
    widths: dict[str, int] = {}
    for index, layer in enumerate(stack.layers):
        for kind, ffn in stack.ffns_in(index).items():
            widths.setdefault(kind, _width(layer, ffn))
    said: dict[str, FFN] = {}
    for kind, width in widths.items():
        ffn = stack.ffns[kind]
        is_right = ffn.neurons is not None and getattr(stack.sizes, ffn.neurons) == width
        unsaid = replace(ffn, neurons=None, num_neurons=width)
        said[kind] = ffn if is_right or entry.count_neurons else width_said(unsaid, stack.sizes)
    if "neurons" in said:
        entry = replace(entry, neurons=said["neurons"].neurons, num_neurons=said["neurons"].num_neurons)
    return replace(entry, more_ffns=tuple(said.get(ffn.kind, ffn) for ffn in entry.more_ffns))


def _width(layer: nn.Module, ffn: FFN) -> int:
    if ffn.has_experts:
        return layer.get_parameter(ffn.down).shape[ffn.down_dim]
    return num_inputs(layer.get_submodule(ffn.down))


def _has_heads(stack: ModelStack, index: int) -> bool:
    """Every projection is as wide as its heads, if the layer has this attention."""
    layer = stack.layers[index]
    heads, kv_heads = stack.num_heads * stack.head_width, stack.num_kv_heads * stack.head_width
    for attention in stack.attentions_in(index).values():
        module = layer.get_submodule(attention.module)
        numbers = dict.fromkeys(attention.head_attributes, stack.num_heads)
        numbers |= dict.fromkeys(attention.kv_attributes, stack.num_kv_heads)
        numbers |= dict.fromkeys(attention.width_attributes, heads)
        numbers |= dict.fromkeys(attention.kv_width_attributes, kv_heads)
        if any(getattr(module, name, None) != number for name, number in numbers.items()):
            return False  # in the tiny model it had this value by chance
        parts = [(inside(attention.module, name), dim) for name, dim in attention.head_parts.items()]
        held = [(layer.get_parameter(path).shape, dim) for path, dim in parts if holds(layer, path)]
        if not all(dim < len(shape) and shape[dim] in (stack.num_heads, heads) for shape, dim in held):
            return False
        outputs: dict[str, int] = {}
        for path, width in ((attention.query, heads), (attention.key, kv_heads), (attention.value, kv_heads)):
            outputs[path] = outputs.get(path, 0) + width
        outputs = {path: width for path, width in outputs.items() if path not in attention.wide}
        if not all(_is_wide(layer, path, width, is_output=True) for path, width in outputs.items()):
            return False
        if any(num_outputs(layer.get_submodule(path)) % stack.num_heads for path in attention.wide):
            return False
        read = stack.num_heads * (attention.value_size or stack.head_width)
        if not _is_wide(layer, attention.output, read, is_output=False):
            return False
    return True


def _has_neurons(layer: nn.Module, stack: ModelStack, kind: str) -> bool:
    ffn, count = stack.ffns[kind], stack.width_of(kind)
    if ffn.has_experts:
        ups = ((up, ffn.up_dim, count * ffn.up.count(up)) for up in ffn.up)
        wanted = (*ups, (ffn.down, ffn.down_dim, count))
        return all(holds(layer, p) and layer.get_parameter(p).shape[dim] == size for p, dim, size in wanted)
    ups = all(_is_wide(layer, path, count * ffn.up.count(path), is_output=True) for path in ffn.up)
    return ups and _is_wide(layer, ffn.down, count, is_output=False)


def _is_wide(layer: nn.Module, path: str, width: int, is_output: bool) -> bool:
    if not holds(layer, path):
        return False
    linear = layer.get_submodule(path)
    weight = getattr(linear, "weight", None)
    return weight is not None and weight.shape[(output_dim if is_output else input_dim)(linear)] == width
