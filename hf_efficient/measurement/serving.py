"""Texts of a data set as a server gets them: one by one, short or long, and many at once, sorted by length.

    batches = batches_of([5, 80, 12, 33], "mixed", rounds=8)            # which rows come together
    timing = time_batches({"teacher": (model, rows, collator), ...}, batches)
    timing.latencies["teacher"].p95_ms, per_second(timing.seconds["teacher"], batches)

A made-up batch of one length, as `compare_latency` is usually given, says little of the texts that one has: most are
shorter than the longest that the model takes, and padding to the longest of a batch is work too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .latency import LatencyComparison, compare_latency
from .quality import inputs_of

AT_ONCE = 32  # texts in a batch of `mixed`
WAITING = 4 * AT_ONCE  # texts that a server sorts by length before it cuts them into batches
MOST = 8  # batches of `mixed` that are timed: each is as much work as 32 rounds of the others


def batches_of(lengths: Sequence[int], load: str, rounds: int) -> list[list[int]]:
    """Which rows come together in each round.

    Parameters:
        lengths: tokens of every row.
        load: `"short"`, `"long"`: one row at a time, of the shortest or the longest quarter; `"mixed"`: `AT_ONCE`
            rows, of those that wait in the order of the data set, sorted by length.
        rounds: at least 2; fewer batches are made where there are fewer rows.
    """
    if load == "mixed":
        count = min(len(lengths), min(rounds, MOST) * AT_ONCE)
        waiting = [range(start, min(start + WAITING, count)) for start in range(0, count, WAITING)]
        rows = [row for some in waiting for row in sorted(some, key=lengths.__getitem__)]
        return [rows[start : start + AT_ONCE] for start in range(0, count, AT_ONCE)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = max(1, len(order) // 4)
    quarter = order[:size] if load == "short" else order[-size:]
    some = min(rounds, size)
    return [[quarter[number * size // some]] for number in range(some)]


def time_batches(
    readers: Mapping[str, tuple[torch.nn.Module, Any, Callable]],
    batches: Sequence[Sequence[int]],
    *,
    rounds: int = 20,
    threads: int | None = None,
) -> LatencyComparison:
    """Time every model on the same rows, in turn; each batch once, and again from the first where `rounds` are more.

    Parameters:
        readers: name -> model, its data set, and the collator that pads a list of its rows.
        batches: as `batches_of` makes them.
    """
    models = {name: model for name, (model, _, _) in readers.items()}
    given = {
        id(model): [inputs_of(model, collator([dataset[row] for row in batch])) for batch in batches]
        for model, dataset, collator in readers.values()
    }
    return compare_latency(models, lambda model: given[id(model)], rounds=rounds, warmup=1, threads=threads)


def per_second(seconds: Sequence[float], batches: Sequence[Sequence[int]]) -> float:
    """Rows in a second, of the rounds that `time_batches` gives."""
    return sum(len(batches[number % len(batches)]) for number in range(len(seconds))) / sum(seconds)
