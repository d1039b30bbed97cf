"""Texts of nearly one length stand in one batch, so that little of it is padding.

    [rows[i] for i in longest_first(rows)]                       # for evaluation: no order matters
    TrainingArguments(train_sampling_strategy="group_by_length") # for training: `GroupedSampler`

A batch is padded to its longest row. Of texts whose lengths differ, half of a random batch is padding, which is
computed all the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

BY_LENGTH = "group_by_length"  # of `TrainingArguments.train_sampling_strategy`
TOKENS = "input_ids"
CHUNK = 10_000  # rows whose tokens are looked at together


def row_lengths(rows: Any) -> list[int] | None:
    """How many tokens each row has; None where that cannot be seen without making the rows: images, or a data set of
    another kind than `datasets.Dataset` and lists."""
    if hasattr(rows, "column_names"):
        if TOKENS not in rows.column_names or not hasattr(rows.features[TOKENS], "feature"):
            return None
        tokens = rows.select_columns(TOKENS).with_format("arrow")
        return [len(each) for chunk in tokens.iter(CHUNK) for each in chunk[TOKENS]]
    if isinstance(rows, list | tuple) and all(isinstance(row, dict) and TOKENS in row for row in rows):
        return [len(row[TOKENS]) for row in rows]
    return None


def longest_first(rows: Any) -> list[int]:
    """The numbers of the rows, from the longest to the shortest: memory that does not suffice shows at once.

    Rows of one length stay in their order, and all do where no length is known.
    """
    lengths = row_lengths(rows)
    order = range(len(rows))
    return list(order) if lengths is None else sorted(order, key=lambda row: -lengths[row])


def in_batches(rows: Any, batch_size: int) -> list[list[int]]:
    """The numbers of the rows of each batch, in the order of `longest_first`."""
    order = longest_first(rows)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class GroupedSampler(LengthGroupedSampler):
    """As the Trainer's own: random rows, of which 50 batches at a time are sorted, and the longest comes first.

    Its order follows from seed and epoch alone, where that of transformers is drawn from whatever state the random
    numbers are in: a run that goes on, and every process of several, has the order of one that was not stopped.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
