"""Efficient config classes: the stock config plus one `efficient` block.

    EfficientBertConfig(BertConfig): model_type = "efficient_bert", efficient = {...}

The classes are made here, one for each entry of `families.FAMILIES`. A config whose block is trivial is written as the
stock config, so that the checkpoint loads anywhere: see `save_pretrained`.
"""

import copy
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedConfig

from .block import EfficientBlock, check_block, check_stock_sizes
from .families import EFFICIENT_PREFIX, FAMILIES, Family, family_of
from .saving import write_loader

# What `to_dict` adds and a constructor must not get back.
_NOT_FIELDS = ("model_type", "transformers_version", "auto_map", "efficient")


class EfficientConfigMixin:
    """What the efficient config of every family adds to its stock config."""

    efficient: dict | None

    def __post_init__(self, **kwargs):
        fields = {self.attribute_map.get(name, name): value for name, value in (vars(self) | kwargs).items()}
        check_stock_sizes(fields, family_of(self))
        super().__post_init__(**kwargs)
        self.block()
        # A config is the first thing that anything needs of a family: only now are its model classes worth making.
        from .rebuild import register_models

        register_models(family_of(self))

    def block(self) -> EfficientBlock:
        """The parsed and checked `efficient` block."""
        block = EfficientBlock() if self.efficient is None else EfficientBlock.from_dict(self.efficient)
        check_block(block, self, family_of(self))
        return block

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write the stock config if it says everything, else this one with its `auto_map` and the loader it names."""
        if self.block().is_trivial():
            stock_config(self).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        from .rebuild import auto_map

        self.auto_map = auto_map(self)
        write_loader(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: transformers would copy this installed source file into every checkpoint."""


def stock_config_class(family: Family) -> type[PreTrainedConfig]:
    """`BertConfig` for BERT."""
    return getattr(transformers, family.config_name)


def _class_name(family: Family) -> str:
    return f"Efficient{family.config_name}"


@cache
def efficient_config_class(family: Family) -> type[PreTrainedConfig]:
    """`EfficientBertConfig` for BERT."""
    stock = stock_config_class(family)
    body = {
        "__module__": __package__,
        "__doc__": f"[`{stock.__name__}`] plus an `efficient` block; see `hf_efficient.models.block`.",
        "__annotations__": {"efficient": dict | None},
        "efficient": None,
        "model_type": EFFICIENT_PREFIX + family.model_type,
    }
    return type(_class_name(family), (EfficientConfigMixin, stock), body)


def find_config_class(name: str) -> type[PreTrainedConfig]:
    """An efficient config class by its name."""
    return next(efficient_config_class(family) for family in FAMILIES.values() if name == _class_name(family))


def with_block(config: PreTrainedConfig, block: EfficientBlock, **changes: Any) -> PreTrainedConfig:
    """A new efficient config: this one with another block and other stock fields."""
    config_class = efficient_config_class(family_of(config))
    made = _make(config_class, config, efficient=block.to_dict(), **changes)
    if made.architectures:
        made.architectures = [f"Efficient{name.removeprefix('Efficient')}" for name in made.architectures]
    return made


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The stock config with the same fields. Of the block only `kept_layers` stays: a note that changes nothing."""
    kept = block_of(config).kept_layers
    note = {"efficient": EfficientBlock(kept_layers=kept).to_dict()} if kept else {}
    stock = _make(stock_config_class(family_of(config)), config, **note)
    if stock.architectures:
        stock.architectures = [name.removeprefix("Efficient") for name in stock.architectures]
    return stock


def block_of(config: PreTrainedConfig) -> EfficientBlock:
    """The block of an efficient config; that of a stock config holds at most a note of its kept layers."""
    if isinstance(config, EfficientConfigMixin):
        return config.block()
    return EfficientBlock.from_dict(config.to_dict().get("efficient", {}))


def _make(config_class: type[PreTrainedConfig], config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_FIELDS}
    made = config_class(**copy.deepcopy(fields) | changes)
    made._name_or_path = config._name_or_path
    return made
