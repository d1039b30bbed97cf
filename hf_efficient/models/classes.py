"""Efficient classes: the stock config plus one `efficient` block, the stock model plus what the block says.

    EfficientBertConfig(BertConfig): model_type = "efficient_bert", efficient = {...}
    EfficientBertForSequenceClassification(EfficientMixin, BertForSequenceClassification)

After the stock `__init__` the mixin gives the model the structure of the block (`models.structure`). No modelling code
is copied, and state-dict keys stay the stock ones, so a stock checkpoint loads straight into an efficient class.

The classes are made here, for any type of transformers, when they are asked for. A config whose block is
trivial is written as the stock config, so that the checkpoint loads anywhere: see `save_pretrained`.
"""

import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..attention.dispatch import NAME, decodes_from_state, fill_missing
from ..attention.variant import AttentionVariant
from ..errors import UnsupportedModelError
from .block import EfficientBlock, check_block, check_stock_sizes
from .families import FAMILIES
from .family import CONVERT
from .registry import EFFICIENT_PREFIX, family_of, find_family
from .saving import LOADER, write_loader
from .structure import apply_block

# What `to_dict` adds and a constructor must not get back.
EFFICIENT = "Efficient"  # before the name of a stock class
_NOT_FIELDS = ("model_type", "transformers_version", "auto_map", "efficient")


class EfficientConfigMixin:
    """What the efficient config of every family adds to its stock config."""

    efficient: dict | None
    _auto_class = None  # of a stock class that came with its code: transformers would copy this file for that one

    def __post_init__(self, **kwargs):
        fields = {self.attribute_map.get(name, name): value for name, value in (vars(self) | kwargs).items()}
        check_stock_sizes(fields, find_family(self))
        super().__post_init__(**kwargs)
        self.block()
        # A config is the first thing that anything needs of a type: only now are its model classes worth making.
        register_models(self._stock_class)

    def block(self) -> EfficientBlock:
        """The parsed and checked `efficient` block."""
        if self.efficient is None:
            return EfficientBlock()
        block = EfficientBlock.from_dict(self.efficient)
        check_block(block, self, family_of(self))
        return block

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write the stock config if it says everything, else this one with its `auto_map` and the loader it names."""
        if self.block().is_trivial():
            stock_config(self).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        self.auto_map = auto_map(self)
        models = {auto: stock for auto, (_, stock) in auto_classes(self._stock_class).items()}
        write_loader(save_directory, {"AutoConfig": self._stock_class} | models)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: transformers would copy this installed source file into every checkpoint."""


def stock_config_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """`BertConfig` for a BERT's config and for its efficient one."""
    return config._stock_class if isinstance(config, EfficientConfigMixin) else type(config)


@cache
def efficient_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`EfficientBertConfig` for `BertConfig`."""
    body = {
        "__module__": __package__,
        "__doc__": f"[`{stock.__name__}`] plus an `efficient` block; see `hf_efficient.models.block`.",
        "__annotations__": {"efficient": dict | None},
        "efficient": None,
        "model_type": EFFICIENT_PREFIX + stock.model_type,
        "_stock_class": stock,
    }
    return type(f"{EFFICIENT}{stock.__name__}", (EfficientConfigMixin, stock), body)


def with_block(config: PreTrainedConfig, block: EfficientBlock, **changes: Any) -> PreTrainedConfig:
    """A new efficient config: this one with another block and other stock fields."""
    config_class = efficient_config_class(stock_config_class(config))
    family = family_of(config)
    if family.model_type not in FAMILIES:  # so that it need not be derived where the checkpoint is loaded
        block = replace(block, family=block.family or family)
    efficient = _make(config_class, config, efficient=block.to_dict(), **changes)
    if efficient.architectures:
        efficient.architectures = [f"{EFFICIENT}{name.removeprefix(EFFICIENT)}" for name in efficient.architectures]
    return efficient


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The stock config with the same fields. Of the block only `kept_layers` stays: a note that changes nothing."""
    layers = block_of(config).kept_layers
    note = {"efficient": EfficientBlock(kept_layers=layers).to_dict()} if layers else {}
    stock = _make(stock_config_class(config), config, **note)
    if stock.architectures:
        stock.architectures = [name.removeprefix(EFFICIENT) for name in stock.architectures]
    return stock


def block_of(config: PreTrainedConfig) -> EfficientBlock:
    """The block of an efficient config; that of a stock config holds at most a note of its kept layers."""
    if isinstance(config, EfficientConfigMixin):
        return config.block()
    return EfficientBlock.from_dict(config.to_dict().get("efficient", {}))


def _make(config_class: type[PreTrainedConfig], config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_FIELDS}
    new = config_class(**copy.deepcopy(fields) | changes)
    new._name_or_path = config._name_or_path
    return new


class EfficientMixin:
    """What every efficient model class adds to its stock class."""

    _auto_class = None  # as in the config

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        block = config.block()
        if block.is_converted():
            _use_interface(config)
        try:
            super().__init__(config, *args, **kwargs)
        except KeyError as error:
            if error.args != (NAME,):
                raise
            # It has classes by the names of implementations (Unlimited OCR); others ask their config when they run.
            config._attn_implementation = "eager"
            super().__init__(config, *args, **kwargs)
            for part in self.modules():
                if isinstance(getattr(part, "config", None), PreTrainedConfig):
                    part.config._attn_implementation = NAME
        apply_block(self, block)
        if not block.is_trivial():
            # Stock models inside an efficient one would lose its structure without a word.
            for part in self.modules():
                if isinstance(part, PreTrainedModel) and part is not self:
                    if block.is_converted():
                        part.set_attn_implementation = refuse_switching
                    if not isinstance(part.config, EfficientConfigMixin):
                        part.save_pretrained = part.push_to_hub = partial(_refuse_saving_part, type(part).__name__)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """As the stock method, but a converted model keeps its attention: another name would silently undo it."""
        if self.config.block().is_converted():
            refuse_switching(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def initialize_weights(self) -> None:
        """As the stock method; what no checkpoint held of the variants starts as in a new one."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, AttentionVariant):
                fill_missing(module)

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        """As the stock method, but not while layers decode from a state: a CUDA graph needs tensors that stay."""
        return not decodes_from_state(self) and super()._valid_auto_compile_criteria(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Of custom code transformers initialises no module again whose own weights were all loaded, and so misses what
        # it sets in others (a model in the buffers of its layers, which no checkpoint holds: Falcon-H1).
        return cls._stock_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source file of the class for an answer; the stock class has the right file.
        return cls._stock_class._can_set_attn_implementation()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing: transformers would copy this installed source file into every checkpoint."""


def _use_interface(config: PreTrainedConfig) -> None:
    """Stacks that call the attention interface, and can be converted, call ours; others go on as they are."""
    ours: list[PreTrainedConfig] = []
    others: list[PreTrainedConfig] = []
    for stack in family_of(config).stacks:
        is_ours = not (stack.attention.routed or stack.why_not(CONVERT))
        (ours if is_ours else others).append(stack.own_config(config))
    kept = [one for one in others if all(one is not other for other in ours)]
    before = [one._attn_implementation for one in kept]
    config._attn_implementation = NAME
    for one, name in zip(kept, before, strict=True):
        one._attn_implementation_internal = name


def refuse_switching(
    attn_implementation: Any,
    *args: Any,
    advice: str = 'To undo the conversion: convert_attention(model, AttentionConfig(kind="full")).',
    **kwargs: Any,
) -> None:
    """The `set_attn_implementation` of a converted model."""
    if attn_implementation != NAME:
        raise UnsupportedModelError(
            f"This model's attention was converted, so attn_implementation={attn_implementation!r} cannot be set. "
            f"{advice}"
        )


def _refuse_saving_part(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        f"This {kind} is part of a converted or pruned model, and its config does not know of that: it would load "
        f"with stock attention and sizes. Save the whole model, or convert or prune a {kind} of its own."
    )


def auto_classes(stock: type[PreTrainedConfig]) -> dict[str, tuple[type, type[PreTrainedModel]]]:
    """Every `AutoModel*` that has a class for a stock config class: its name, itself, and the stock class it gives."""
    classes = {}
    for name, auto in vars(modeling_auto).items():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if name.startswith("AutoModel") and mapping is not None and stock in mapping:
            classes[name] = (auto, stock_classes(auto, stock)[0])
    return classes


def stock_classes(auto: Any, stock: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    """All that an `AutoModel*` may give for a config class: of several, `architectures` names one (DeiT)."""
    classes = auto._model_mapping[stock]
    return classes if isinstance(classes, tuple) else (classes,)


@cache
def efficient_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """`EfficientBertForSequenceClassification` for `BertForSequenceClassification` and `BertConfig`."""
    body = {
        "__module__": __package__,
        "__doc__": f"[`{stock.__name__}`] with the structure that its config's `efficient` block describes.",
        "config_class": efficient_config_class(config),
        "_stock_class": stock,
    }
    return type(f"{EFFICIENT}{stock.__name__}", (EfficientMixin, stock), body)


@cache
def register_models(stock: type[PreTrainedConfig]) -> None:
    """Make every `AutoModel*` know the efficient classes, and load old checkpoints as the stock does."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    config_class = efficient_config_class(stock)
    names = {stock.model_type: config_class.model_type}
    for auto, _ in auto_classes(stock).values():
        efficient = tuple(efficient_class(one, stock) for one in stock_classes(auto, stock))
        auto._model_mapping.register(config_class, efficient if len(efficient) > 1 else efficient[0], exist_ok=True)
        names |= {one._stock_class.__name__: one.__name__ for one in efficient}
    for stock_name, efficient_name in names.items():
        renamings = get_checkpoint_conversion_mapping(stock_name)
        if renamings is not None:
            register_checkpoint_conversion_mapping(efficient_name, renamings, overwrite=True)


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The `auto_map` of config.json: where `trust_remote_code=True` finds each class."""
    stock = stock_config_class(config)
    classes = {"AutoConfig": efficient_config_class(stock).__name__}
    for name, (auto, _) in auto_classes(stock).items():
        allowed = [efficient_class(one, stock).__name__ for one in stock_classes(auto, stock)]
        classes[name] = next((one for one in allowed if one in (config.architectures or ())), allowed[0])
    return {auto: f"{LOADER}.{name}" for auto, name in classes.items()}


def find_class(name: str) -> type:
    """An efficient config or model class by its name: what `from hf_efficient.models import Efficient...` calls."""
    stock = _stock_class_named(name.removeprefix(EFFICIENT)) if name.startswith(EFFICIENT) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig) and stock.model_type:
        return efficient_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel) and stock.config_class is not None:
        return efficient_class(stock, stock.config_class)
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")


def remote_class(name: str, stock: dict[str, type]) -> type:
    """An efficient class of a model whose code came with its checkpoint: what the loader of that checkpoint calls.

    Parameters:
        stock: the stock classes, which were loaded from the same folder, by the names of their Auto classes.
    """
    config = stock["AutoConfig"]
    for auto, model in stock.items():  # as transformers does when it loads the stock model
        if auto != "AutoConfig":
            getattr(transformers, auto).register(config, model, exist_ok=True)
            if name == f"{EFFICIENT}{model.__name__}":
                return efficient_class(model, config)
    if name != f"{EFFICIENT}{config.__name__}":
        raise AttributeError(f"the loader of this checkpoint has no attribute {name!r}")
    return efficient_config_class(config)


def _stock_class_named(name: str) -> Any:
    """A class of transformers, or one that was given to an Auto class."""
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    registered: list[Any] = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.values())
    for auto in vars(modeling_auto).values():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        for value in getattr(mapping, "_extra_content", {}).values():
            registered += value if isinstance(value, tuple | list) else [value]
    return next((one for one in registered if one.__name__ == name), None)
