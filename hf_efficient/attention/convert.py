"""Give a model cheaper attention, with the same weights.

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    model = convert_attention(model, AttentionConfig(kind="local", window=128, global_tokens=1))

The result is an efficient class of the same head (`EfficientBertForSequenceClassification`); the given model is left
as it is. `AttentionConfig(kind="full")` converts back.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, UnsupportedModelError
from ..families import family_of, find_stacks, layers_prefix
from ..models.block import ATTENTIONS, EfficientBlock, StackBlock
from ..models.building import check_model, rebuild
from ..models.configs import block_of, with_block
from .config import AttentionConfig
from .dispatch import ATTACHED, check_fit
from .mixing import CROSS, Mixing, only, spread


def convert_attention(
    model: PreTrainedModel, config: Mixing, *, layers: Sequence[int] | str | None = None
) -> PreTrainedModel:
    """A copy of `model` whose attention is computed another way.

    Parameters:
        model: a stock or efficient model of a family in the table.
        config: one attention for all layers, or a mapping that says which layer, or which stack, gets which:
            `{0: full, "1-4": local}`, `{"all": local, "3::4": full}`, `{"encoder": local, "cross_attention": linear}`
            (see `attention.mixing`). Layers that are not named keep theirs; cross attention too.
        layers: with a single config, the layers to convert: numbers, or a pattern such as `"3::4"` (default: all). In
            an encoder-decoder both stacks count from 0.

    Raises:
        UnsupportedModelError: the model cannot be converted, or would ignore the conversion.
        ConfigError: a layer or stack that does not exist.
    """
    check_model(model)
    efficient = with_block(model.config, _converted(model.config, config, layers))
    converted = rebuild(model, efficient, _without_replaced(model, efficient))
    if block_of(converted.config).is_converted():
        check_reached(converted)
    return converted


def _without_replaced(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of `model` without the learned parts of attentions that `config` replaces."""
    state = model.state_dict()
    old, new = block_of(model.config), block_of(config)
    for stack, layers in find_stacks(model):
        prefix = layers_prefix(model, layers)
        for key, attention in zip(ATTENTIONS, stack.attentions().values(), strict=False):
            before, after = (getattr(block.stack(stack.name), key) for block in (old, new))
            for index in range(len(layers)):
                if before and before[index] != (after[index] if after else None):
                    gone = f"{prefix}.{index}.{attention.module}.{ATTACHED}."
                    state = {name: value for name, value in state.items() if not name.startswith(gone)}
    return state


def efficient_config(
    name_or_path_or_config: str | PreTrainedConfig,
    attention: Mixing | None = None,
    layers: Sequence[int] | str | None = None,
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


def _converted(config: PreTrainedConfig, asked: Mixing, layers: Sequence[int] | str | None) -> EfficientBlock:
    family, block = family_of(config), block_of(config)
    if layers is not None:
        if not isinstance(asked, AttentionConfig):
            raise ConfigError("Give either one config with `layers`, or a mapping from layers to configs, not both.")
        asked = only(asked, layers)
    counts = {stack.name: getattr(config, stack.num_layers) for stack in family.stacks}
    crossed = {stack.name: counts[stack.name] for stack in family.stacks if stack.cross_attention}
    stacks = {}
    for name, wanted in spread(asked, counts, crossed).items():
        entry = block.stack(name)
        changed = {}
        for key in ATTENTIONS:
            for one in wanted[key].values():
                check_fit(one, family, cross=key == CROSS)
            old = getattr(entry, key) or (AttentionConfig(),) * counts[name]
            new = tuple(wanted[key].get(i, old[i]) for i in range(counts[name]))
            changed[key] = new if any(one.kind != "full" for one in new) else ()
        stacks[name] = replace(entry, **changed)
    return replace(block, stacks=_drop_empty(stacks))


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
            model.eval().base_model(
                **_tiny_inputs(model), **_no_cache(model)
            )  # a head may want more of its inputs than attention does
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


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Decoding from a cache does not call a variant as a module."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.base_model.forward).parameters else {}


def _tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)}
    ids = torch.ones(1, 4, dtype=torch.long, device=model.device)
    has_decoder = sum(1 for _ in find_stacks(model)) > 1
    return {"input_ids": ids, "decoder_input_ids": ids} if has_decoder else {"input_ids": ids}
