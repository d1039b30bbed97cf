"""The table of model families: where a stock model keeps its layers, projections, neurons and their sizes.

Everything the package knows about one architecture stands here, and nowhere else. To add a family, write one `Family`
entry in `FAMILIES` and one parameter in `tests/families.py`.

    family = family_of(model.config)                     # BERT, ViT, Llama, T5
    for stack, layers in find_stacks(model, family):     # ("encoder", ModuleList of 12 layers)
        ...

Paths are relative: a stack's `layers` to the base model, all others to one layer. A stack that a class does not have
(`T5EncoderModel` has no decoder) is left out by `find_stacks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Attention:
    """One attention module of a layer.

    `module` is the one that calls transformers' attention interface; the four projections are `nn.Linear`s.
    `head_attributes` and `width_attributes` are the integers that the module keeps beside its weights: the number of
    query heads, and heads x head_dim.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    head_attributes: tuple[str, ...] = ()
    width_attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """One tower of identical layers: `layers` is its ModuleList, `num_layers` the config field with their number."""

    name: str
    layers: str
    num_layers: str
    attention: Attention
    up: tuple[str, ...]
    down: str
    gated_up: tuple[str, ...] = ()
    cross_attention: Attention | None = None

    def attentions(self) -> dict[str, Attention]:
        """The attention modules under the names that sizes and plans use: `heads`, and `cross_heads` if any."""
        cross = {"cross_heads": self.cross_attention} if self.cross_attention else {}
        return {"heads": self.attention, **cross}


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers builds it.

    Fields:
        config_name: its config class in transformers.
        stacks: its towers, in the order in which data flows.
        hidden, heads, neurons: config fields with the model width, the query heads and the FFN width.
        kv_heads: the config field with the key/value heads, `None` where there are as many as query heads.
        head_dim: the config field through which the stock model accepts a head count that does not fill the hidden
            size, `None` where it accepts none (then pruned heads need the efficient class).
        heads_divide_hidden: the stock config insists that the head count divides the hidden size.
        gated: the config field that says that the FFN is gated, where it may be either (T5).
        positions: the learned absolute position table, relative to the base model, with `max_positions` its config
            field; `None` where positions are rotary, relative or tied to an image size.
        relative_bias: the embedding in the first layer that holds a relative position bias shared by all layers
            of the stack. It ties the heads of all layers: they can only be pruned together.
        encoder_sizes_cache: `generate` makes as many cache layers as the *encoder* has (seen in 5.23: a stock T5 with
            a decoder deeper than its encoder raises IndexError), so the decoder must not become the deeper one.
    """

    model_type: str
    config_name: str
    stacks: tuple[Stack, ...]
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    neurons: str = "intermediate_size"
    kv_heads: str | None = None
    head_dim: str | None = None
    heads_divide_hidden: bool = False
    gated: str | None = None
    positions: str | None = None
    max_positions: str | None = None
    relative_bias: str | None = None
    encoder_sizes_cache: bool = False

    @property
    def deepest(self) -> str | None:
        """The stack that no other may outgrow, if there is one."""
        return self.stacks[0].name if self.encoder_sizes_cache else None

    def up(self, stack: Stack, config: PreTrainedConfig) -> tuple[str, ...]:
        """The linears that widen: one, or two (gate and up) in a gated FFN."""
        return stack.gated_up if self.gated and getattr(config, self.gated) else stack.up

    def num_heads(self, config: PreTrainedConfig) -> int:
        return getattr(config, self.heads)

    def num_kv_heads(self, config: PreTrainedConfig) -> int:
        return getattr(config, self.kv_heads or self.heads)

    def group_size(self, config: PreTrainedConfig) -> int:
        """Query heads per key/value head: 1 without grouped-query attention."""
        return self.num_heads(config) // self.num_kv_heads(config)

    def head_width(self, config: PreTrainedConfig) -> int:
        """The dimension of one head."""
        own = getattr(config, self.head_dim, None) if self.head_dim else None
        return own or getattr(config, self.hidden) // self.num_heads(config)


_BERT = Family(
    model_type="bert",
    config_name="BertConfig",
    stacks=(
        Stack(
            name="encoder",
            layers="encoder.layer",
            num_layers="num_hidden_layers",
            attention=Attention(
                module="attention.self",
                query="attention.self.query",
                key="attention.self.key",
                value="attention.self.value",
                output="attention.output.dense",
                head_attributes=("num_attention_heads",),
                width_attributes=("all_head_size",),
            ),
            up=("intermediate.dense",),
            down="output.dense",
        ),
    ),
    positions="embeddings.position_embeddings",
    max_positions="max_position_embeddings",
)

_VIT = Family(
    model_type="vit",
    config_name="ViTConfig",
    stacks=(
        Stack(
            name="encoder",
            layers="layers",
            num_layers="num_hidden_layers",
            attention=Attention(
                module="attention",
                query="attention.q_proj",
                key="attention.k_proj",
                value="attention.v_proj",
                output="attention.o_proj",
                head_attributes=("num_attention_heads",),
            ),
            up=("mlp.fc1",),
            down="mlp.fc2",
        ),
    ),
    head_dim="head_dim",
)

_LLAMA = Family(
    model_type="llama",
    config_name="LlamaConfig",
    stacks=(
        Stack(
            name="decoder",
            layers="layers",
            num_layers="num_hidden_layers",
            attention=Attention(
                module="self_attn",
                query="self_attn.q_proj",
                key="self_attn.k_proj",
                value="self_attn.v_proj",
                output="self_attn.o_proj",
            ),
            up=("mlp.gate_proj", "mlp.up_proj"),
            down="mlp.down_proj",
        ),
    ),
    kv_heads="num_key_value_heads",
    head_dim="head_dim",
    heads_divide_hidden=True,
    max_positions="max_position_embeddings",
)


def _t5_attention(path: str) -> Attention:
    return Attention(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        output=f"{path}.o",
        head_attributes=("n_heads",),
        width_attributes=("inner_dim",),
    )


_T5 = Family(
    model_type="t5",
    config_name="T5Config",
    stacks=(
        Stack(
            name="encoder",
            layers="encoder.block",
            num_layers="num_layers",
            attention=_t5_attention("layer.0.SelfAttention"),
            up=("layer.1.DenseReluDense.wi",),
            gated_up=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
            down="layer.1.DenseReluDense.wo",
        ),
        Stack(
            name="decoder",
            layers="decoder.block",
            num_layers="num_decoder_layers",
            attention=_t5_attention("layer.0.SelfAttention"),
            cross_attention=_t5_attention("layer.1.EncDecAttention"),
            up=("layer.2.DenseReluDense.wi",),
            gated_up=("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"),
            down="layer.2.DenseReluDense.wo",
        ),
    ),
    hidden="d_model",
    heads="num_heads",
    neurons="d_ff",
    head_dim="d_kv",
    gated="is_gated_act",
    relative_bias="layer.0.SelfAttention.relative_attention_bias",
    encoder_sizes_cache=True,
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (_BERT, _VIT, _LLAMA, _T5)}

EFFICIENT_PREFIX = "efficient_"


def family_of(config: PreTrainedConfig) -> Family:
    """The entry for a stock or an efficient config.

    Raises:
        UnsupportedModelError: the model type is not in the table.
    """
    model_type = config.model_type.removeprefix(EFFICIENT_PREFIX)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not in the table of families. Known: {', '.join(sorted(FAMILIES))}. "
            "A family can be added if its attention goes through transformers' attention interface "
            "(DeBERTa, MPNet, Longformer, Falcon and others do not): see CONTRIBUTING.md."
        )
    return FAMILIES[model_type]


def find_stacks(model: PreTrainedModel, family: Family | None = None) -> Iterator[tuple[Stack, nn.ModuleList]]:
    """The stacks that this model really has, each with its layers."""
    family = family or family_of(model.config)
    modules = dict(model.base_model.named_modules())
    for stack in family.stacks:
        if stack.layers in modules:
            yield stack, modules[stack.layers]


def layers_prefix(model: PreTrainedModel, layers: nn.ModuleList) -> str:
    """The name of a ModuleList in the whole model, as state-dict keys spell it: `bert.encoder.layer`."""
    return next(name for name, module in model.named_modules() if module is layers)
