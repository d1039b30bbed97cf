"""Who makes which input of a tiny model: by the name of the parameter.

inputs = make(model, ("input_ids", "pixel_values"), "one", {})
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..registry import text_config
from .sizes import HIDDEN, VOCABULARY

ROWS, TOKENS, NEW_TOKENS, FRAMES = 2, 9, 6, 64  # two lengths of text, so that cross attention is told from others
SAMPLES, PATCHES = 6400, 16
STRIDED = 64  # of an image where no config says it: convolutions make 2 x 2 tokens of it, where 32 gave one alone
Inputs = dict[str, Tensor]
Generator = torch.Generator
Maker = Callable[[PreTrainedConfig, Generator, Inputs], Tensor]
# One image, several of a text (Idefics) or the frames of a video; then others, where an error sounds like it.
IMAGE_FORMS = {
    "one": "",
    "several": "",
    "large": "small|kernel|components|out of range|non-empty",
    "wide": "small|kernel",
    "two": "5D|unpack",
    "unfolded": "expected 5, got 3|input to conv2d",
}
GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hw", "target_sizes")
READ = {  # what stands for what among the tokens of a text
    "pixel_values": "image",
    "image_pixel_values": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "audio_input_features": "audio",
    "input_values": "audio",
}
MAIN = (
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "hidden_states",
    "inputs_embeds",
)


def make(model: PreTrainedModel, names: tuple[str, ...], form: str, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """Inputs of these names.

    Parameters:
        form: of images, one of `IMAGE_FORMS`.
        shapes: of inputs whose shape is known; `"image tokens"`: how many of a text stand for its images.
    """
    parameters, config = inspect.signature(model.forward).parameters, model.config
    generator = torch.Generator().manual_seed(2)
    inputs: Inputs = {}
    for name in sorted(names, key=lambda name: find_maker(name)[0]):  # what others are measured by comes first
        if name in shapes:
            inputs[name] = torch.randn(shapes[name], generator=generator)
        else:
            inputs[name] = find_maker(name)[1](config, generator, inputs)
        if re.fullmatch("(image_)?pixel_values.*", name) and name not in shapes:
            inputs[name] = _image(config, generator, form if name == "pixel_values" or form != "one" else "several")
    grid = next((name for name in GRIDS if name in parameters), None)
    if grid and ("pixel_values" in inputs or "hidden_states" in inputs):
        name = "pixel_values" if "pixel_values" in inputs else "hidden_states"
        made = _patches(config, generator, name, grid, is_unfolded=form == "unfolded")
        inputs |= {key: value for key, value in made.items() if key not in shapes}
    inputs = {name: inputs[name] for name in dict.fromkeys([*names, *inputs])}
    if "input_ids" in inputs:
        for main, kind in READ.items():
            if main in inputs:
                _put_tokens(model, inputs, kind, shapes.get(f"{kind} tokens", (None,))[0])
    return inputs


def find_maker(name: str) -> tuple[int, Maker] | None:
    """The place and the maker of the first rule that fits the name of a parameter."""
    rules = enumerate(_MAKERS)
    return next(((place, maker) for place, (pattern, maker) in rules if re.fullmatch(pattern, name)), None)


def find(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """The field of a config, or of the first config inside it that has one."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    inner = (part for part in vars(config).values() if isinstance(part, PreTrainedConfig))
    return next((found for part in inner if (found := find(part, name, None)) is not None), default)


def _ids(config: PreTrainedConfig, generator: Generator, length: int = TOKENS) -> Tensor:
    try:
        vocabulary = getattr(text_config(config), "vocab_size", None)
    except ValueError:  # there are several
        vocabulary = None
    vocabulary = vocabulary or find(config, "vocab_size", VOCABULARY)
    return torch.randint(3, max(4, min(vocabulary, 90)), (ROWS, length), generator=generator)


def _mask(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, tokens]`: of a text with padding; of the frames of another main input, all of them there."""
    if "input_ids" in inputs or not inputs:
        mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
        mask[0, -3:] = 0
        return mask
    return _feature_mask(config, generator, inputs)


def _feature_mask(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, frames]`, all there."""
    names = ("input_features", "input_values", "past_values", "hidden_states", "inputs_embeds", "latents", "audio_mel")
    main = next((inputs[name] for name in (*names, *inputs) if name in inputs), torch.zeros(ROWS, TOKENS))
    if main.ndim > 2:
        bins = find(config, "num_mel_bins", None)
        time = 2 if main.shape[1] == bins and main.shape[2] != bins else 1
        return torch.ones(ROWS, main.shape[time], dtype=torch.long)
    return torch.ones(main.shape, dtype=torch.long)


def _sound_lengths(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows]`: of how many samples the frames were made."""
    frames = inputs["input_features"].shape[-1] if "input_features" in inputs else FRAMES
    return torch.full((ROWS,), frames * find(config, "hop_length", 160))


def _tile_mask(config: PreTrainedConfig, generator: Generator, inputs: Inputs, *tokens: int) -> Tensor:
    """`[rows, images, tiles]`, or `[rows, tokens, images, tiles]`."""
    return torch.ones(ROWS, *tokens, 1, find(config, "max_num_tiles", 1), dtype=torch.long)


def _image(config: PreTrainedConfig, generator: Generator, form: str = "one") -> Tensor:
    """`[rows, channels, height, width]`, or `[rows, images, ...]`."""
    size = find(config, "image_size", None)
    has_patches = bool(find(config, "patch_size", None))
    size = size or (find(config, "input_size", None) if has_patches else None) or (32 if has_patches else STRIDED)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    height, width = {"large": (128, 128), "wide": (48, 320)}.get(form, (height, width))
    image = torch.randn(ROWS, find(config, "num_channels", 3), height, width, generator=generator)
    if form == "two":
        image = torch.randn(ROWS, image.shape[1], 128, 128, generator=generator)
    if form == "several" and (tiles := find(config, "max_num_tiles", None)):  # of one image
        return image[:, None, None].repeat(1, 1, tiles, 1, 1, 1)
    if form == "several":
        count = find(config, "num_frames", None) or find(config, "frames_per_clip", 1)
        for name, tiles in (("image_grid_pinpoints", 3), ("crop_size", 2)):  # with the whole image, made small
            count = tiles if find(config, name, None) else count
        return image[:, None].repeat(1, count, 1, 1, 1)
    return torch.stack([image, image.flip(-1)], 1) if form == "two" else image


def _bins(config: PreTrainedConfig) -> int:
    """How many numbers a sound has at each time."""
    names = ("num_mel_bins", "input_feat_size", "input_feat_per_channel", "feature_size", "input_size", "n_mels")
    return next((one for name in names if isinstance(one := find(config, name, None), int)), 80)


def _features(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, bins, frames]` of Whisper and its kin."""
    positions = find(config, "max_source_positions", None)
    frames = 2 * positions if positions else FRAMES
    window = 2 * find(config, "n_window", 1)
    frames = -(-frames // window) * window
    return torch.randn(ROWS, _bins(config), frames, generator=generator)


def _samples(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, samples]` of a sound; `[rows, frames, bins]` where the config counts both (AST)."""
    bins, frames = (getattr(config, name, None) for name in ("num_mel_bins", "max_length"))
    shape = (frames, bins) if bins and frames and hasattr(config, "frequency_stride") else (SAMPLES,)
    return torch.randn(ROWS, *shape, generator=generator)


def _states(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    return torch.randn(ROWS, TOKENS, find(config, "hidden_size", HIDDEN), generator=generator)


def _boxes(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, tokens, 4]`: left, top, right, bottom; or four corners."""
    corner = torch.randint(0, 20, (ROWS, TOKENS, 2), generator=generator)
    return torch.cat([corner, corner + 5] * (find(config, "dim_bbox", 4) // 4), -1)


def _numbers(*fields: str) -> Maker:
    """`[rows, tokens, as many as the first of the fields says]`."""

    def numbers(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
        width = next((one for name in fields if (one := find(config, name, None)) is not None), 1)
        return torch.randn(ROWS, TOKENS, width, generator=generator)

    return numbers


def _series(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, time]` or `[rows, time, series]`: as long as the config says, with the lags before it."""
    length = find(config, "context_length", 32) + max(find(config, "lags_sequence", [0]))
    count = find(config, "num_input_channels", None) or find(config, "input_size", 1)
    shape = (length, count) if count > 1 or hasattr(config, "num_input_channels") else (length,)
    return torch.randn(ROWS, *shape, generator=generator).abs()


def _future(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    length, like = find(config, "prediction_length", 4), inputs.get("past_values", torch.zeros(ROWS, 1))
    return torch.randn(ROWS, length, *like.shape[2:], generator=generator).abs()


def _time_features(of: str) -> Maker:
    def features(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
        length = inputs[of].shape[1] if of in inputs else find(config, "prediction_length", 4)
        return torch.randn(ROWS, length, find(config, "num_time_features", 1), generator=generator)

    return features


def _side(count: int) -> int:
    return max(side for side in range(1, count + 1) if count % side == 0 and side * side <= count)


def _grid(kind: str) -> Maker:
    """The numbers of rows and columns `[rows, 2]` of images given as patches, the mask of those or their places."""

    def grid(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
        pixels = inputs.get("pixel_values")
        count = pixels.shape[1] if pixels is not None and pixels.ndim == 3 else TOKENS
        height = _side(count)
        if kind == "mask" and pixels is not None and pixels.ndim == 5:  # which images are there
            return torch.ones(pixels.shape[:2], dtype=torch.bool)
        if kind == "mask":
            return torch.ones(ROWS, count, dtype=torch.long)
        if kind == "places":
            place = torch.arange(count)
            return torch.stack([place % (count // height), place // (count // height)], -1).repeat(ROWS, 1, 1)
        if kind == "pixels":
            return torch.tensor([pixels.shape[-2:] if pixels is not None else (32, 32)] * ROWS)
        return torch.tensor([[height, count // height]] * ROWS)

    return grid


def _flattened(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, patches, 2 + numbers]`: row, column, then the numbers of a patch (Pix2Struct)."""
    vision = getattr(config, "vision_config", config)
    numbers = find(vision, "patch_embed_hidden_size", None) or 3 * find(vision, "patch_size", 8) ** 2
    place = torch.arange(1, TOKENS + 1).repeat(ROWS, 1)[..., None].float()
    return torch.cat([place, place, torch.randn(ROWS, TOKENS, numbers, generator=generator)], -1)


def _pooled(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[tokens, 4]`: of which patches of all images each of the 2 x 2 tokens of an image is made."""
    return torch.arange(ROWS * PATCHES).view(ROWS * 4, -1)


def _seen_images(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, tokens, images]`: each token sees all; or `[rows, images, height, width]`: all patches are there."""
    if "image_pixel_values" in inputs:
        pixels, size = inputs["image_pixel_values"], find(config, "patch_size", 8)
        return torch.ones(*pixels.shape[:2], pixels.shape[-2] // size, pixels.shape[-1] // size, dtype=torch.long)
    images = inputs["pixel_values"].shape[1] if "pixel_values" in inputs else 1
    return torch.ones(ROWS, TOKENS, images, dtype=torch.long)


def _places(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, tokens]`: the first tokens stand for what is seen in an image."""
    return (torch.arange(TOKENS) < find(config, "latent_query_num", 1)).long().repeat(ROWS, 1)


def _new_ids(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
    """`[rows, tokens]`; for a decoder of sounds with several codes at a time `[rows, tokens, channels]` (Dia), or as
    many rows for each (Musicgen)."""
    channels = getattr(getattr(config, "decoder_config", None), "num_channels", None)
    ids = _ids(config, generator, NEW_TOKENS)
    codes = getattr(getattr(config, "decoder", None), "num_codebooks", 1)
    return ids[..., None].repeat(1, 1, channels) if channels else ids.repeat(codes, 1)


def _same(of: str, value: float) -> Maker:
    def same(config: PreTrainedConfig, generator: Generator, inputs: Inputs) -> Tensor:
        return torch.full_like(inputs[of], value) if of in inputs else torch.full((ROWS, TOKENS), value)

    return same


# The first pattern that fits the name of a parameter says who makes it, and the order who comes first.
_MAKERS: tuple[tuple[str, Maker], ...] = (
    ("decoder_input_ids", _new_ids),
    ("input_ids|.*_input_ids|text_inputs", lambda config, generator, inputs: _ids(config, generator)),
    ("task_inputs", lambda config, generator, inputs: _ids(config, generator, find(config, "task_seq_len", TOKENS))),
    ("(.*_)?pixel_values.*|prompt_masks", lambda config, generator, inputs: _image(config, generator)),
    ("(audio_)?input_features", _features),
    ("audio_mel", lambda config, generator, inputs: _features(config, generator, inputs).transpose(1, 2)),
    ("input_values", _samples),
    ("past_values", _series),
    ("flattened_patches", _flattened),
    ("decoder_input_values", _numbers("num_mel_bins")),
    ("inputs", _numbers("d_model")),
    ("latents|hidden_states|.*_hidden_states|inputs_embeds|.*_embeds", _states),
    ("states", _numbers("state_dim")),
    ("actions", _numbers("act_dim")),
    ("rewards|returns_to_go", _numbers()),
    ("timesteps", lambda config, generator, inputs: torch.arange(TOKENS).repeat(ROWS, 1)),
    ("visual_feats", _numbers("visual_feat_dim")),
    ("visual_pos", lambda config, generator, inputs: torch.rand(ROWS, TOKENS, 4, generator=generator)),
    ("noise_sequence", _numbers("model_in_channels")),
    (
        "speaker_embeddings",
        lambda config, generator, inputs: torch.randn(ROWS, find(config, "speaker_embedding_dim", 32)),
    ),
    ("attention_mask", _mask),
    ("past_time_features", _time_features("past_values")),
    ("future_values", _future),
    ("future_time_features", _time_features("future_values")),
    ("past_values_padding", _same("past_values", 0)),
    (".*observed_mask", _same("past_values", 1)),
    ("image_attention_mask", _seen_images),
    ("pixel_attention_mask", _grid("mask")),
    ("pixel_position_ids|image_position_ids", _grid("places")),
    ("spatial_shapes|target_sizes", _grid("sides")),
    ("image_sizes", _grid("pixels")),
    ("chunk_sample_lengths", _sound_lengths),
    ("audio_embed_sizes", lambda config, generator, inputs: torch.full((ROWS,), 4)),
    ("image_token_pooling", _pooled),
    ("image_grids", lambda config, generator, inputs: torch.tensor([[2, 2, 0, 0]] * ROWS)),
    ("aspect_ratio_ids", lambda config, generator, inputs: torch.ones(ROWS, 1, dtype=torch.long)),
    ("aspect_ratio_mask", _tile_mask),
    ("(.*_)?merge_sizes", lambda config, generator, inputs: torch.ones(ROWS, dtype=torch.long)),
    ("bbox", _boxes),
    ("freq", lambda config, generator, inputs: torch.zeros(ROWS, 1, dtype=torch.long)),
    ("prompt_ids|lang_ids", lambda config, generator, inputs: torch.zeros(ROWS, dtype=torch.long)),
    ("image_embeds_position_mask", _places),
    ("cross_attention_mask", lambda config, generator, inputs: _tile_mask(config, generator, inputs, TOKENS)),
    (".*token_type_ids", _same("input_ids", 0)),
    (".*_attention_mask|.*_features_mask|padding_mask", _feature_mask),
    ("audio_mel_mask", lambda config, generator, inputs: _feature_mask(config, generator, inputs) == 0),
)


def _patches(
    config: PreTrainedConfig, generator: Generator, name: str, grid: str, is_unfolded: bool = False
) -> Inputs:
    """Images as Qwen's models and their kin read them: patches of all images one after another, and their grids; for
    MiniCPM side by side in one image."""
    vision = getattr(config, "vision_config", config)
    rows = columns = 2 * (getattr(vision, "spatial_merge_size", None) or 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    size = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    numbers = channels * (getattr(vision, "temporal_patch_size", None) or 1) * size**2
    sides = [1, rows, columns] if grid.endswith("thw") else [rows, columns]
    patches = torch.randn(ROWS * rows * columns, numbers, generator=generator)
    if grid == "target_sizes":
        patches = patches.view(1, channels, size, -1)
    return {
        name: patches.view(-1, channels, size, numbers // channels // size) if is_unfolded else patches,
        grid: torch.tensor([sides] * ROWS),
    }


def _put_tokens(model: PreTrainedModel, inputs: Inputs, kind: str, count: int | None) -> None:
    """A model that reads images or sounds among its tokens wants as many tokens as it makes of one."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    token = next((one for name in names if isinstance(one := find(model.config, name, None), int)), None)
    if token is None or (inputs["input_ids"] == token).any():
        return
    count = _count(model, inputs, kind) if count is None else count
    tokens = torch.full((ROWS, count), token)
    inputs["input_ids"] = torch.cat([tokens, inputs["input_ids"]], 1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.cat([torch.ones_like(tokens), inputs["attention_mask"]], 1)
    if (seen := inputs.get("cross_attention_mask")) is not None:
        inputs["cross_attention_mask"] = torch.cat([seen[:, :1].expand(-1, count, -1, -1), seen], 1)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()


def _count(model: PreTrainedModel, inputs: Inputs, kind: str) -> int:
    """How many tokens a model makes of what belongs to one text; 2 where it cannot be asked: an error says more."""
    get = getattr(model, f"get_{kind}_features", None)
    if get is None:
        return 2
    taken = inspect.signature(get).parameters
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if name in taken and name not in MAIN[:3]
    }
    try:
        with torch.no_grad():
            features = get(**given)
        if not isinstance(features, Tensor | list | tuple):
            features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
        parts = features if isinstance(features, list | tuple) else [features]
        return sum(part.shape[:-1].numel() for part in parts) // ROWS
    except Exception:  # whatever the code of a model may raise: the model raises it too, and then it is mended
        return 2
