"""Give a model cheaper attention, with the same weights.

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    model = convert_attention(model, AttentionConfig(kind="local", window=128, global_tokens=1))

The result is an efficient class of the same head (`EfficientBertForSequenceClassification`); the given model is left
as it is. `AttentionConfig(kind="full")` converts back.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, UnsupportedModelError
from ..families import family_of, find_stacks
from ..models.block import EfficientBlock, StackBlock
from ..models.building import check_model, rebuild
from ..models.configs import block_of, with_block
from .config import AttentionConfig
from .dispatch import ATTACHED, check_bias

PerLayer = AttentionConfig | dict[int, AttentionConfig]


def convert_attention(
    model: PreTrainedModel, config: PerLayer, *, layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """A copy of `model` whose self-attention is computed another way.

    Parameters:
        model: a stock or efficient model of a family in the table.
        config: one attention for all layers, or one for each layer index; layers that are not named keep theirs.
        layers: with a single config, the layers to convert (default: all). In an encoder-decoder both stacks count
            from 0 and are converted alike. Cross attention stays dense.

    Raises:
        UnsupportedModelError: the model cannot be converted, or would ignore the conversion.
        ConfigError: a layer that does not exist.
    """
    check_model(model)
    efficient = with_block(model.config, _converted(model.config, config, layers))
    converted = rebuild(model, efficient)
    if block_of(converted.config).is_converted():
        check_reached(converted)
    return converted


def efficient_config(
    name_or_path_or_config: str | PreTrainedConfig,
    attention: PerLayer | None = None,
    layers: Sequence[int] | None = None,
    **kwargs,
) -> PreTrainedConfig:
    """The efficient config of a stock checkpoint, for `from_pretrained(stock_checkpoint, config=...)`.

    Parameters:
        name_or_path_or_config: a Hub id, a folder, or a config.
        attention, layers: as `config` and `layers` of `convert_attention`.
        **kwargs: stock config fields to change, and `AutoConfig.from_pretrained` options such as `revision`.
    """
    if isinstance(name_or_path_or_config, PreTrainedConfig):
        stock, changes = name_or_path_or_config, kwargs
    else:
        stock, changes = AutoConfig.from_pretrained(name_or_path_or_config, **kwargs), {}
    block = block_of(stock) if attention is None else _converted(stock, attention, layers)
    return with_block(stock, block, **changes)


def _converted(config: PreTrainedConfig, attention: PerLayer, layers: Sequence[int] | None) -> EfficientBlock:
    family, block = family_of(config), block_of(config)
    counts = {stack.name: getattr(config, stack.num_layers) for stack in family.stacks}
    wanted = _by_layer(attention, layers, max(counts.values()))
    for one in wanted.values():
        check_bias(one, family)
    stacks = {}
    for name, count in counts.items():
        entry = block.stack(name)
        old = entry.attention or (AttentionConfig(),) * count
        stacks[name] = replace(entry, attention=tuple(wanted.get(i, old[i]) for i in range(count)))
    return replace(block, stacks=_drop_empty(stacks))


def _by_layer(attention: PerLayer, layers: Sequence[int] | None, count: int) -> dict[int, AttentionConfig]:
    if isinstance(attention, dict):
        if layers is not None:
            raise ConfigError("Give either one config with `layers`, or a dict from layer to config, not both.")
        wanted = attention
    elif isinstance(attention, AttentionConfig):
        wanted = dict.fromkeys(range(count) if layers is None else layers, attention)
    else:
        raise ConfigError(f"Expected an AttentionConfig or a dict from layer to AttentionConfig, got {attention!r}.")
    for layer, one in wanted.items():
        if type(layer) is not int or not 0 <= layer < count:
            raise ConfigError(f"Layer {layer!r} does not exist: this model has layers 0 to {count - 1}.")
        if not isinstance(one, AttentionConfig):
            raise ConfigError(f"Layer {layer}: expected an AttentionConfig, got {one!r}.")
    return wanted


def _drop_empty(stacks: dict[str, StackBlock]) -> dict[str, StackBlock]:
    return {name: entry for name, entry in stacks.items() if entry.sizes or entry.is_converted()}


def check_reached(model: PreTrainedModel) -> None:
    """Run a tiny forward and make sure that every attached variant was called.

    Many modelling files accept any attention name and ignore it; a conversion that changes nothing must be an error.

    Raises:
        UnsupportedModelError: a converted layer was not reached.
    """
    if model.device.type == "meta":
        return
    variants = {name: module for name, module in model.named_modules() if name.endswith(f".{ATTACHED}")}
    reached: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda m, args, out: reached.add(m)) for module in variants.values()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval().base_model(**_tiny_inputs(model))  # a head may want more of its inputs than attention does
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    missed = [name for name, module in variants.items() if module not in reached]
    if missed or not variants:
        raise UnsupportedModelError(
            f"The conversion had no effect on {', '.join(missed) or 'any layer'}: {type(model).__name__} does not "
            "call transformers' attention interface there."
        )


def _tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)}
    ids = torch.ones(1, 4, dtype=torch.long, device=model.device)
    has_decoder = sum(1 for _ in find_stacks(model)) > 1
    return {"input_ids": ids, "decoder_input_ids": ids} if has_decoder else {"input_ids": ids}
