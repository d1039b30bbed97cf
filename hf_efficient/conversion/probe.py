"""The smallest forward that reaches every attention of a model: how a conversion finds out whether it worked.

    inputs = tiny_inputs(model)
    check_reached(model, inputs)

A base model is run, not its head, which may want more than attention does.
"""

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.dispatch import ATTACHED
from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.modes import eval_mode
from ..models.registry import is_known, text_config

Inputs = dict[str, Tensor]

TOKENS, NEW_TOKENS, FRAMES = 6, 4, 8  # two lengths, so that cross attention is told from self-attention


def tiny_inputs(model: PreTrainedModel, main_only: bool = False) -> Inputs:
    """Made-up inputs for `model.base_model`: of every kind that its forward takes, or (`main_only`) its main one and
    that of its decoder."""
    names = forward_names(model)
    kinds = [name for name in _MAKERS if name in names]
    if main_only:
        kinds = [name for name in kinds if name in (model.base_model.main_input_name, "decoder_input_ids")]
    inputs = {name: _MAKERS[name](model.config) for name in kinds}
    stacks = Anatomy.of(model).stacks if is_known(model.config) else ()
    if len(stacks) == 1 and stacks[0].cross:  # a decoder without its encoder, whose layers have cross attention
        inputs["encoder_hidden_states"] = _waves(1, TOKENS, stacks[0].width)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """The output of the base model in eval mode, without a cache: decoding does not call a variant as a module."""
    cache = {"use_cache": False} if "use_cache" in forward_names(model) else {}
    with eval_mode(model):
        return model.base_model(**inputs, **cache)


@torch.no_grad()
def run_steps(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The first output `[1, tokens, width]` of the base model token by token from a cache, and that without one.

    None: the model keeps no cache of its text. A mask is left out: all tokens are real.
    """
    names = forward_names(model)
    main = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if main not in inputs or not {"past_key_values", "use_cache"} <= set(names):
        return None
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    whole, steps, cache = run(model, rest)[0], [], None
    ids = rest.pop(main)
    with eval_mode(model):
        for part in ids.split([2] + [1] * (ids.shape[1] - 2), dim=1):  # a prompt of two tokens, then one by one
            output = model.base_model(**rest, **{main: part}, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                return None
            steps.append(output[0])
            if main == "input_ids":  # an image belongs to the prompt, the text of an encoder to every step
                rest = {}
    return torch.cat(steps, 1), whole


def check_reached(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
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
    try:
        run(model, tiny_inputs(model) if inputs is None else inputs)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name, module in variants.items() if module not in reached]
    if missed or not variants:
        raise UnsupportedModelError(
            f"The conversion had no effect on {', '.join(missed) or 'any layer'}: {type(model).__name__} does not "
            "call transformers' attention interface there."
        )


def forward_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the forward of the base model takes; that of a decoder alone passes on whatever its head is given."""
    names = tuple(inspect.signature(model.base_model.forward).parameters)
    return tuple(inspect.signature(model.forward).parameters) if names == ("args", "kwargs") else names


def _waves(*shape: int) -> Tensor:
    """Numbers that are neither equal nor random."""
    return torch.arange(prod(shape), dtype=torch.float32).sin().view(shape)


def _ids(count: int, config: PreTrainedConfig) -> Tensor:
    return torch.arange(3, 3 + count)[None] % text_config(config).vocab_size


def _pixels(config: PreTrainedConfig) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _waves(1, vision.num_channels, height, width)


_MAKERS: dict[str, Callable[[PreTrainedConfig], Tensor]] = {
    "input_ids": lambda config: _ids(TOKENS, config),
    "decoder_input_ids": lambda config: _ids(NEW_TOKENS, config),
    "pixel_values": _pixels,
    # Whisper wants its whole window of sound; wav2vec 2.0 and its kin take samples.
    "input_features": lambda config: _waves(1, config.num_mel_bins, 2 * config.max_source_positions),
    "input_values": lambda config: _waves(1, FRAMES * prod(config.conv_stride) + sum(config.conv_kernel)),
}
