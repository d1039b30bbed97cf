"""Give a model cheaper attention, with the same weights.

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    model = convert_attention(model, AttentionConfig(kind="local", window=128, global_tokens=1))

The result is an efficient class of the same head (`EfficientBertForSequenceClassification`); the given model is left
as it is. `AttentionConfig(kind="full")` converts back.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.config import AttentionConfig
from ..attention.dispatch import ATTACHED
from ..errors import ConfigError
from ..models.block import ATTENTIONS, EfficientBlock, StackBlock
from ..models.classes import block_of, with_block
from ..models.families import family_of, find_stacks, is_known, layers_prefix
from ..models.loading import load_config
from ..models.rebuild import check_model, rebuild
from ..models.structure import check_fit
from .in_memory import convert_in_memory
from .mixing import CROSS, Mixing, only, spread
from .probe import check_reached


@torch.inference_mode(False)  # what is made in inference mode could never be trained
@torch.no_grad()
def convert_attention(
    model: PreTrainedModel, config: Mixing, *, layers: Sequence[int] | int | str | None = None
) -> PreTrainedModel:
    """A copy of `model` whose attention is computed another way.

    Parameters:
        model: a stock or efficient model of a family in the table; or any other transformers model that calls the
            attention interface, which is converted in memory and cannot be saved (see `conversion.in_memory`).
        config: one attention for all layers, or a mapping that says which layer, or which stack, gets which:
            `{0: full, "1-4": local}`, `{"all": local, "3::4": full}`, `{"encoder": local, "cross_attention": linear}`
            (see `conversion.mixing`). Layers that are not named keep theirs; cross attention too.
        layers: with a single config, the layers to convert: numbers, or a pattern such as `"3::4"` (default: all). In
            an encoder-decoder both stacks count from 0.

    Raises:
        UnsupportedModelError: the model cannot be converted, or would ignore the conversion.
        ConfigError: a layer or stack that does not exist.
    """
    if isinstance(model, PreTrainedModel) and not is_known(model.config):
        return convert_in_memory(model, _asked(config, layers))
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
        for key, attention in zip(ATTENTIONS, stack.attentions(config).values(), strict=False):
            before, after = (getattr(block.stack(stack.name), key) for block in (old, new))
            for index in range(len(layers)):
                if before and before[index] != (after[index] if after else None):
                    gone = f"{prefix}.{index}.{attention.module}.{ATTACHED}."
                    state = {name: value for name, value in state.items() if not name.startswith(gone)}
    return state


def efficient_config(
    name_or_path_or_config: str | PreTrainedConfig,
    attention: Mixing | None = None,
    layers: Sequence[int] | int | str | None = None,
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
        stock, changes = load_config(name_or_path_or_config, **kwargs), {}
    block = block_of(stock) if attention is None else _converted(stock, attention, layers)
    return with_block(stock, block, **changes)


def _converted(config: PreTrainedConfig, asked: Mixing, layers: Sequence[int] | int | str | None) -> EfficientBlock:
    family, block = family_of(config), block_of(config)
    asked = _asked(asked, layers)
    counts = {stack.name: stack.depth(config) for stack in family.stacks}
    crossed = {stack.name: counts[stack.name] for stack in family.stacks if stack.cross(config)}
    stacks = {}
    by_name = {stack.name: stack for stack in family.stacks}
    for name, wanted in spread(asked, counts, crossed).items():
        entry, stack = block.stack(name), by_name[name]
        changed = {}
        for key in ATTENTIONS:
            for one in wanted[key].values():
                check_fit(one, family, cross=key == CROSS)
            old = getattr(entry, key) or (AttentionConfig(),) * counts[name]
            causal = key != CROSS and stack.is_causal(config)
            new = tuple(
                wanted[key].get(i, old[i]).resolve(causal and not stack.has_window(config, i))
                for i in range(counts[name])
            )
            changed[key] = new if any(one.kind != "full" for one in new) else ()
        stacks[name] = replace(entry, **changed)
    return replace(block, stacks=_drop_empty(stacks))


def _asked(config: Mixing, layers: Sequence[int] | int | str | None) -> Mixing:
    if layers is None:
        return config
    if not isinstance(config, AttentionConfig):
        raise ConfigError("Give either one config with `layers`, or a mapping from layers to configs, not both.")
    return only(config, layers)


def _drop_empty(stacks: dict[str, StackBlock]) -> dict[str, StackBlock]:
    return {name: entry for name, entry in stacks.items() if entry.sizes or entry.is_converted()}
