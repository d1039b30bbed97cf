"""Convert a model of any family that calls transformers' attention interface: a copy with other attention, in memory.

    model = OPTForCausalLM.from_pretrained(name)
    model = convert_attention(model, {"all": AttentionConfig("local", window=128), "3::4": AttentionConfig()})

A family in the table has efficient classes that save and load again. For all others nothing is known beforehand, so a
tiny forward finds out which modules call the interface. Its self-attentions, in the order in which they are called,
are the layers that the keys of a mapping count; cross attention stays as it is. The copy trains, generates and is
measured as any model, but no class could load it from disk: it refuses to be saved.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..families import FAMILIES
from ..quantization import check_floats
from .dispatch import ATTACHED, NAME, attach, decodes_from_state, efficient_attention_forward
from .masks import key_mask
from .mixing import Mixing, spread_layers
from .probe import Inputs, check_reached, forward_names, run, tiny_inputs
from .variant import HeadShape

PROBE = f"{NAME}_probe"
TOLERANCE = 1e-3  # of the largest output; half precision: 50 times that
_PROBING = threading.Lock()  # the registers are global: one probe at a time


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
    layers = _self_attentions(made, inputs, expected)
    spread = spread_layers(asked, len(layers))
    chosen = {index: spread[index] for index in sorted(spread) if spread[index].kind != "full"}
    if not chosen:
        return copy.deepcopy(model)
    names = {module: name for name, module in made.named_modules()}
    for index, config in chosen.items():
        module, shape, like = layers[index]
        attach(module, config, shape)
        module.get_submodule(ATTACHED).to(like.device, like.dtype).train(module.training)
    _use(made, NAME)
    check_reached(made, inputs)
    made.config.efficient_in_memory = {names[layers[i].module]: config.to_dict() for i, config in chosen.items()}
    _seal(made)
    return made


def _check(model: PreTrainedModel) -> None:
    if getattr(model.config, "efficient_in_memory", None):
        raise UnsupportedModelError(
            "This model was converted in memory before, and has no way back. Convert the original model instead."
        )
    check_floats(model, "Convert it first and quantise the result.")
    if model.device.type == "meta":
        raise UnsupportedModelError(
            f"{model.config.model_type} models are not in the table of families, so it takes a forward to find their "
            "attention, and this one has no weights (meta device). Load it first."
        )


class _Layer(NamedTuple):
    """A module that computes self-attention, its heads, and a query for the device and dtype that it works with."""

    module: nn.Module
    shape: HeadShape
    like: Tensor


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
        self.layers.setdefault(module, _Layer(module, shape, query.detach()))
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
                inputs["attention_mask"][:, 0] = 0  # an attention that loses its padding must show
            return inputs, run(model, inputs)
        except Exception as error:
            problem = error
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be run with made-up inputs, so its attention cannot be found: {problem}"
    ) from problem


def _self_attentions(model: PreTrainedModel, inputs: Inputs, expected: Any) -> list[_Layer]:
    """The modules that compute self-attention through the interface, in the order in which they are called."""
    recorder, name = _Recorder(), type(model).__name__
    try:
        with _PROBING:
            AttentionInterface.register(PROBE, recorder.attend)
            AttentionMaskInterface.register(PROBE, recorder.mask)
            _use(model, PROBE)
            output = run(model, inputs)
        layers = [layer for module, layer in recorder.layers.items() if module not in recorder.crossed]
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} does not run with converted attention, most likely because its masks are more than padding and "
            f"causality. Models of this family cannot be converted. ({error})"
        ) from error
    finally:
        recorder.layers, recorder.crossed = {}, set()  # the registers keep the recorder, not the model
    if not layers:
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface, so there is nothing to convert (as DeBERTa, "
            "MPNet, BLOOM, Longformer and others)."
        )
    is_lost = recorder.is_biased or (recorder.masks_are_local and not recorder.knows_window)
    if is_lost or not _is_close(output[0], expected[0], inputs.get("attention_mask")):
        raise UnsupportedModelError(
            f"The attention of {name} is more than softmax over the keys that are not padding: converted attention "
            "has no place for its bias or its mask. Models of this family cannot be converted."
        )
    return layers


def _is_close(output: Tensor, expected: Tensor, mask: Tensor | None) -> bool:
    """Equal to rounding, at the tokens that are not padding."""
    if mask is not None and mask.shape == expected.shape[:2]:
        output, expected = output[mask.bool()], expected[mask.bool()]
    tolerance = TOLERANCE if expected.dtype in (torch.float32, torch.float64) else 50 * TOLERANCE
    error = (output.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())


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
        "save_pretrained": _refuse_saving,
        "push_to_hub": _refuse_saving,
        "set_attn_implementation": _refuse_switching,
    }
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for method, refuse in refusals.items():
                setattr(part, method, partial(refuse, kind))
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


def _refuse_switching(kind: str, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise UnsupportedModelError(
            f"The attention of this {kind} was converted, so attn_implementation={attn_implementation!r} cannot be "
            "set. The original model still has its own."
        )
