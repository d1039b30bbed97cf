"""Give a freshly built stock network the shapes and the attention that its `efficient` block describes.

apply_block(model, EfficientBlock.from_dict(config.efficient))    # in the __init__ of every efficient class
"""

import copy
from collections import Counter
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..attention.config import AttentionConfig
from ..attention.dispatch import attach
from ..attention.registry import ATTENTIONS
from ..attention.relative_bias import use_toeplitz_bias
from ..attention.variant import BIASED, CAUSAL, HeadShape
from ..attention.watched import route
from ..errors import ConfigError, UnsupportedModelError
from .block import EfficientBlock, StackBlock
from .family import CONVERT, FFN, Attention
from .gaps import leave_gaps
from .kept_heads import keep_heads
from .linears import holds, narrow_parameter, num_inputs, num_outputs, resize_linear
from .merging import merge_layers
from .registry import family_of
from .stacks import ConfigStack, ModelStack, model_stacks

MERGING = "merging"
GROUPS = "num_key_value_groups"  # of transformers: query heads of each key/value head


def apply_block(model: PreTrainedModel, block: EfficientBlock) -> None:
    """Narrow the linears that were pruned, and attach a variant to each attention that was converted."""
    for stack in model_stacks(model, family_of(model.config)):
        if stack.entry.places is not None and stack.entry.gaps is not None:
            leave_gaps(model.get_submodule(stack.prefix), stack.entry.places, stack.entry.gaps)
        wanted = _with_merging(block.stack(stack.name), stack.name)
        for index in range(len(stack.layers)):
            if block.is_converted():
                _say_what_is_known(stack, index)
            _apply_to_layer(stack, index, wanted)
        if any(config.kind == MERGING for config in wanted.attention):
            tokens = [config.merged_tokens for config in wanted.attention]
            merge_layers(stack.layers, stack.entry.attention, tokens, wanted.attention[0].protected_tokens)
        entry = stack.entry
        if (
            stack.family.relative_bias
            and holds(stack.layers[0], stack.family.relative_bias)
            and block.is_converted()
            and not (entry.attention.biased or entry.why_not(CONVERT))
        ):
            use_toeplitz_bias(stack.layers[0].get_submodule(stack.entry.attention.module))


def _say_what_is_known(stack: ModelStack, index: int) -> None:
    """Tell the attention modules of a layer what converted attention, which has no full mask, cannot see."""
    for kind, attention in stack.attentions_in(index).items():
        module = stack.layers[index].get_submodule(attention.module)
        if stack.entry.causal is not None:
            setattr(module, CAUSAL, kind == "heads" and stack.is_causal)
        if attention.biased:
            setattr(module, BIASED, True)


def _with_merging(entry: StackBlock, name: str) -> StackBlock:
    """In a stack where any layer merges tokens all layers count with their sizes: those that are full merge none.

    Raises:
        ConfigError: layers of another kind, or of several numbers of protected tokens.
    """
    merging = [config for config in entry.attention if config.kind == MERGING]
    if not merging:
        return entry
    settings = {config.protected_tokens for config in merging}
    others = {config.kind for config in entry.attention} - {MERGING, "full"}
    if others or len(settings) > 1 or None in settings or not all(type(one.merged_tokens) is int for one in merging):
        raise ConfigError(
            f"efficient.stacks.{name}.attention: layers that merge tokens can stand beside full ones alone, each with "
            f"a number of merged_tokens and all with the same protected_tokens; got {sorted(others) or settings}."
        )
    none = replace(merging[0], merged_tokens=0)
    return replace(entry, attention=tuple(none if one.kind == "full" else one for one in entry.attention))


def _apply_to_layer(stack: ModelStack, index: int, entry: StackBlock) -> None:
    layer, table = stack.layers[index], stack.family.relative_bias
    for (size, attention), configs in zip(
        stack.attentions.items(), (entry.attention, entry.cross_attention), strict=False
    ):
        if size not in stack.attentions_in(index):
            continue
        shape = HeadShape(stack.num_heads, stack.num_kv_heads, stack.head_width)
        if size in entry.sizes:
            heads = entry.sizes[size][index]
            kv_heads = 1 if stack.entry.one_kv_head else entry.sizes.get("kv_heads", entry.sizes[size])[index]
            shape = HeadShape(heads, kv_heads, stack.head_width)
            _resize_attention(layer, attention, shape, stack)
            if entry.kept_heads and size == "heads":
                keep_heads(layer.get_submodule(attention.module), attention, entry.kept_heads[index], stack.num_heads)
            if table and size == "heads" and index == 0:  # [buckets, heads], one for the whole stack
                bias = layer.get_submodule(table)
                bias.weight = nn.Parameter(bias.weight[:, :heads].clone())
                bias.embedding_dim = heads
        if configs and configs[index].kind != "full":  # made for the heads that are there now
            cross = size == "cross_heads"
            check_fit(configs[index], stack, cross)
            if attention.routed:
                route(layer.get_submodule(attention.module))
            attach(layer.get_submodule(attention.module), configs[index], shape, cross)
    for kind, ffn in stack.ffns_in(index).items():
        if kind in entry.sizes:
            (_resize_experts if ffn.has_experts else _resize_ffn)(layer, ffn, entry.sizes[kind][index])


def _resize_ffn(layer: nn.Module, ffn: FFN, neurons: int) -> None:
    for up, parts in Counter(ffn.up).items():
        resize_linear(layer.get_submodule(up), outputs=parts * neurons)
    resize_linear(layer.get_submodule(ffn.down), inputs=neurons)


def _resize_experts(layer: nn.Module, ffn: FFN, neurons: int) -> None:
    """Parameters `[experts, ., .]`, and the integers beside them that say how wide an expert is."""
    parts = Counter(ffn.up)
    wanted = [(up, ffn.up_dim, count * neurons) for up, count in parts.items()]
    wanted += [(bias, 1, count * neurons) for bias, count in zip(ffn.biases, parts.values(), strict=False)]
    for path, dim, size in (*wanted, (ffn.down, ffn.down_dim, neurons)):
        place, _, name = path.rpartition(".")
        setattr(layer.get_submodule(place), name, nn.Parameter(layer.get_parameter(path).narrow(dim, 0, size).clone()))
    for path in ffn.integers:
        place, _, name = path.rpartition(".")
        _set_number(layer.get_submodule(place), name, neurons)


def _set_number(module: nn.Module, name: str, number: int) -> None:
    """
    Raises:
        ConfigError: the module has no such number; the entry may come from a stranger's config.json.
    """
    if type(getattr(module, name, None)) is not int:
        raise ConfigError(f"efficient.family: {name!r} is no number of {type(module).__name__}.")
    setattr(module, name, number)


def check_fit(config: AttentionConfig, stack: ConfigStack, cross: bool = False) -> None:
    """Refuse a kind that has no place for what the attention of a stack is made of.

    Raises:
        UnsupportedModelError: a relative position bias, capped scores or sinks that would be dropped, values of
            another width than queries, or cross attention of a kind that needs queries and keys of one sequence.
    """
    if config.kind == "full":
        return
    variant, family = ATTENTIONS[config.kind], stack.family
    attention = stack.cross if cross else stack.entry.attention
    if config.streaming and (cross or not stack.is_causal or family.positions or family.relative_bias):
        raise UnsupportedModelError(
            "streaming=True is for the causal self-attention of decoders with rotary positions, not for the "
            f"{stack.name} of {family.model_type} models. Leave it out."
        )
    if cross and not variant.takes_cross:
        raise UnsupportedModelError(
            f"{config.kind!r} attention needs queries and keys of one sequence, so it cannot serve cross attention. "
            f"Kinds that can: {_kinds('takes_cross')}; or leave cross attention full."
        )
    if family.relative_bias and not cross and not variant.takes_bias:
        raise UnsupportedModelError(
            f"{config.kind!r} attention cannot express the relative position bias of {family.model_type} models. "
            f"Kinds that keep it for the pairs they see: {_kinds('takes_bias')}."
        )
    if attention and attention.logits and not variant.takes_logits:
        raise UnsupportedModelError(
            f"{config.kind!r} attention cannot express the capped scores or the attention sinks of "
            f"{family.model_type} models. Kinds that keep them: {_kinds('takes_logits')}."
        )
    if attention and attention.biased and not variant.takes_pairs:
        raise UnsupportedModelError(
            f"{config.kind!r} attention has no place for the bias that {family.model_type} models have for all pairs "
            f"of tokens. Kinds that have one: {_kinds('takes_pairs')}."
        )
    if attention and attention.uneven and not variant.takes_uneven:
        raise UnsupportedModelError(
            f"{config.kind!r} attention needs values as wide as queries, which {family.model_type} models do not "
            f"have. Kinds that take others: {_kinds('takes_uneven')}."
        )


def _kinds(ability: str) -> str:
    return ", ".join(kind for kind, variant in ATTENTIONS.items() if getattr(variant, ability))


def _resize_attention(layer: nn.Module, attention: Attention, shape: HeadShape, stack: ModelStack) -> None:
    outputs = Counter({attention.query: shape.heads * shape.dim})  # of a fused linear: the sum
    outputs.update({attention.key: shape.kv_heads * shape.dim})
    outputs.update({attention.value: shape.kv_heads * shape.dim})
    read = attention.value_size or shape.dim
    before = num_inputs(layer.get_submodule(attention.output)) // read
    for path in (*attention.gates, *attention.wide):
        outputs[path] = num_outputs(layer.get_submodule(path)) * shape.heads // before
    for path, count in outputs.items():
        resize_linear(layer.get_submodule(path), outputs=count)
    resize_linear(layer.get_submodule(attention.output), inputs=shape.heads * read)
    # The forward reads its sizes from plain integers beside the weights, or from a config that it shares.
    module, entry = layer.get_submodule(attention.module), stack.entry
    numbers = dict.fromkeys(attention.head_attributes, shape.heads)
    numbers |= dict.fromkeys(attention.kv_attributes, shape.kv_heads)
    numbers |= dict.fromkeys(attention.width_attributes, shape.heads * shape.dim)
    numbers |= dict.fromkeys(attention.kv_width_attributes, shape.kv_heads * shape.dim)
    if stack.entry.one_kv_head and GROUPS in vars(module):
        numbers[GROUPS] = shape.heads
    for name, number in numbers.items():
        _set_number(module, name, number)
    for name, dim in attention.head_parts.items():
        if holds(module, name):
            narrow_parameter(module, name, dim, module.get_parameter(name).shape[dim] * shape.heads // before)
    if attention.reads_config:
        module.config = copy.copy(module.config)
        for field, number in ((entry.heads, shape.heads), (entry.kv_heads, shape.kv_heads)):
            if field:
                setattr(module.config, field, number)
