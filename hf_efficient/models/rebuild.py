"""Efficient model classes: the stock class plus two things.

    class EfficientBertForSequenceClassification(EfficientMixin, BertForSequenceClassification)

After the stock `__init__` the mixin (a) narrows the linears that the config says were pruned and (b) attaches an
attention variant to each layer that the config gives one. No modelling code is copied, and state-dict keys stay the
stock ones, so a stock checkpoint loads straight into an efficient class.

`rebuild` is the one way to change a model's structure: a new config and a new state dict make a new model. It refuses
a state that does not fit. `from_pretrained` does what it does for stock classes: another shape is an error, a missing
tensor (such as a new head on an old body) is filled at random and listed in a logged table.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import RLock
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..attention.dispatch import ATTACHED, NAME, attach, check_fit, decodes_from_state, fill_missing
from ..attention.relative_bias import use_toeplitz_bias
from ..attention.variant import AttentionVariant, HeadShape
from ..errors import CheckpointError, UnsupportedModelError
from ..runtimes.quantization import check_floats
from .block import EfficientBlock, StackBlock
from .classes import EfficientConfigMixin, block_of, efficient_config_class, stock_config, stock_config_class
from .families import FAMILIES, Attention, Family, Stack, family_of, find_stacks
from .linears import resize_linear
from .saving import LOADER

_QUIET = RLock()  # what transformers shows is set for all threads


class EfficientMixin:
    """What every efficient model class adds to its stock class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        block = config.block()
        if block.is_converted():
            config._attn_implementation = NAME
        super().__init__(config, *args, **kwargs)
        apply_block(self, block)
        if not block.is_trivial():
            _seal_parts(self, block)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """As the stock method, but a converted model keeps its attention: another name would silently undo it."""
        if self.config.block().is_converted():
            _refuse_switching(attn_implementation)
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
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source file of the class for an answer; the stock class has the right file.
        return cls._stock_class._can_set_attn_implementation()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing: transformers would copy this installed source file into every checkpoint."""


def _seal_parts(model: PreTrainedModel, block: EfficientBlock) -> None:
    """In the stock models inside an efficient one, what would lose its structure without a word is an error."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            if block.is_converted():
                part.set_attn_implementation = _refuse_switching
            if not isinstance(part.config, EfficientConfigMixin):
                part.save_pretrained = part.push_to_hub = partial(_refuse_saving_part, type(part).__name__)


def _refuse_switching(attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise UnsupportedModelError(
            f"This model's attention was converted, so attn_implementation={attn_implementation!r} cannot be "
            'set. To undo the conversion: convert_attention(model, AttentionConfig(kind="full")).'
        )


def _refuse_saving_part(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        f"This {kind} is part of a converted or pruned model, and its config does not know of that: it would load "
        f"with stock attention and sizes. Save the whole model, or convert or prune a {kind} of its own."
    )


def apply_block(model: PreTrainedModel, block: EfficientBlock) -> None:
    """Give a freshly built stock network the shapes and the attention of its block."""
    family = family_of(model.config)
    for stack, layers in find_stacks(model, family):
        entry = block.stack(stack.name)
        for index, layer in enumerate(layers):
            _resize_layer(layer, index, stack, entry, family, model.config)
            _attach_layer(layer, index, stack, entry, family, model.config)
        if family.relative_bias and block.is_converted():
            use_toeplitz_bias(layers[0].get_submodule(stack.attention.module))


def _attach_layer(
    layer: nn.Module, index: int, stack: Stack, entry: StackBlock, family: Family, config: PreTrainedConfig
) -> None:
    """The variants of one layer, made for the heads that it has."""
    dim = stack.head_width(config)
    for (size, attention), configs in zip(
        stack.attentions(config).items(), (entry.attention, entry.cross_attention), strict=False
    ):
        if configs:
            cross = size == "cross_heads"
            check_fit(configs[index], family, cross)
            heads, kv_heads = _head_counts(size, index, entry, stack, config)
            attach(layer.get_submodule(attention.module), configs[index], HeadShape(heads, kv_heads, dim), cross)


def _head_counts(size: str, index: int, entry: StackBlock, stack: Stack, config: PreTrainedConfig) -> tuple[int, int]:
    """Query heads and key/value heads of an attention module of one layer."""
    if size not in entry.sizes:
        return stack.num_heads(config), stack.num_kv_heads(config)
    return entry.sizes[size][index], entry.sizes.get("kv_heads", entry.sizes[size])[index]


def _resize_layer(
    layer: nn.Module, index: int, stack: Stack, entry: StackBlock, family: Family, config: PreTrainedConfig
) -> None:
    width = stack.head_width(config)
    for size, attention in stack.attentions(config).items():
        if size in entry.sizes:
            heads, kv_heads = _head_counts(size, index, entry, stack, config)
            _resize_attention(layer, attention, heads, kv_heads, width)
            if family.relative_bias and size == "heads" and index == 0:
                table = layer.get_submodule(family.relative_bias)
                table.weight = nn.Parameter(table.weight[:, :heads].clone())
                table.embedding_dim = heads
    if "neurons" in entry.sizes:
        neurons = entry.sizes["neurons"][index]
        for up, parts in Counter(family.up(stack, config)).items():
            resize_linear(layer.get_submodule(up), outputs=parts * neurons)
        resize_linear(layer.get_submodule(family.down(stack, config)), inputs=neurons)


def _resize_attention(layer: nn.Module, attention: Attention, heads: int, kv_heads: int, width: int) -> None:
    outputs = Counter({attention.query: heads * width})  # of a fused linear: the sum
    outputs.update({attention.key: kv_heads * width})
    outputs.update({attention.value: kv_heads * width})
    for path, count in outputs.items():
        resize_linear(layer.get_submodule(path), outputs=count)
    resize_linear(layer.get_submodule(attention.output), inputs=heads * width)
    module = layer.get_submodule(attention.module)
    for name in attention.head_attributes:
        setattr(module, name, heads)
    for name in attention.width_attributes:
        setattr(module, name, heads * width)


@cache
def auto_classes(family: Family) -> dict[str, tuple[type, type[PreTrainedModel]]]:
    """Every `AutoModel*` that has a class for the family: its name, itself, and the stock class it gives."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if name.startswith("AutoModel") and mapping is not None and stock_config_class(family) in mapping:
            found[name] = (auto, stock_classes(auto, family)[0])
    return found


def stock_classes(auto: Any, family: Family) -> tuple[type[PreTrainedModel], ...]:
    """All that an `AutoModel*` may give for the family: of several, the config's `architectures` names one (DeiT)."""
    stock = auto._model_mapping[stock_config_class(family)]
    return stock if isinstance(stock, tuple) else (stock,)


@cache
def efficient_class(stock: type[PreTrainedModel], family: Family) -> type[PreTrainedModel]:
    """`EfficientBertForSequenceClassification` for `BertForSequenceClassification`."""
    body = {
        "__module__": __package__,
        "__doc__": f"[`{stock.__name__}`] with the structure that its config's `efficient` block describes.",
        "config_class": efficient_config_class(family),
        "_stock_class": stock,
    }
    return type(f"Efficient{stock.__name__}", (EfficientMixin, stock), body)


@cache
def register_models(family: Family) -> None:
    """Make every `AutoModel*` of the family know the efficient classes, and load old checkpoints as the stock does."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    config_class = efficient_config_class(family)
    names = {family.model_type: config_class.model_type}
    for auto, _ in auto_classes(family).values():
        efficient = tuple(efficient_class(stock, family) for stock in stock_classes(auto, family))
        auto._model_mapping.register(config_class, efficient if len(efficient) > 1 else efficient[0], exist_ok=True)
        names |= {one._stock_class.__name__: one.__name__ for one in efficient}
    for stock_name, efficient_name in names.items():
        renamings = get_checkpoint_conversion_mapping(stock_name)
        if renamings is not None:
            register_checkpoint_conversion_mapping(efficient_name, renamings, overwrite=True)


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The `auto_map` of config.json: where `trust_remote_code=True` finds each class."""
    family = family_of(config)
    classes = {"AutoConfig": efficient_config_class(family).__name__}
    for name, (auto, _) in auto_classes(family).items():
        allowed = [efficient_class(stock, family).__name__ for stock in stock_classes(auto, family)]
        classes[name] = next((one for one in allowed if one in (config.architectures or ())), allowed[0])
    return {auto: f"{LOADER}.{name}" for auto, name in classes.items()}


def find_model_class(name: str) -> type[PreTrainedModel]:
    """An efficient model class by its name: what `from hf_efficient.models import Efficient...` calls."""
    stock = getattr(transformers, name.removeprefix("Efficient"), None)
    is_model = isinstance(stock, type) and issubclass(stock, PreTrainedModel) and stock.config_class is not None
    if not is_model or stock.config_class.model_type not in FAMILIES:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return efficient_class(stock, FAMILIES[stock.config_class.model_type])


def class_for(model: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class with the same head as `model` that `config` asks for: the stock or the efficient one."""
    stock = model._stock_class if isinstance(model, EfficientMixin) else type(model)
    return efficient_class(stock, family_of(config)) if isinstance(config, EfficientConfigMixin) else stock


def check_model(model: object) -> PreTrainedModel:
    """Refuse what cannot be rebuilt, before any work.

    Raises:
        UnsupportedModelError: not a transformers model, a quantised one, or one outside the table of families.
    """
    if not isinstance(model, PreTrainedModel):
        what = f"A transformers model is needed, got {type(model).__name__}"
        if isinstance(model, str):
            raise UnsupportedModelError(f"{what}. Load it first: AutoModel.from_pretrained({model!r}).")
        raise UnsupportedModelError(
            f"{what}. For a PEFT model, call `merge_and_unload()` first, or change the base model and add the "
            "adapters afterwards."
        )
    family_of(model.config)
    check_floats(model, "Convert or prune it first and quantise the result.")
    return model


def check_has_weights(model: PreTrainedModel) -> None:
    """Refuse a model of which a part is on meta, as after `init_empty_weights` or where weights wait on a disk.

    Raises:
        UnsupportedModelError: it has tensors without values.
    """
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise UnsupportedModelError(
            f"{len(empty)} tensors of this {type(model).__name__} have no values (meta device), such as {empty[0]!r}. "
            "Load it whole first, without a device_map that leaves weights on a disk."
        )


@torch.inference_mode(False)  # what is made in inference mode could never be trained
@torch.no_grad()
def rebuild(
    model: PreTrainedModel, config: PreTrainedConfig, state_dict: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """A new model with the head of `model`, the structure of `config` and the weights of `state_dict`.

    If the block of `config` is trivial the stock class is built, so that the result loads anywhere. The given model
    stays as it is, and shares no memory with the new one.

    Raises:
        CheckpointError: the state dict does not fit the config exactly.
        UnsupportedModelError: a part of the model has no weights.
    """
    check_model(model)
    check_has_weights(model)
    config = stock_config(config) if block_of(config).is_trivial() else config
    state = model.state_dict() if state_dict is None else state_dict
    passing = model._keys_to_ignore_on_save or ()  # not the model's own, such as projections while it is distilled
    with _quietly():
        made, info = class_for(model, config).from_pretrained(
            None,
            config=config,
            state_dict={key: value.detach().clone() for key, value in state.items() if key not in passing},
            dtype=model.dtype,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and kind != "error_msgs"}
    wrong["missing_keys"] = [key for key in wrong.get("missing_keys", []) if not _is_new(key, state)]
    wrong = {kind: keys for kind, keys in wrong.items() if keys}
    if wrong:
        raise CheckpointError(f"The weights do not fit the new structure: {wrong}.")
    _keep_precision(made, state)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()  # its name from 5.23 on
    if isinstance(model, GenerationMixin) and model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in made.named_parameters():
        parameter.requires_grad = name not in frozen
    return made.to(model.device).train(model.training)


def _keep_precision(made: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Give back its dtype to what was rounded to the model's, such as a head that is kept in float32."""
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = state[name].detach().clone()


def _is_new(key: str, state: dict[str, torch.Tensor]) -> bool:
    """True for a tensor of a variant of which the state knows nothing yet: it keeps its starting values."""
    variant, dot, _ = key.partition(f".{ATTACHED}.")
    return bool(dot) and not any(known.startswith(variant + dot) for known in state)


@contextmanager
def _quietly() -> Iterator[None]:
    """Nothing is read from a disk here, so there is nothing to wait for; and what is missing is known."""
    with _QUIET:
        shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shown:
                logging.enable_progress_bar()


def is_portable(model: PreTrainedModel) -> bool:
    """True if a saved copy loads with the stock class, without hf_efficient."""
    return block_of(model.config).is_trivial()
