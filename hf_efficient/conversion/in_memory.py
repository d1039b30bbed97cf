"""Convert a model of any family that calls transformers' attention interface: a copy with other attention, in memory.

    model = OPTForCausalLM.from_pretrained(name)
    model = convert_attention(model, {"all": AttentionConfig("local", window=128), "3::4": AttentionConfig()})

A family in the table has efficient classes that save and load again. For all others nothing is known beforehand, so a
tiny forward finds out which modules call the interface (`self_attentions`). Its self-attentions, in the order in which
they are called, are the layers that the keys of a mapping count; cross attention stays as it is. The copy trains,
generates and is measured as any model, but no class could load it from disk: it refuses to be saved.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ..attention.config import MAX_WINDOW, AttentionConfig
from ..attention.dispatch import ATTACHED, NAME, attach, decodes_from_state
from ..attention.registry import ATTENTIONS
from ..errors import UnsupportedModelError, unknown_name
from ..models.checks import check_floats, check_has_weights
from ..models.classes import refuse_switching
from ..models.families import FAMILIES
from .mixing import Mixing, spread_layers
from .probe import Inputs, check_reached
from .self_attentions import (
    SelfAttention,
    calls_interface,
    decodes_alike,
    find_self_attentions,
    first_run,
    use_attention,
)

Chosen = list[tuple[SelfAttention, AttentionConfig]]


def convert_in_memory(model: PreTrainedModel, mixing: Mixing) -> PreTrainedModel:
    """A copy of a model outside the table of families, whose self-attention is computed another way.

    Raises:
        UnsupportedModelError: the model does not call the attention interface, cannot be run with made-up inputs, or
            its attention does something that converted attention has no place for.
        ConfigError: a layer that does not exist.
    """
    if getattr(model.config, "efficient_in_memory", None):
        raise UnsupportedModelError(
            "This model was converted in memory before, and has no way back. Convert the original model instead."
        )
    check_floats(model, "Convert it first and quantise the result.")
    check_has_weights(model)
    converted = copy.deepcopy(model)
    inputs, expected = first_run(converted)
    has_steady_cache = decodes_alike(converted, inputs)  # before anything is changed
    layers, reached = find_self_attentions(converted, inputs, expected)
    names = {module: name for name, module in converted.named_modules()}
    by_place = _choose(mixing, [names[layer.module] for layer in layers])
    if any(config.kind == "merging" for config in by_place.values()):
        raise UnsupportedModelError(
            f"Tokens of {type(converted).__name__} cannot be merged: where its layers begin and end is not known."
        )
    chosen = [(layers[i], config.resolve(layers[i].is_causal)) for i, config in by_place.items()]
    _check_towers(converted, {names[module] for module in reached}, mixing)
    if not chosen:
        return copy.deepcopy(model)
    use_attention(converted, NAME)
    if has_steady_cache:
        _check_cache(converted, chosen, inputs)
    for layer, config in chosen:
        attach(layer.module, config, layer.shape)
        layer.module.get_submodule(ATTACHED).to(layer.like.device, layer.like.dtype).train(layer.module.training)
    check_reached(converted, inputs)
    converted.config.efficient_in_memory = {names[layer.module]: config.to_dict() for layer, config in chosen}
    _seal(converted)
    return converted


def _choose(mixing: Mixing, places: list[str]) -> dict[int, AttentionConfig]:
    """The attention of each self-attention, by its number, without the full ones.

    Parameters:
        mixing: by layers, or by parts of the model: `{"model.language_model": local}`.
        places: the names of the modules.
    """
    parts = _named_parts(mixing, places)
    by_number = {} if parts else spread_layers(mixing, len(places))
    for part, by_layer in parts.items():
        inside = [index for index, place in enumerate(places) if _is_inside(place, part)]
        by_number |= {inside[index]: config for index, config in spread_layers(by_layer, len(inside)).items()}
    return {index: config for index, config in sorted(by_number.items()) if config.kind != "full"}


def _named_parts(mixing: Mixing, places: list[str]) -> dict[str, Any]:
    """The parts of the model whose attention `mixing` names; none where its keys are layers, ConfigError if mixed."""
    keys = mixing if isinstance(mixing, Mapping) else {}
    parts = {key for key in keys if isinstance(key, str) and any(_is_inside(place, key) for place in places)}
    for key in keys if parts else ():
        if key not in parts:
            raise unknown_name("part of the model with self-attention", str(key), {_tower(place) for place in places})
    return {key: keys[key] for key in keys if key in parts}


def _is_inside(place: str, part: str) -> bool:
    return f"{place}.".startswith(f"{part}.")


def _tower(place: str) -> str:
    """`model.vision_tower` of `model.vision_tower.layers.0.self_attn`: what holds the list of layers."""
    names = place.split(".")
    number = next((index for index, name in enumerate(names) if name.isdigit()), len(names))
    return ".".join(names[: max(number - 1, 0)])


def _check_towers(model: PreTrainedModel, reached: set[str], mixing: Mixing) -> None:
    """Refuse to leave a whole stack of layers dense without a word: made-up inputs may hold no image or sound."""
    towers = {_tower(name) for name in reached}
    parts = _named_parts(mixing, list(reached)) or {"": None}
    callers = [name for name, module in model.named_modules() if calls_interface(module)]
    concerned = {_tower(name) for name in callers if any(not part or _is_inside(name, part) for part in parts)}
    if missed := sorted(concerned - towers):
        example = ", ".join(f"{tower!r}: AttentionConfig(...)" for tower in sorted(towers))
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention in {', '.join(missed)} too, which made-up inputs do not reach: it "
            f"would stay dense. Name the part that is to be converted, convert_attention(model, {{{example}}}), or "
            "convert that part of the model alone."
        )


def _check_cache(model: PreTrainedModel, chosen: Chosen, inputs: Inputs) -> None:
    """Refuse a kind if the model decodes otherwise from a cache than without one, with a kind like it that sees all.

    A state belongs to one layer that is called once for each token.
    """
    # Both stand-ins give what full attention gives on a text this short, but keep their cache as kinds like them do.
    with_state, with_keys = AttentionConfig("local", window=MAX_WINDOW, global_tokens=0), AttentionConfig("strided")
    for has_state, stand_in in ((True, with_state), (False, with_keys)):
        concerned = [(layer, config) for layer, config in chosen if ATTENTIONS[config.kind].has_state == has_state]
        handles = [attach(layer.module, stand_in, layer.shape) for layer, _ in concerned]
        is_alike = not concerned or decodes_alike(model, inputs)
        for (layer, _), handle in zip(concerned, handles, strict=True):
            del layer.module._modules[ATTACHED]
            if handle is not None:
                handle.remove()
        if not is_alike:
            often = max(layer.calls for layer, _ in concerned)
            why = f"call attention {often} times in one forward" if often > 1 else "use the keys of other layers"
            kinds = sorted({config.kind for _, config in concerned})
            allowed = ", ".join(kind for kind, variant in ATTENTIONS.items() if not variant.has_state)
            advice = f"Kinds that keep all keys: {allowed}." if has_state else "It cannot be converted."
            raise UnsupportedModelError(
                f"{type(model).__name__} would decode otherwise from a cache than without one with attention of the "
                f"kind {', '.join(kinds)}: its layers {why}, or treat their cache in a way of their own. {advice}"
            )


def _seal(model: PreTrainedModel) -> None:
    """What would lose the conversion without a word is an error."""
    kind = type(model).__name__
    refusals: dict[str, Callable[..., None]] = {
        "save_pretrained": partial(_refuse_saving, kind),
        "push_to_hub": partial(_refuse_saving, kind),
        "set_attn_implementation": partial(refuse_switching, advice="The original model still has its own."),
    }
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for method, refuse in refusals.items():
                setattr(part, method, refuse)
    if decodes_from_state(model):
        model._valid_auto_compile_criteria = _never  # as in `EfficientMixin`


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


def _refuse_saving(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        f"This {kind} was converted in memory: there is no class that could load it again. Save the original model, "
        "and convert it after loading as `model.config.efficient_in_memory` says; the weights are the same names. "
        f"Families whose converted models can be saved: {', '.join(sorted(FAMILIES))}."
    )
