"""Test texts in the tokens of another tokenizer, row by row: so two models that spell differently read the same.

    rows = respelled(test, tokenizer, shorter)
    rows[0]["counted_targets"]                            # how many tokens of the first tokenizer are predicted there

Perplexity is a mean over tokens, and whoever has fewer of them spells a text in more. So the loss of a row counts for
the tokens that it had: the perplexity of each is then that of the same text in the same number of parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TARGETS = "counted_targets"


def respelled(rows: Dataset, before: Any, after: Any, limit: int | None = None) -> Dataset:
    """Rows of `input_ids`, `attention_mask`, `labels` and `counted_targets`, one for each row of `rows`.

    Where a row begins in the middle of a word, that word's first piece is not predicted, as its first token was not.

    Parameters:
        rows: with `input_ids`, each row a text in the tokens of `before`.
        after: another tokenizer for the same texts.
        limit: most tokens that the model takes; None: any number.

    Raises:
        DataError: a row has more tokens than `limit`.
    """

    from datasets import Dataset

    blocks = rows["input_ids"][:]
    counts = [len(ids) for ids in blocks]
    texts = before.batch_decode(blocks, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spelled = after(texts, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, spelled))
    if limit is not None and longest > limit:
        raise DataError(
            f"With fewer tokens a test text is spelled in {longest}, and the model has {limit} positions. Set "
            f"data.max_length to {limit * max(counts) // longest - 1}, or keep more tokens."
        )
    columns = {"input_ids": spelled, "attention_mask": [[1] * len(ids) for ids in spelled], "labels": spelled}
    return Dataset.from_dict(columns | {TARGETS: [count - 1 for count in counts]})
