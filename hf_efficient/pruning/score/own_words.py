"""Calibration texts in the model's own words: what it was trained on, as far as it still tells.

    batches = my_batches + self_calibration(model, rows=32, length=512)
    small = prune(model, PruningConfig(ratio=0.2), batches)

Least squares and scores are only as broad as the texts they see: a model that is calibrated with news alone forgets
what else it knew. Sampled texts need no data and cost about as much as a pass over them (Liu 2023, "LLM-QAT"; Williams
2025, "Self-calibration for Language Model Quantization and Pruning").
"""

import torch
from transformers import GenerationConfig, PreTrainedModel

from ...errors import ConfigError, UnsupportedModelError, shown
from ...models.modes import evaluating
from ...models.registry import token_limit
from .handing import Batch

MAX_ROWS, MAX_LENGTH = 1 << 16, 1 << 20
TOGETHER = 64  # rows that are sampled at once: a cache of so many texts has to fit into memory


def self_calibration(
    model: PreTrainedModel, rows: int = 32, length: int = 512, batch_size: int = 4, seed: int = 0
) -> list[Batch]:
    """Batches of `input_ids` and `attention_mask`, `[batch_size, length]`, that the model wrote itself.

    Each row begins with a token that is drawn from the whole vocabulary, and goes on as the model does at temperature
    1, past an end of text too. The same seed gives the same texts; the global random state stays as it was.

    Parameters:
        model: a decoder with a language-modelling head.
        rows, length: how many texts, of how many tokens each.
        batch_size: rows of a batch; the last one may have fewer.

    Raises:
        ConfigError: a number out of range, or longer than what the model takes.
        UnsupportedModelError: the model does not generate, or needs an input beside tokens.
    """
    for name, value, low, most in (
        ("rows", rows, 1, MAX_ROWS),
        ("length", length, 2, MAX_LENGTH),
        ("batch_size", batch_size, 1, MAX_ROWS),
    ):
        if type(value) is not int or not low <= value <= most:
            raise ConfigError(f"{name} must be an integer from {low} to {most}, got {shown(value)}.")
    limit = token_limit(model.config)
    if limit is not None and length > limit:
        raise ConfigError(f"length is {length}, but the model takes {limit} tokens.")
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot write texts of its own: only decoders with a language-modelling head can. "
            "Calibrate with texts of yours."
        )
    # Nothing of the model's own settings: a penalty or a narrow choice would not be the distribution that it learned.
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, min_new_tokens=length - 1,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    vocabulary, own = model.get_input_embeddings().num_embeddings, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    texts = []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        first = torch.randint(vocabulary, (rows, 1)).to(model.device)
        try:
            model.generation_config = settings  # generate fills what is None from the model's own
            for part in first.split(TOGETHER):
                texts.append(model.generate(part, attention_mask=torch.ones_like(part), generation_config=settings))
        finally:
            model.generation_config = own
    ids = torch.cat(texts)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]
