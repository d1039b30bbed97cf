"""Convert a model of any family that calls transformers' attention interface: a copy with other attention, in memory.

    model = OPTForCausalLM.from_pretrained(name)
    model = convert_attention(model, {"all": AttentionConfig("local", window=128), "3::4": AttentionConfig()})

A family in the table has efficient classes that save and load again. For all others nothing is known beforehand, so a
tiny forward finds out which modules call the interface. Its self-attentions, in the order in which they are called,
are the layers that the keys of a mapping count; cross attention stays as it is. The copy trains, generates and is
measured as any model, but no class could load it from disk: it refuses to be saved.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..attention.config import MAX_WINDOW, AttentionConfig
from ..attention.dispatch import ATTACHED, NAME, attach, decodes_from_state, efficient_attention_forward
from ..attention.masks import key_mask
from ..attention.registry import ATTENTIONS
from ..attention.variant import HeadShape
from ..errors import UnsupportedModelError, unknown_name
from ..models.checks import check_floats, check_has_weights
from ..models.classes import refuse_switching
from ..models.families import FAMILIES
from ..models.interface import changed_interface
from .mixing import Mixing, spread_layers
from .probe import Inputs, check_reached, forward_names, run, run_steps, tiny_inputs

PROBE = f"{NAME}_probe"
TOLERANCE = 1e-3  # of the largest output; half precision: 50 times that


class _Layer(NamedTuple):
    """A module that computes self-attention, its heads, a query for the device and dtype that it works with, how often
    one forward calls it, and whether it sees all tokens so far and no later ones."""

    module: nn.Module
    shape: HeadShape
    like: Tensor
    calls: int
    is_causal: bool


def convert_in_memory(model: PreTrainedModel, asked: Mixing) -> PreTrainedModel:
    """A copy of a model outside the table of families, whose self-attention is computed another way.

    Raises:
        UnsupportedModelError: the model does not call the attention interface, cannot be run with made-up inputs, or
            its attention does something that converted attention has no place for.
        ConfigError: a layer that does not exist.
    """
    _check(model)
    made = copy.deepcopy(model)
    inputs, expected = _first_run(made)
    has_steady_cache = _decodes_alike(made, inputs)
    layers, reached = _self_attentions(made, inputs, expected)
    names = {module: name for name, module in made.named_modules()}
    places = [names[layer.module] for layer in layers]
    chosen = {index: config.resolve(layers[index].is_causal) for index, config in _choose(asked, places).items()}
    _check_towers(made, {names[module] for module in reached}, asked)
    if not chosen:
        return copy.deepcopy(model)
    _use(made, NAME)
    if has_steady_cache:
        _check_cache(made, [(layers[index], config) for index, config in chosen.items()], inputs)
    for index, config in chosen.items():
        module, shape, like, *_ = layers[index]
        attach(module, config, shape)
        module.get_submodule(ATTACHED).to(like.device, like.dtype).train(module.training)
    check_reached(made, inputs)
    made.config.efficient_in_memory = {places[i]: config.to_dict() for i, config in chosen.items()}
    _seal(made)
    return made


def _choose(asked: Mixing, places: list[str]) -> dict[int, AttentionConfig]:
    """The attention of each self-attention, by its number, without the full ones.

    Parameters:
        asked: by layers, or by parts of the model: `{"model.language_model": local}`.
        places: the names of the modules.
    """
    parts = _named_parts(asked, places)
    if not parts:
        spread = spread_layers(asked, len(places))
    else:
        spread = {}
        for part, given in parts.items():
            inside = [index for index, place in enumerate(places) if _is_inside(place, part)]
            spread |= {inside[index]: config for index, config in spread_layers(given, len(inside)).items()}
    return {index: spread[index] for index in sorted(spread) if spread[index].kind != "full"}


def _named_parts(asked: Mixing, places: list[str]) -> dict[str, Any]:
    """The parts of the model that are asked for by name; none if its layers are.

    Raises:
        ConfigError: a name beside others that is none of a part with self-attention.
    """
    if not isinstance(asked, Mapping):
        return {}
    found = {key for key in asked if isinstance(key, str) and any(_is_inside(place, key) for place in places)}
    for key in asked if found else ():
        if key not in found:
            raise unknown_name("part of the model with self-attention", str(key), {_tower(place) for place in places})
    return {key: asked[key] for key in asked if key in found}


def _is_inside(place: str, part: str) -> bool:
    return f"{place}.".startswith(f"{part}.")


def _tower(place: str) -> str:
    """`model.vision_tower` of `model.vision_tower.layers.0.self_attn`: what holds the list of layers."""
    names = place.split(".")
    number = next((index for index, name in enumerate(names) if name.isdigit()), len(names))
    return ".".join(names[: max(number - 1, 0)])


def _check_towers(model: PreTrainedModel, reached: set[str], asked: Mixing) -> None:
    """Refuse to leave a whole stack of layers dense without a word: made-up inputs may hold no image or sound."""
    reached_towers = {_tower(name) for name in reached}
    parts = _named_parts(asked, list(reached)) or {"": None}
    missed = sorted(
        {
            _tower(name)
            for name, module in model.named_modules()
            if _calls_interface(module) and any(not part or _is_inside(name, part) for part in parts)
        }
        - reached_towers
    )
    if missed:
        example = ", ".join(f"{tower!r}: AttentionConfig(...)" for tower in sorted(reached_towers))
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention in {', '.join(missed)} too, which made-up inputs do not reach: it "
            f"would stay dense. Name the part that is to be converted, convert_attention(model, {{{example}}}), or "
            "convert that part of the model alone."
        )


def _calls_interface(module: nn.Module) -> bool:
    """Its forward looks up transformers' attention functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _decodes_alike(model: PreTrainedModel, inputs: Inputs) -> bool:
    """True if the model gives the same token by token from a cache; False where it fails, or has none."""
    try:
        outputs = run_steps(model, inputs)
        return outputs is not None and _is_close(*outputs, None)
    except Exception:  # whatever the code of a model may raise that wants more than tokens
        return False


def _check_cache(model: PreTrainedModel, chosen: list[tuple[_Layer, AttentionConfig]], inputs: Inputs) -> None:
    """Refuse a kind if the model decodes otherwise from a cache than without one, with a kind like it that sees all.

    A state belongs to one layer that is called once for each token.
    """
    wide = AttentionConfig("local", window=MAX_WINDOW, global_tokens=0)
    for has_state in (True, False):
        concerned = [(layer, config) for layer, config in chosen if ATTENTIONS[config.kind].has_state == has_state]
        stand_in = wide if has_state else AttentionConfig("strided")
        handles = [attach(layer.module, stand_in, layer.shape) for layer, _ in concerned]
        alike = not concerned or _decodes_alike(model, inputs)
        for (layer, _), handle in zip(concerned, handles, strict=True):
            del layer.module._modules[ATTACHED]
            if handle is not None:
                handle.remove()
        if not alike:
            often = max(layer.calls for layer, _ in concerned)
            why = f"call attention {often} times in one forward" if often > 1 else "use the keys of other layers"
            kinds = sorted({config.kind for _, config in concerned})
            allowed = ", ".join(kind for kind, variant in ATTENTIONS.items() if not variant.has_state)
            advice = f"Kinds that keep all keys: {allowed}." if has_state else "It cannot be converted."
            raise UnsupportedModelError(
                f"{type(model).__name__} would decode otherwise from a cache than without one with attention of the "
                f"kind {', '.join(kinds)}: its layers {why}, or treat their cache in a way of their own. {advice}"
            )


def _check(model: PreTrainedModel) -> None:
    if getattr(model.config, "efficient_in_memory", None):
        raise UnsupportedModelError(
            "This model was converted in memory before, and has no way back. Convert the original model instead."
        )
    check_floats(model, "Convert it first and quantise the result.")
    check_has_weights(model)


@dataclass
class _Recorder:
    """The attention and mask functions of one forward, which write down who calls them with what.

    A mask with a `local_size` belongs to a window or a chunk, of which attention must be told as well.
    """

    layers: dict[nn.Module, _Layer] = field(default_factory=dict)
    crossed: set[nn.Module] = field(default_factory=set)
    masks_are_local: bool = False
    knows_window: bool = False
    is_biased: bool = False

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        shape = HeadShape(query.shape[1], key.shape[1], query.shape[3])
        calls = self.layers[module].calls + 1 if module in self.layers else 1
        causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
        has_window = kwargs.get("sliding_window") is not None
        self.layers[module] = _Layer(module, shape, query.detach(), calls, causal and not has_window)
        if query.shape[2] != key.shape[2] or getattr(module, "is_cross_attention", False):
            self.crossed.add(module)
        self.knows_window |= kwargs.get("sliding_window") is not None
        self.is_biased |= kwargs.get("position_bias") is not None
        return efficient_attention_forward(module, query, key, value, mask, **kwargs)

    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self.masks_are_local |= kwargs.get("local_size") is not None
        return key_mask(*args, **kwargs)


def _first_run(model: PreTrainedModel) -> tuple[Inputs, Any]:
    """Inputs that the base model runs with, and its stock output for them."""
    problem: Exception | None = None
    for main_only in (True, False):
        try:
            inputs = tiny_inputs(model, main_only)
            if "input_ids" in inputs and "attention_mask" in forward_names(model):
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][:, 1] = 0  # what loses its padding must show; the first may be what is pooled
            return inputs, run(model, inputs)
        except Exception as error:
            problem = error
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be run with made-up inputs, so its attention cannot be found: {problem}"
    ) from problem


def _self_attentions(model: PreTrainedModel, inputs: Inputs, expected: Any) -> tuple[list[_Layer], set[nn.Module]]:
    """The modules that compute self-attention through the interface, in the order in which they are called; and all
    that call it."""
    recorder, name = _Recorder(), type(model).__name__
    try:
        with changed_interface() as functions:
            functions[PROBE] = recorder.attend
            AttentionMaskInterface.register(PROBE, recorder.mask)  # what makes masks asks for those registered only
            _use(model, PROBE)
            output = run(model, inputs)
        layers = [layer for module, layer in recorder.layers.items() if module not in recorder.crossed]
        reached = set(recorder.layers)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} does not run with converted attention, most likely because its masks are more than padding and "
            f"causality. Models of this family cannot be converted. ({error})"
        ) from error
    finally:
        recorder.layers, recorder.crossed = {}, set()  # the register keeps the recorder, not the model
    if not layers:
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface, so there is nothing to convert (as DeBERTa, "
            "MPNet, BLOOM, Longformer and others)."
        )
    is_lost = recorder.is_biased or (recorder.masks_are_local and not recorder.knows_window)
    unlike = None if is_lost else _find_unlike(output, expected, inputs.get("attention_mask"))
    if is_lost or unlike is not None:
        raise UnsupportedModelError(
            f"The attention of {name} is more than softmax over the keys that are not padding: converted attention "
            f"has no place for its bias or its mask{f' ({unlike} would change)' if unlike else ''}. Models of this "
            "family cannot be converted."
        )
    return layers, reached


def _find_unlike(output: Any, expected: Any, mask: Tensor | None) -> str | None:
    """The name of a tensor of the output that is not as expected; None: all are."""
    got, wanted = _tensors(output), _tensors(expected)
    for name, tensor in wanted.items():
        other = got.get(name)
        if other is None or other.shape != tensor.shape or not _is_close(other, tensor, mask):
            return name
    return None


def _tensors(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The floating-point tensors of an output, however deep they lie, by their names."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.numel() else {}
    pairs: Iterable = output.items() if isinstance(output, Mapping) else ()
    if isinstance(output, list | tuple):
        pairs = enumerate(output)
    found = {}
    for key, value in pairs:
        found |= _tensors(value, str(key) if name == "output" else f"{name}.{key}")
    return found


def _is_close(output: Tensor, expected: Tensor, mask: Tensor | None) -> bool:
    """Equal to rounding, at the tokens that are not padding and where a number is expected."""
    if mask is not None and mask.shape == expected.shape[:2]:
        output, expected = output[mask.bool()], expected[mask.bool()]
    dtype, finite = expected.dtype, expected.isfinite()
    if not finite.any():
        return True
    output, expected = output[finite].double(), expected[finite].double()
    tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else 50 * TOLERANCE
    return bool((output - expected).abs().max() <= tolerance * expected.abs().max())


def _use(model: PreTrainedModel, name: str) -> None:
    """Set the attention function in every config that a module reads it from: some models copy theirs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


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
