"""Random inputs of a wanted size for any model that takes tokens, pixels or sound, and a check of others.

dummy_inputs(model, batch_size=1, sequence_length=512)     # {"input_ids": [1, 512], "attention_mask": [1, 512]}
"""

import inspect
import math

import torch

from ..errors import ConfigError, DataError, UnsupportedModelError, check_positive
from .registry import text_config, token_limit

MAX_NUMBERS = 1 << 31  # of one input
SAMPLES = 16_000  # a second of sound, for models that read it as it is

# These heads shift `input_ids` into the decoder themselves.
_OWN_DECODER_INPUT = ("ForSequenceClassification", "ForQuestionAnswering")


def dummy_inputs(
    model: torch.nn.Module, batch_size: int = 1, sequence_length: int = 512, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs for `model(**inputs)` on the model's device: the same for the same seed and config.

    Tokens: random ordinary ids `[batch_size, sequence_length]`, nothing padded; encoders, decoders (prefill) and
    encoder-decoders alike read all of them. An encoder-decoder gets one decoder token, so what is timed is reading the
    input and making the first output token. Images: `[batch_size, channels, height, width]` of the config's
    `image_size`, and sound `[batch_size, num_mel_bins, frames]` of the length that the model is made for, or a second
    of samples; `sequence_length` has no meaning for them. A model that takes texts and images gets both: CLIP apart,
    LLaVA the tokens of the image in front of those of the text.

    Raises:
        ConfigError: a size below 1, more tokens than the model has positions for, or more numbers than 2**31.
        UnsupportedModelError: the model's main input is something else.
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        check_positive(name, value)
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_ids":
        inputs = _tokens(model, batch_size, sequence_length, generator)
        if "pixel_values" in inspect.signature(model.forward).parameters:
            inputs |= _pixels(model, batch_size, generator)
            _put_image_tokens(model, inputs)
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(batch_size, SAMPLES, generator=generator).to(model.dtype)}
        _check_numbers(batch_size, SAMPLES)
    elif model.main_input_name == "pixel_values":
        inputs = _pixels(model, batch_size, generator)
    elif model.main_input_name == "input_features":
        inputs = _sound(model, batch_size, generator)
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {model.main_input_name!r}; dummy inputs are made for 'input_ids', "
            "'pixel_values', 'input_features' and 'input_values'. Time it with compare_latency and inputs of your own."
        )
    device = next(model.parameters()).device
    if device.type == "meta":
        inputs.pop("attention_mask", None)  # transformers looks at its values, and a meta tensor has none
    return {name: value.to(device) for name, value in inputs.items()}


def _tokens(model, batch_size: int, sequence_length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = text_config(model.config)
    fields = config.to_dict()  # not each family has each of the fields below: T5 has no first token
    limit = token_limit(model.config)
    if limit is not None and sequence_length > limit:
        raise ConfigError(
            f"sequence_length={sequence_length}, but {type(model).__name__} has {limit} positions. "
            f"Use at most {limit}, or a model extended to longer inputs."
        )
    _check_numbers(batch_size, sequence_length)
    ends = fields.get("eos_token_id")
    special = {fields.get("pad_token_id"), fields.get("bos_token_id"), *(ends if isinstance(ends, list) else [ends])}
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    choice = torch.randint(0, len(ordinary), (batch_size, sequence_length), generator=generator)
    inputs = {
        "input_ids": ordinary[choice],
        "attention_mask": torch.ones(batch_size, sequence_length, dtype=torch.long),
    }
    if config.is_encoder_decoder:
        inputs["input_ids"][:, -1] = config.eos_token_id  # BART's classifier reads the state at the end token
        names = inspect.signature(model.forward).parameters
        if "decoder_input_ids" in names and not type(model).__name__.endswith(_OWN_DECODER_INPUT):
            inputs["decoder_input_ids"] = torch.full((batch_size, 1), config.decoder_start_token_id)
    return inputs


def image_token(config) -> int | None:
    """The token in whose place an image is read; None: images are read apart, or not at all."""
    return next(
        (getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name)), None
    )


def _put_image_tokens(model, inputs: dict[str, torch.Tensor]) -> None:
    """A model that reads images among its tokens (LLaVA) wants as many image tokens as it makes of an image, here in
    front of the text. CLIP reads them apart."""
    token = image_token(model.config)
    if token is None or not hasattr(model, "get_image_features"):
        return
    device = next(model.parameters()).device
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"].to(device))
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    rows = inputs["input_ids"].shape[0]
    tokens = torch.full((rows, sum(part.shape[:-1].numel() for part in parts) // rows), token)
    text = inputs["input_ids"].masked_fill(inputs["input_ids"] == token, token - 1 if token else 1)
    inputs["input_ids"] = torch.cat([tokens, text], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def _sound(model, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = model.config  # two frames become one position (Whisper)
    shape = batch_size, config.num_mel_bins, 2 * config.max_source_positions
    _check_numbers(*shape)
    inputs = {"input_features": torch.randn(shape, generator=generator).to(model.dtype)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.full((batch_size, 1), config.decoder_start_token_id)
    return inputs


def _pixels(model, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = model.config
    config = getattr(config, "vision_config", config)
    if "image_size" not in config.to_dict():
        raise UnsupportedModelError(
            f"The config of {type(model).__name__} has no image_size. "
            "Time it with compare_latency and inputs of your own."
        )
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    _check_numbers(batch_size, config.num_channels, height, width)
    pixels = torch.randn(batch_size, config.num_channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(model.dtype)}


def check_range(values: torch.Tensor, count: int, what: str, meaning: str) -> None:
    """DataError unless each of `what` (ids, labels) is from 0 to below `count`, the number of rows or classes."""
    if not values.numel():
        return
    low, high = (int(end) for end in torch.aminmax(values))
    if low < 0 or high >= count:
        raise DataError(
            f"{what} hold numbers from {low} to {high}; allowed are 0 to {count - 1}, {meaning}. Use the tokenizer "
            "and the labels that belong to this model."
        )


def _check_numbers(*shape: int) -> None:
    if math.prod(shape) > MAX_NUMBERS:
        raise ConfigError(
            f"An input of the shape {list(shape)} has {math.prod(shape):,} numbers, at most {MAX_NUMBERS:,} are made. "
            "Lower batch_size or sequence_length."
        )
