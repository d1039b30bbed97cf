"""Give a model cheaper attention, with the same weights.

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    model = convert_attention(model, AttentionConfig(kind="local", window=128, global_tokens=1))

The result is an efficient class of the same head (`EfficientBertForSequenceClassification`); the given model is left
as it is. `AttentionConfig(kind="full")` converts back. A folder becomes another one, without being loaded:

    convert_attention("llama-70b", AttentionConfig(kind="local", window=1024, global_tokens=4), output_dir="converted")
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.config import AttentionConfig
from ..errors import ConfigError, UnsupportedModelError, shown
from ..models.anatomy import Anatomy, ConfigAnatomy
from ..models.block import ATTENTIONS, EfficientBlock
from ..models.classes import stock_config, with_block
from ..models.derive.merging import protected_tokens
from ..models.families import FAMILIES
from ..models.family import CONVERT
from ..models.loading import load_config
from ..models.on_disk import StoredModel
from ..models.rebuild import check_model, class_for, rebuild
from ..models.stacks import ConfigStack, config_stacks
from ..models.structure import MERGING, check_fit
from .alike import check_alike
from .in_folder import convert_folder, replaced
from .in_memory import convert_in_memory
from .mixing import CROSS, NATIVE, Mixing, only, spread
from .probe import check_reached
from .streaming import check_streaming


@overload
def convert_attention(
    model: PreTrainedModel, config: Mixing, *, layers: Sequence[int] | int | str | None = None
) -> PreTrainedModel: ...


@overload
def convert_attention(
    model: str | os.PathLike,
    config: Mixing,
    *,
    layers: Sequence[int] | int | str | None = None,
    output_dir: str | os.PathLike,
) -> Path: ...


@torch.inference_mode(False)  # what is made in inference mode could never be trained
@torch.no_grad()
def convert_attention(
    model: PreTrainedModel | str | os.PathLike,
    config: Mixing,
    *,
    layers: Sequence[int] | int | str | None = None,
    output_dir: str | os.PathLike | None = None,
) -> PreTrainedModel | Path:
    """A copy of `model` whose attention is computed another way.

    Parameters:
        model: a stock or efficient model of any architecture that can be derived (docs/models.md). Where nothing can
            be derived, one that calls the attention interface is converted in memory and cannot be saved (see
            `conversion.in_memory`). Or a folder with a model: its weights are copied a few tensors at a time.
        config: one attention for all layers, or a mapping that says which layer, or which stack, gets which:
            `{0: full, "1-4": local}`, `{"all": local, "3::4": full}`, `{"encoder": local, "cross_attention": linear}`
            (see `conversion.mixing`). Layers that are not named keep theirs; cross attention too. Or `"native"`:
            layers that the model itself gives a sliding window compute it as one. No answer changes.
        layers: with a single config, the layers to convert: numbers, or a pattern such as `"3::4"` (default: all). In
            an encoder-decoder both stacks count from 0.
        output_dir: where the result of a folder is written, with the tokenizer; new or empty. It is returned.

    Raises:
        CheckpointError: the folder or its weights cannot be read; `output_dir` is not empty.
        UnsupportedModelError: the model cannot be converted, or would ignore the conversion.
        ConfigError: a layer or stack that does not exist.
    """
    if isinstance(model, str | os.PathLike):
        if output_dir is None:
            raise ConfigError(
                f"To convert the model in {os.fspath(model)!r} a few tensors at a time say where the result goes: "
                "output_dir=... To have it in memory load it first, and give the model."
            )
        return _convert_stored(StoredModel.open(os.fspath(model)), config, layers, output_dir)
    if output_dir is not None:
        raise ConfigError("output_dir is for a model that is named by its folder. Save this one: save_pretrained.")
    anatomy = _find_anatomy(check_model(model))
    if anatomy is None:
        if isinstance(config, str):
            raise UnsupportedModelError(f"What windows a {type(model).__name__} has cannot be read. Give the window.")
        converted = convert_in_memory(model, _by_layer(config, layers))
        check_streaming(converted)
        return converted
    block = _converted(anatomy, config, layers, class_for(model, stock_config(model.config)))
    gone = replaced(anatomy, block)
    state = {name: value for name, value in model.state_dict().items() if not (gone and name.startswith(gone))}
    converted = rebuild(model, with_block(model.config, block), state)
    if block.is_converted() and anatomy.family.model_type in FAMILIES:
        check_reached(converted)
    elif block.is_converted():
        check_alike(model, converted)
    check_streaming(converted)
    return converted


def _convert_stored(
    stored: StoredModel, config: Mixing, layers: Sequence[int] | int | str | None, output_dir: str | os.PathLike
) -> Path:
    model, anatomy = stored.model, _find_anatomy(stored.model)
    if anatomy is None:
        raise UnsupportedModelError(
            f"The attention of {type(model).__name__} is converted in memory alone, and such a model cannot be saved."
        )
    block = _converted(anatomy, config, layers, class_for(model, stock_config(model.config)))
    return convert_folder(stored, block, replaced(anatomy, block), convert_attention, output_dir)


def _find_anatomy(model: PreTrainedModel) -> Anatomy | None:
    """None for a model whose attention can be converted in memory at best."""
    if getattr(model.config, "efficient_in_memory", None):
        return None
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModelError:
        return None
    return None if anatomy.family.why_not(CONVERT) else anatomy


def efficient_config(
    name_or_path_or_config: str | PreTrainedConfig,
    attention: Mixing | None = None,
    layers: Sequence[int] | int | str | None = None,
    **kwargs,
) -> PreTrainedConfig:
    """The efficient config of a stock checkpoint, for `from_pretrained(stock_checkpoint, config=...)`.

    Parameters:
        name_or_path_or_config: a Hub id, a folder, or a config.
        attention, layers: as `config` and `layers` of `convert_attention`, which tries `streaming` on the model; here
            it is taken on trust.
        **kwargs: stock config fields to change, and `AutoConfig.from_pretrained` options such as `revision`.
    """
    if isinstance(name_or_path_or_config, PreTrainedConfig):
        stock, changes = name_or_path_or_config, kwargs
    else:
        stock, changes = load_config(name_or_path_or_config, **kwargs), {}
    anatomy = ConfigAnatomy.of_config(stock)
    block = anatomy.block if attention is None else _converted(anatomy, attention, layers)
    return with_block(stock, block, **changes)


def _converted(
    anatomy: ConfigAnatomy,
    mixing: Mixing,
    layers: Sequence[int] | int | str | None,
    model_class: type[PreTrainedModel] | None = None,
) -> EfficientBlock:
    """The block with the attentions that `mixing` names, in all stacks of the family: a class may leave one out."""
    stacks = {stack.name: stack for stack in config_stacks(anatomy.config, anatomy.family)}
    if isinstance(mixing, str):
        mixing = _own_windows(mixing, anatomy.family.model_type, stacks)
    if anatomy.family.left_out and isinstance(mixing, AttentionConfig):
        raise UnsupportedModelError(
            f"{anatomy.family.model_type} models have attention in {', '.join(anatomy.family.left_out)} too, which "
            f"cannot be converted and would stay dense. Name what is to be converted: {{{_others(stacks)}}}."
        )
    depths = {name: stack.depth for name, stack in stacks.items()}
    crossed = {name: depths[name] for name, stack in stacks.items() if stack.cross}
    entries = {}
    for name, wanted in spread(_by_layer(mixing, layers), depths, crossed).items():
        entry, stack, changes = anatomy.block.stack(name), stacks[name], {}
        for key in ATTENTIONS:
            for config in wanted[key].values():
                if config.kind != "full" and stack.entry.why_not(CONVERT):
                    raise UnsupportedModelError(
                        f"The attention of the {name} of {anatomy.family.model_type} models cannot be converted: "
                        f"{stack.entry.why_not(CONVERT)}. Name those that can: {{{_others(stacks)}}}."
                    )
                check_fit(config, stack, cross=key == CROSS)
            old = getattr(entry, key) or (AttentionConfig(),) * stack.depth
            causal = key != CROSS and stack.is_causal
            # Global tokens are sinks of a causal layer; one that has a window of its own never saw them.
            has_it = set(range(stack.depth) if key == CROSS else stack.attending)
            if wanted[key] and not wanted[key].keys() & has_it:
                raise ConfigError(f"None of these layers of the {name} has softmax attention; {stack.attending} have.")
            new = tuple(
                wanted[key].get(index, old[index]).resolve(causal and not stack.has_window(index))
                if index in has_it
                else AttentionConfig()
                for index in range(stack.depth)
            )
            if any(config.kind == MERGING for config in new):
                new = _with_protected(new, protected_tokens(model_class, stock_config(anatomy.config), name))
            changes[key] = new if any(config.kind != "full" for config in new) else ()
        entry = replace(entry, **changes)
        if entry.sizes or entry.is_converted():
            entries[name] = entry
    return replace(anatomy.block, stacks=entries)


def _own_windows(name: str, model_type: str, stacks: Mapping[str, ConfigStack]) -> Mixing:
    """The sliding windows that the stock config gives layers, as local attention of that window.

    With causality i - w < j <= i, else |i - j| <= w, as transformers' masks have them.
    """
    if name != NATIVE:
        raise ConfigError(f"Expected an AttentionConfig or a mapping, or {NATIVE!r}, got {shown(name)}.")
    if any(getattr(stack.sizes, "use_bidirectional_attention", False) for stack in stacks.values()):
        raise UnsupportedModelError(
            f"This {model_type} sees both sides of a window that its config counts in another way. Give the window "
            "that you mean: AttentionConfig('local', window=..., global_tokens=0)."
        )
    windows = {
        stack.name: {
            index: AttentionConfig("local", window=stack.sizes.sliding_window, global_tokens=0)
            for index in range(stack.depth)
            if index in stack.attending and stack.has_window(index) and not stack.entry.why_not(CONVERT)
        }
        for stack in stacks.values()
    }
    if not any(windows.values()):
        raise UnsupportedModelError(
            f"No layer of this {model_type} has a sliding window in its config, so there is none to compute as one."
        )
    return {name: by_layer for name, by_layer in windows.items() if by_layer}


def _with_protected(configs: Sequence[AttentionConfig], protected: int) -> tuple[AttentionConfig, ...]:
    """The same, where nothing is said with as many protected tokens as there are that are not of the image."""
    missing = [one.kind == MERGING and one.protected_tokens is None for one in configs]
    return tuple(
        replace(one, protected_tokens=protected) if is_missing else one
        for one, is_missing in zip(configs, missing, strict=True)
    )


def _others(stacks: Mapping[str, ConfigStack]) -> str:
    names = (name for name, stack in stacks.items() if not stack.entry.why_not(CONVERT))
    return ", ".join(f"{name!r}: AttentionConfig(...)" for name in names)


def _by_layer(config: Mixing, layers: Sequence[int] | int | str | None) -> Mixing:
    if layers is None:
        return config
    if not isinstance(config, AttentionConfig):
        raise ConfigError("Give either one config with `layers`, or a mapping from layers to configs, not both.")
    return only(config, layers)
