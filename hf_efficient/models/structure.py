"""Give a freshly built stock network the shapes and the attention that its `efficient` block describes.

apply_block(model, EfficientBlock.from_dict(config.efficient))    # in the __init__ of every efficient class
"""

import copy
from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from ..attention.config import AttentionConfig
from ..attention.dispatch import attach
from ..attention.registry import ATTENTIONS
from ..attention.relative_bias import use_toeplitz_bias
from ..attention.variant import HeadShape
from ..errors import ConfigError, UnsupportedModelError
from .block import EfficientBlock, StackBlock
from .family import Attention, Family
from .linears import resize_linear
from .registry import family_of
from .stacks import ModelStack, model_stacks


def apply_block(model: PreTrainedModel, block: EfficientBlock) -> None:
    """Narrow the linears that were pruned, and attach a variant to each attention that was converted."""
    for stack in model_stacks(model, family_of(model.config)):
        for index in range(len(stack.layers)):
            _apply_to_layer(stack, index, block.stack(stack.name))
        if stack.family.relative_bias and block.is_converted():
            use_toeplitz_bias(stack.layers[0].get_submodule(stack.entry.attention.module))


def _apply_to_layer(stack: ModelStack, index: int, entry: StackBlock) -> None:
    layer, table = stack.layers[index], stack.family.relative_bias
    for (size, attention), configs in zip(
        stack.attentions.items(), (entry.attention, entry.cross_attention), strict=False
    ):
        shape = HeadShape(stack.num_heads, stack.num_kv_heads, stack.head_width)
        if size in entry.sizes:
            heads = entry.sizes[size][index]
            shape = HeadShape(heads, entry.sizes.get("kv_heads", entry.sizes[size])[index], stack.head_width)
            _resize_attention(layer, attention, shape, stack)
            if table and size == "heads" and index == 0:  # [buckets, heads], one for the whole stack
                bias = layer.get_submodule(table)
                bias.weight = nn.Parameter(bias.weight[:, :heads].clone())
                bias.embedding_dim = heads
        if configs:  # made for the heads that are there now
            cross = size == "cross_heads"
            check_fit(configs[index], stack.family, cross)
            attach(layer.get_submodule(attention.module), configs[index], shape, cross)
    if "neurons" in entry.sizes:
        neurons = entry.sizes["neurons"][index]
        for up, parts in Counter(stack.up).items():
            resize_linear(layer.get_submodule(up), outputs=parts * neurons)
        resize_linear(layer.get_submodule(stack.down), inputs=neurons)


def check_fit(config: AttentionConfig, family: Family, cross: bool = False) -> None:
    """Refuse a kind that has no place for what the attention of this family is made of.

    Raises:
        UnsupportedModelError: a relative position bias that would be dropped, or cross attention of a kind that needs
            queries and keys of one sequence.
    """
    if config.kind == "full":
        return
    variant = ATTENTIONS[config.kind]
    if cross and not variant.takes_cross:
        allowed = ", ".join(kind for kind, other in ATTENTIONS.items() if other.takes_cross)
        raise UnsupportedModelError(
            f"{config.kind!r} attention needs queries and keys of one sequence, so it cannot serve cross attention. "
            f"Kinds that can: {allowed}; or leave cross attention full."
        )
    if family.relative_bias and not cross and not variant.takes_bias:
        allowed = ", ".join(kind for kind, other in ATTENTIONS.items() if other.takes_bias)
        raise UnsupportedModelError(
            f"{config.kind!r} attention cannot express the relative position bias of {family.model_type} models. "
            f"Kinds that keep it for the pairs they see: {allowed}."
        )


def _resize_attention(layer: nn.Module, attention: Attention, shape: HeadShape, stack: ModelStack) -> None:
    outputs = Counter({attention.query: shape.heads * shape.dim})  # of a fused linear: the sum
    outputs.update({attention.key: shape.kv_heads * shape.dim})
    outputs.update({attention.value: shape.kv_heads * shape.dim})
    for path, count in outputs.items():
        resize_linear(layer.get_submodule(path), outputs=count)
    resize_linear(layer.get_submodule(attention.output), inputs=shape.heads * shape.dim)
    # The forward reads its sizes from plain integers beside the weights, or from a config that it shares.
    module, entry = layer.get_submodule(attention.module), stack.entry
    numbers = dict.fromkeys(attention.head_attributes, shape.heads)
    numbers |= dict.fromkeys(attention.kv_attributes, shape.kv_heads)
    numbers |= dict.fromkeys(attention.width_attributes, shape.heads * shape.dim)
    for name, number in numbers.items():
        if type(getattr(module, name, None)) is not int:  # the entry may come from a stranger's config.json
            raise ConfigError(f"efficient.family: {name!r} is no number of {type(module).__name__}.")
        setattr(module, name, number)
    for name in attention.per_head:
        setattr(module, name, nn.Parameter(getattr(module, name)[: shape.heads].clone()))
    if attention.reads_config:
        module.config = copy.copy(module.config)
        for field, number in ((entry.heads, shape.heads), (entry.kv_heads, shape.kv_heads)):
            if field:
                setattr(module.config, field, number)
