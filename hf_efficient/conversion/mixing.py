"""Which layer gets which attention: one for all, or a mapping from layers to attentions.

    AttentionConfig("local")                                        every layer of every stack
    {0: full, "1-4": local, 5: linear}                              numbers and ranges (both ends included)
    {"all": local, "3::4": full}                                    every 4th layer full: start:stop:step
    {"encoder": local, "decoder": {"all": local, 0: full}}          stack by stack
    {"encoder": local, "cross_attention": AttentionConfig("linear")}

    "native"                                                        the model's own windows, computed as windows

What is more special wins: a number over a range, a range over a slice, a slice over "all". Layers that are not named
keep what they have.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from ..attention.config import AttentionConfig
from ..errors import ConfigError, unknown_name
from ..models.families import FAMILIES

LayerKey = int | str
ByLayer = AttentionConfig | Mapping[LayerKey, AttentionConfig]
Mixing = ByLayer | Mapping[str, ByLayer] | str

NATIVE = "native"

CROSS = "cross_attention"
STACK_NAMES = {stack.name for family in FAMILIES.values() for stack in family.stacks} | {CROSS}
MAX_LAYERS = 1024

_NUMBER, _RANGE = re.compile(r"[0-9]{1,5}"), re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_SLICE = re.compile(r"([0-9]{0,5}):([0-9]{0,5})(?::([1-9][0-9]{0,4})?)?")


def read_layers(key: LayerKey, count: int) -> tuple[int, range]:
    """How special a key is (0 to 3), and the layers it means in a stack of `count`.

    Raises:
        ConfigError: a key other than a number, range, slice or "all", or one that means no layer of the stack.
    """
    text = str(key)
    if text == "all":
        return 0, range(count)
    if sliced := _SLICE.fullmatch(text):
        start, stop, step = (int(part) if part else None for part in sliced.groups())
        rank, layers = 1, range(count)[slice(start, stop, step)]
    elif ranged := _RANGE.fullmatch(text):
        rank, layers = 2, range(int(ranged[1]), int(ranged[2]) + 1)
    elif _NUMBER.fullmatch(text) and not isinstance(key, bool):
        rank, layers = 3, range(int(text), int(text) + 1)
    else:
        raise ConfigError(
            f"{key!r} names no layers. Give a number from 0 on, a range ('1-4', both ends included), a slice ('3::4', "
            "every 4th layer) or 'all'."
        )
    if not layers or layers[-1] >= count:
        empty = "" if layers else ", none of which is in this range"
        raise ConfigError(f"Layer {key!r} does not exist: this model has layers 0 to {count - 1}{empty}.")
    return rank, layers


def spread(mixing: Mixing, stacks: Mapping[str, int], crossed: Mapping[str, int]) -> dict[str, dict[str, dict]]:
    """What is wanted, as `{stack: {"attention": {layer: config}, "cross_attention": {layer: config}}}`.

    Parameters:
        stacks: the layers of each stack.
        crossed: those of the stacks that have cross attention.

    Raises:
        ConfigError: an unknown stack or layer, a layer named twice, or something else than an AttentionConfig.
    """
    by_stack = isinstance(mixing, Mapping) and any(key in STACK_NAMES or key in stacks for key in mixing)
    if not by_stack:
        return {name: {"attention": spread_layers(mixing, count), CROSS: {}} for name, count in stacks.items()}
    result = {name: {"attention": {}, CROSS: {}} for name in stacks}
    for name, by_layer in mixing.items():
        if name != CROSS and name not in stacks:
            raise unknown_stack(name, [*stacks, CROSS] if crossed else stacks)
        if name != CROSS:
            result[name]["attention"] = spread_layers(by_layer, stacks[name])
            continue
        if not crossed:
            raise ConfigError("This model has no cross attention to convert.")
        for stack, count in crossed.items():
            result[stack][CROSS] = spread_layers(by_layer, count)
    return result


def unknown_stack(name: LayerKey, known: Iterable[str]) -> ConfigError:
    """The error for a key that stands beside the names of stacks and is none."""
    if str(name) == "all" or re.match(r"[0-9:]", str(name)):
        return ConfigError(f"Layer {name!r} cannot stand beside the names of stacks: say it inside its stack.")
    return unknown_name("stack", name, known)


def spread_layers(by_layer: ByLayer, count: int) -> dict[int, AttentionConfig]:
    """The attention of each named layer of a stack of `count` layers."""
    if isinstance(by_layer, AttentionConfig):
        return dict(enumerate(by_layer.for_layers(count)))
    if not isinstance(by_layer, Mapping):
        raise ConfigError(
            f"Expected an AttentionConfig or a mapping from layers to AttentionConfig, got {by_layer!r}."
        )
    if not by_layer:
        raise ConfigError("The mapping from layers to AttentionConfig is empty, so there is nothing to convert.")
    if "kind" in by_layer:
        raise ConfigError(f"Give an AttentionConfig instead of a dict: AttentionConfig.from_dict({dict(by_layer)!r}).")
    chosen: dict[int, tuple[int, AttentionConfig]] = {}
    for key, config in by_layer.items():
        if not isinstance(config, AttentionConfig):
            raise ConfigError(f"Layer {key!r}: expected an AttentionConfig, got {config!r}.")
        rank, layers = read_layers(key, count)
        for layer, one in zip(layers, config.for_layers(len(layers)), strict=True):
            old = chosen.get(layer, (-1, None))[0]
            if old == rank:
                raise ConfigError(f"Layer {layer} is given twice, the second time by {key!r}.")
            if rank > old:
                chosen[layer] = rank, one
    return {layer: config for layer, (_, config) in chosen.items()}


def only(config: AttentionConfig, layers: Sequence[int] | int | str | None) -> ByLayer:
    """One attention for some layers, as a mapping."""
    if layers is None:
        return config
    if isinstance(layers, str | int):
        return {layers: config}
    if not layers:
        raise ConfigError("`layers` is empty, so there is nothing to convert. Leave it out for all layers.")
    return dict(zip(layers, config.for_layers(len(layers)), strict=True))
