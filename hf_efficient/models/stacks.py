"""The stacks of one model: what the table of families says about them, put together with a config and with modules.

for stack in model_stacks(model, family):
    print(stack.name, stack.num_heads, stack.layers[0])
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .families import Attention, Family, Stack, find_stacks


@dataclass(frozen=True, eq=False)
class ConfigStack:
    """One stack of a family with the sizes of one config: the stock sizes, from which layers may have been pruned."""

    family: Family
    entry: Stack
    config: PreTrainedConfig

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def depth(self) -> int:
        return self.entry.depth(self.config)

    @property
    def width(self) -> int:
        """The hidden size."""
        return self.entry.width(self.config)

    @property
    def num_neurons(self) -> int:
        return self.entry.num_neurons(self.config)

    @property
    def num_heads(self) -> int:
        return self.entry.num_heads(self.config)

    @property
    def num_kv_heads(self) -> int:
        return self.entry.num_kv_heads(self.config)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head: 1 without grouped-query attention."""
        return self.entry.group_size(self.config)

    @property
    def head_width(self) -> int:
        """The dimension of one head."""
        return self.entry.head_width(self.config)

    @property
    def is_causal(self) -> bool:
        """Its self-attention sees no later tokens."""
        return self.entry.is_causal(self.config)

    @property
    def attentions(self) -> dict[str, Attention]:
        """The attention modules under the names that sizes and plans use: `heads`, and `cross_heads` if any."""
        return self.entry.attentions(self.config)

    @property
    def cross(self) -> Attention | None:
        """The cross attention that its layers have, if any."""
        return self.entry.cross(self.config)

    @property
    def up(self) -> tuple[str, ...]:
        """The linears that widen: one, or two (gate and up, perhaps the same fused one) in a gated FFN."""
        return self.family.up(self.entry, self.config)

    @property
    def down(self) -> str:
        """The linear that narrows again."""
        return self.family.down(self.entry, self.config)

    def has_window(self, layer: int) -> bool:
        """The stock config gives the layer a sliding window of its own."""
        return self.entry.has_window(self.config, layer)


@dataclass(frozen=True, eq=False)
class ModelStack(ConfigStack):
    """One stack that a model really has: its layers, and the name that state-dict keys have for them.

    `prefix` is that of the ModuleList: `bert.encoder.layer`.
    """

    layers: nn.ModuleList
    prefix: str

    def layer_prefix(self, index: int) -> str:
        """`bert.encoder.layer.3`."""
        return f"{self.prefix}.{index}"


def config_stacks(config: PreTrainedConfig, family: Family) -> tuple[ConfigStack, ...]:
    return tuple(ConfigStack(family, entry, config) for entry in family.stacks)


def model_stacks(model: PreTrainedModel, family: Family) -> Iterator[ModelStack]:
    """The stacks that this model really has: `T5EncoderModel` has no decoder."""
    names = {module: name for name, module in model.named_modules()}
    for entry, layers in find_stacks(model, family):
        yield ModelStack(family, entry, model.config, layers, names[layers])
