"""How well a model hears: the word error rate of what it says a sound means.

    wer = sum_i (substitutions + deletions + insertions)_i / sum_i words_i

    errors, words = word_errors("the cat sat", "a cat sat down")     # 2, 4

Words are what stands between spaces, as they are written: neither case nor punctuation is changed, as in the metric
`wer` of `evaluate`. Of CTC the most probable token of each frame is taken, of others what `generate` says greedily.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError

SPARE = 8  # tokens that a wrong transcript may be longer than the right one


def word_errors(heard: str, said: str) -> tuple[int, int]:
    """The fewest words to change, drop or add to make of what was heard what was said (Levenshtein 1966); and how many
    words were said."""
    ours, theirs = heard.split(), said.split()
    row = list(range(len(theirs) + 1))
    for count, word in enumerate(ours, 1):
        before, row[0] = row[0], count
        for place, other in enumerate(theirs, 1):
            before, row[place] = row[place], min(before + (word != other), row[place] + 1, row[place - 1] + 1)
    return row[-1], len(theirs)


def score_texts(model: Any, inputs: Mapping[str, Tensor], logits: Tensor | None, labels: Tensor, decode: Any) -> list:
    """(word errors, words, digest of what was heard, digest of what was said) of each sound of a batch.

    Parameters:
        inputs: of the model, without labels.
        logits: `[B, frames, tokens]` of CTC; None: the model generates.
        labels: `[B, length]` token ids of what was said, -100 behind them.
        decode: token ids -> texts, as `data.media.Padding.decode`.
    """
    if logits is not None:
        heard, said = decode(logits.argmax(-1).cpu()), decode(labels.cpu(), group_tokens=False)
    else:
        names = ("input_features", "input_values", "attention_mask")
        sounds = {name: value for name, value in inputs.items() if name in names}
        room = labels.shape[1] + SPARE
        limit = getattr(model.config, "max_target_positions", None) or room + 1
        ids = model.generate(**sounds, do_sample=False, num_beams=1, max_new_tokens=min(room, limit - 1))
        heard, said = decode(ids.cpu()), decode(labels.cpu())
    return [
        (*word_errors(ours, theirs), _digest(ours), _digest(theirs)) for ours, theirs in zip(heard, said, strict=True)
    ]


def decoder_of(collator: Any) -> Callable:
    """
    Raises:
        ConfigError: a collator that cannot make texts of token ids.
    """
    decode = getattr(collator, "decode", None)
    if decode is None:
        raise ConfigError(
            "Word errors need texts: give the collator that prepare(...) returns, or one with `decode(ids)`."
        )
    return decode


def _digest(text: str) -> int:
    return zlib.crc32(" ".join(text.split()).encode())
