"""Rows of query, document and how relevant it is: labels are numbers, and a query keeps all of its documents.

rows = with_numbers(rows, "label")                     # "0", "1", 0.5, ... as float64
train, test = split_groups(rows, "query", test_fraction=0.2, seed=0)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from .text import strings

if TYPE_CHECKING:
    from datasets import Dataset


def with_numbers(rows: Dataset, column: str) -> Dataset:
    """The rows with the column as float64, in the last place; DataError for a value that is no finite number.

    Of a ClassLabel its names count, since reading a file gives strings and whole numbers such names.
    """
    import datasets

    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [value if value is None or value < 0 else feature.names[value] for value in values]
    numbers = [_number(value, row, column) for row, value in enumerate(values)]
    return rows.remove_columns(column).add_column(column, numbers, feature=datasets.Value("float64"))


def _number(value: Any, row: int, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"Row {row} has {shown(value)} in the label column {column!r}, where a number says how relevant the "
            "document is to the query: 1 and 0, grades, or the scores of another model."
        )
    return number


def are_chances(rows: Dataset, column: str) -> bool:
    """Whether all labels lie from 0 to 1: yes and no, or how likely yes is."""
    return all(0 <= value <= 1 for value in rows[column][:])


def number_queries(rows: Dataset, query: str, label: str) -> dict[str, int]:
    """A number for each query of the test rows, in the order in which they come.

    Raises:
        DataError: a label below 0, which no gain can be; or no query with two documents of different labels, so that
            nothing can be ranked.
    """
    labels: dict[str, set[float]] = {}
    for text, value in zip(_texts(rows, query), rows[label][:], strict=True):
        labels.setdefault(text, set()).add(value)
    lowest = min(min(values) for values in labels.values())
    if lowest < 0:
        raise DataError(
            f"The label column {label!r} has {lowest:g} in the test rows. NDCG and MRR take labels from 0 (of no use) "
            "up: give the test rows such labels. Those of the training rows may be any numbers."
        )
    if all(len(values) < 2 for values in labels.values()):
        raise DataError(
            f"None of the {len(labels)} queries in the test rows (column {query!r}) has documents of different labels "
            f"(column {label!r}), so there is nothing to rank. Each needs several rows: one for each candidate."
        )
    return {text: number for number, text in enumerate(labels)}


def split_groups(rows: Dataset, column: str, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and test rows, each value of the column in one of them; the fraction is that of the values."""
    import numpy as np

    groups, count = _groups(rows, column)
    held = round(count * test_fraction)
    if not 0 < held < count:
        raise DataError(
            f"{count} different values of {column!r} are too few to hold out a part of {test_fraction}: rows of one "
            "value stay together. Give more of them, another test_fraction, or a test split."
        )
    drawn = np.random.default_rng(seed)
    order, chosen = drawn.permutation(len(rows)), drawn.permutation(count)[:held]
    is_held = np.isin(groups[order], chosen)
    return rows.select(order[~is_held]), rows.select(order[is_held])


def limit_groups(rows: Dataset, column: str, limit: int, seed: int) -> Dataset:
    """Whole groups in a seeded order, one or more, as long as there are no more than `limit` rows."""
    import numpy as np

    groups, count = _groups(rows, column)
    drawn = np.random.default_rng(seed)
    order = drawn.permutation(count)
    within = np.bincount(groups, minlength=count)[order].cumsum() <= limit
    places = np.flatnonzero(np.isin(groups, order[: max(1, int(within.sum()))]))
    return rows.select(drawn.permutation(places))


def _groups(rows: Dataset, column: str) -> tuple[Any, int]:
    """The number of each row's value, in the order in which values come; and how many there are."""
    import numpy as np

    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(text, len(numbers)) for text in _texts(rows, column)]), len(numbers)


def _texts(rows: Dataset, column: str) -> list[str]:
    return strings({column: rows[column][:]}, list(range(len(rows))), column)
