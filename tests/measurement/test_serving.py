"""Texts as they come in: which rows come together, and what is timed of them."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efficient.measurement.serving import AT_ONCE, MOST, WAITING, batches_of, per_second, time_batches

LENGTHS = [(7 * row) % 101 for row in range(400)]


def test_short_and_long_texts_come_alone():
    short, long = batches_of(LENGTHS, "short", 20), batches_of(LENGTHS, "long", 20)
    assert all(len(batch) == 1 for batch in short + long) and len(short) == len(long) == 20
    assert len({row for [row] in short}) == 20, "different texts"
    lowest, highest = sorted(LENGTHS)[99], sorted(LENGTHS)[300]
    assert max(LENGTHS[row] for [row] in short) <= lowest < highest <= min(LENGTHS[row] for [row] in long)
    assert batches_of([5, 3], "short", 20) == [[1]] and batches_of([5, 3], "long", 20) == [[0]]


def test_many_at_once_are_sorted_as_they_wait():
    batches = batches_of(LENGTHS, "mixed", 20)
    assert len(batches) == MOST and all(len(batch) == AT_ONCE for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(MOST * AT_ONCE)), "as the data set has them"
    first = [LENGTHS[row] for batch in batches[: WAITING // AT_ONCE] for row in batch]
    assert first == sorted(first) and {row for batch in batches[:4] for row in batch} == set(range(WAITING))

    def padded(some):
        return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in some)

    unsorted = [list(range(start, start + AT_ONCE)) for start in range(0, MOST * AT_ONCE, AT_ONCE)]
    assert padded(batches) < 0.8 * padded(unsorted)
    assert [len(batch) for batch in batches_of([3] * 40, "mixed", 5)] == [32, 8]


class Watched(BertForSequenceClassification):
    """Notes the shape of what it is given."""

    def forward(self, input_ids, attention_mask=None):
        self.seen.append(tuple(input_ids.shape))
        return super().forward(input_ids, attention_mask)


def test_all_models_get_the_same_rows_in_turn():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    models = {"a": Watched(config), "b": Watched(config)}
    rows = [{"input_ids": [1] * length, "labels": 0} for length in (3, 9, 5)]

    def collator(some):
        longest = max(len(row["input_ids"]) for row in some)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in some])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.zeros(len(some))}

    for model in models.values():
        model.seen = []
    batches = [[0, 2], [1]]
    timing = time_batches({n: (m, rows, collator) for n, m in models.items()}, batches, rounds=3)
    assert models["a"].seen == models["b"].seen
    assert models["a"].seen[2:] == [(2, 5)] * 2 + [(1, 9)] * 2 + [(2, 5)] * 2, "each once uncounted before it is timed"
    assert timing.latencies["a"].rounds == 3
    assert per_second((1.0, 0.5, 1.0), batches) == pytest.approx((2 + 1 + 2) / 2.5)
