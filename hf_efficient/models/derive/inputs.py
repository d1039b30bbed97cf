"""Inputs for a tiny model of any sort, made by rule: texts, images, videos, sounds, alone or together.

model(**tiny_inputs(model))
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from .tiny import HIDDEN, VOCABULARY

ROWS, TOKENS, NEW_TOKENS, FRAMES = 2, 9, 6, 64  # two lengths of text, so that cross attention is told from others
Inputs = dict[str, Tensor]


def tiny_inputs(model: PreTrainedModel) -> Inputs:
    """Inputs with which a tiny model runs: two texts, one of them padded, images, sounds; the most that it takes.

    Raises:
        UnsupportedModelError: it runs with none of them.
    """
    problem: Exception | None = None
    for inputs in _attempts(model):
        try:
            made = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
                for name, value in inputs().items()
            }
            with torch.no_grad():
                model(**{name: value.clone() for name, value in made.items()})
            return made
        except Exception as error:  # whatever the code of a model may raise
            problem = problem or error
    reason = problem or f"it takes {', '.join(inspect.signature(model.forward).parameters)}"
    raise UnsupportedModelError(f"No inputs could be made for a tiny {type(model).__name__}: {reason}")


def _attempts(model: PreTrainedModel) -> Iterator[Callable[[], Inputs]]:
    """The richest first: all that the forward takes, each main input with what belongs to it, then hidden states."""
    names = inspect.signature(model.forward).parameters
    known = [name for name in _MAKERS if name in names]
    text = [name for name in known if name in ("input_ids", "attention_mask", "decoder_input_ids")]
    others = [name for name in known if name not in (*text, "hidden_states", "inputs_embeds")]
    main = [name for name in known if name in (model.main_input_name, "decoder_input_ids")]
    tried: set[tuple] = set()
    for chosen in ([*text, *others], [*others, *main], others, main, text, ["hidden_states"], ["inputs_embeds"]):
        chosen = tuple(dict.fromkeys(name for name in chosen if name in known))
        for form in _IMAGES if "pixel_values" in chosen else (_image,):
            if chosen and (chosen, form) not in tried:
                tried.add((chosen, form))
                yield lambda chosen=chosen, form=form: _made(model, chosen, form)


def _made(model: PreTrainedModel, chosen: tuple[str, ...], form: Callable[..., Tensor]) -> Inputs:
    names, config = inspect.signature(model.forward).parameters, model.config
    generator = torch.Generator().manual_seed(2)
    inputs = {name: _MAKERS[name](config, generator) for name in chosen}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = form(config, generator)
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in names), None)
    if grid and ("pixel_values" in inputs or "hidden_states" in inputs):
        inputs |= _patches(config, generator, "pixel_values" if "pixel_values" in inputs else "hidden_states", grid)
    if "pixel_values" in inputs and "input_ids" in inputs:
        _put_image_tokens(model, inputs)
    return inputs


def _ids(config: PreTrainedConfig, generator: torch.Generator, length: int = TOKENS) -> Tensor:
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
    return torch.randint(3, min(vocabulary, 90), (ROWS, length), generator=generator)


def _padding(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def _image(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    """`[rows, channels, height, width]`."""
    size = _find(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(ROWS, _find(config, "num_channels", 3), height, width, generator=generator)


def _images(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    """One of several images of a text (Idefics), or the frames of a video."""
    return _image(config, generator)[:, None].repeat(1, _find(config, "num_frames", 1), 1, 1, 1)


_IMAGES = (_image, _images)


def _features(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    """`[rows, bins, frames]` of Whisper and its kin."""
    frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else FRAMES
    return torch.randn(ROWS, _find(config, "num_mel_bins", 80), frames, generator=generator)


def _samples(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    """`[rows, samples]` of a sound; `[rows, frames, bins]` where the config counts both (AST)."""
    bins, frames = (getattr(config, name, None) for name in ("num_mel_bins", "max_length"))
    shape = (frames, bins) if bins and frames and hasattr(config, "frequency_stride") else (6400,)
    return torch.randn(ROWS, *shape, generator=generator)


def _states(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, TOKENS, HIDDEN, generator=generator)


_MAKERS: dict[str, Callable[[PreTrainedConfig, torch.Generator], Tensor]] = {
    "input_ids": _ids,
    "attention_mask": _padding,
    "decoder_input_ids": lambda config, generator: _ids(config, generator, NEW_TOKENS),
    "pixel_values": _image,
    "input_features": _features,
    "input_values": _samples,
    "hidden_states": _states,
    "inputs_embeds": _states,
}


def _find(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """The field of a config, or of the first config inside it that has one."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    inner = (part for part in vars(config).values() if isinstance(part, PreTrainedConfig))
    return next((found for part in inner if (found := _find(part, name, None)) is not None), default)


def _patches(config: PreTrainedConfig, generator: torch.Generator, name: str, grid: str) -> Inputs:
    """Images as Qwen's models and their kin read them: patches of all images one after another, and their grids."""
    vision = getattr(config, "vision_config", config)
    rows = columns = 2 * getattr(vision, "spatial_merge_size", 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    numbers = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {
        name: torch.randn(ROWS * rows * columns, numbers, generator=generator),
        grid: torch.tensor([[1, rows, columns]] * ROWS),
    }


def _put_image_tokens(model: PreTrainedModel, inputs: Inputs) -> None:
    """A model that reads images among its tokens wants as many image tokens as it makes of an image."""
    token = next((getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")), None)
    if token is None or not hasattr(model, "get_image_features"):
        return
    images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        features = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    count = sum(part.shape[:-1].numel() for part in parts) // ROWS
    tokens = torch.full((ROWS, count), token)
    inputs["input_ids"] = torch.cat([tokens, inputs["input_ids"]], 1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.cat([torch.ones_like(tokens), inputs["attention_mask"]], 1)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
