"""Answers for many texts of different lengths, with as little padding as there can be.

    answers = predict(model, texts, tokenizer)              # in the order of the texts
    torch.stack(answers).argmax(-1)                         # of a classifier

Texts are sorted by their tokens and run from the longest to the shortest: those of one batch are about as long.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, UnsupportedModelError, check_positive
from ..models.modes import eval_mode
from ..models.registry import token_limit
from ..models.token_masks import token_masks
from ..training.lengths import in_batches
from ..training.progress import told
from ..training.ranks import in_order
from .quality import inputs_of


def predict(
    model: torch.nn.Module,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[Tensor]:
    """What the model gives for each text, on the CPU, in their order.

    Parameters:
        model: it runs in eval mode and without gradients, where it is.
        texts: strings, or pairs of them.
        batch_size: texts in one forward.
        max_length: tokens at which texts are cut; default: all that the model takes.

    Returns:
        A tensor for each text: `[classes]` of a classifier; of a model that answers token by token `[T, ...]` for its
        own T tokens, without padding. Of a model without a head the last hidden states `[T, width]`.

    Raises:
        DataError: no texts, or one text instead of a list.
        UnsupportedModelError: an encoder-decoder.
    """
    check_positive("batch_size", batch_size)
    if isinstance(texts, str) or not len(texts):
        raise DataError("`texts` must be a list of strings with at least one: predict(model, [text], tokenizer).")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} writes its answer: call model.generate.")
    if tokenizer.pad_token is None:
        raise ConfigError("The tokenizer has no pad_token, so texts of different lengths make no batch. Set it.")
    limit = max_length or token_limit(model.config)
    options = {"truncation": True, "max_length": limit} if limit else {}
    rows = [dict(tokenizer(*([text] if isinstance(text, str) else text), **options)) for text in texts]
    places, answers = in_batches(rows, batch_size), list[Tensor]()
    with eval_mode(model), torch.no_grad():
        for place in told(places, "predict"):
            batch = tokenizer.pad([rows[row] for row in place], return_tensors="pt")
            inputs = inputs_of(model, batch)
            output = model(**inputs)
            values = output[0] if "logits" not in output else output.logits
            mask = token_masks(inputs, has_decoder=False)["encoder"]
            by_token = values.ndim > 2 and values.shape[1] == mask.shape[1]
            answers += [row[real] if by_token else row for row, real in zip(values.cpu(), mask.cpu(), strict=True)]
    return in_order(answers, [row for place in places for row in place])
