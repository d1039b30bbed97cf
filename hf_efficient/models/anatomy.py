"""What a model is made of, read once and handed on: family, `efficient` block, stacks with their layers, groups.

    anatomy = Anatomy.of(model)
    for stack in anatomy.stacks:
        print(stack.name, stack.depth, stack.num_heads, stack.is_causal, stack.layers[0])
    anatomy.block.is_trivial(), anatomy.groups

It describes the structure that the model has when it is made. Weights may change afterwards; a model whose layers,
heads or config were changed needs a new one.
"""

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import unknown_name
from .block import EfficientBlock
from .classes import block_of
from .derive import family_for
from .family import LAYERS, Family
from .groups import Group, groups_of
from .mixtures import Mixture
from .stacks import ConfigStack, ModelStack, config_stacks, mixtures_of, model_stacks


@dataclass(frozen=True, eq=False)
class ConfigAnatomy:
    """What a config says of its model, no modules needed. `stacks` are all those of the family."""

    config: PreTrainedConfig
    family: Family

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> "ConfigAnatomy":
        """
        Raises:
            UnsupportedModelError: it is in no table, and could not be derived.
        """
        return ConfigAnatomy(config, family_for(config))

    @cached_property
    def block(self) -> EfficientBlock:
        """The parsed and checked `efficient` block; that of a stock config says nothing but its kept layers."""
        return block_of(self.config)

    @cached_property
    def stacks(self) -> tuple[ConfigStack, ...]:
        return config_stacks(self.config, self.family)

    @cached_property
    def droppable(self) -> frozenset[str]:
        """The stacks that can lose layers."""
        return frozenset(stack.name for stack in self.stacks if stack.entry.why_not(LAYERS) is None)

    def stack(self, name: str) -> ConfigStack:
        return _named(self.stacks, name)


@dataclass(frozen=True, eq=False)
class Anatomy(ConfigAnatomy):
    """What one model is made of. `stacks` are those that it really has, in the order in which data flows."""

    model: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Anatomy":
        """
        Raises:
            UnsupportedModelError: it is in no table, and could not be derived.
        """
        return cls(model.config, family_for(model.config, model), model)

    @cached_property
    def stacks(self) -> tuple[ModelStack, ...]:
        return tuple(model_stacks(self.model, self.family))

    def stack(self, name: str) -> ModelStack:
        return _named(self.stacks, name)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Everything that can be removed in units, stack by stack and layer by layer: see `models.groups`."""
        return tuple(group for stack in self.stacks for group in groups_of(stack))

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The mixtures of experts, of which whole experts can leave, layer by layer: see `models.mixtures`."""
        return tuple(mixture for stack in self.stacks for mixture in mixtures_of(stack))


def _named(stacks: tuple, name: str):
    by_name = {stack.name: stack for stack in stacks}
    if name not in by_name:
        raise unknown_name("stack", name, by_name)
    return by_name[name]
