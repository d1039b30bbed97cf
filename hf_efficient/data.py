"""Rows in, train and test splits out: a bundled name, a Hub id, a local file or folder, or one you already have.

    from hf_efficient.data import load_dataset_any, prepare

    rows = load_dataset_any("bundled:bbc-news", limit=200)             # also "reviews.csv", "nyu-mll/glue:sst2"
    ready = prepare(rows, "text-classification", tokenizer, max_length=128)
    Trainer(model, train_dataset=ready.train, eval_dataset=ready.test, data_collator=ready.collator)

`preparing.py` turns the rows into model inputs. Bundled and local data never touch the network; whatever is cached
lies in the Hugging Face cache, never in the working directory or beside the user's files.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundled import PREFIX, bundled_dataset
from .errors import DataError
from .preparing import TASKS, PreparedData, Task, check_labels, find_column, need_column, prepare

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = [
    "TASKS",
    "PreparedData",
    "Task",
    "check_labels",
    "load_dataset_any",
    "missing_file",
    "prepare",
    "rows_digest",
]

# file ending -> the builder of `datasets` that reads it, and its arguments
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
MAX_LABELS = 10_000

logger = logging.getLogger(__name__)


def load_dataset_any(
    name_or_path: str | Path | Mapping[str, Any] | Dataset,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """A `DatasetDict` that always has `train` and `test` (and `validation` where the data has all three).

    Parameters:
        name_or_path: `bundled:NAME`; a Hub id (`user/name`, or `user/name:config`); a .csv, .tsv, .json, .jsonl,
            .parquet or .txt file (one document per line); a folder written by `save_to_disk`; a `Dataset`,
            `DatasetDict` or plain dict of splits.
        test_fraction: the part held out where the data has no test split; a validation split, or a test split with
            hidden labels (GLUE), is resolved first: then validation serves as test.
        seed: of the shuffle and the split. The split is stratified by the label where there is one.
        limit: the most rows taken, after a seeded shuffle, of each split that the data comes with.
        label_column: found by its usual names where not given.

    Exact duplicate rows are removed before a split is made; splits that the data comes with are left alone, and
    test rows that also occur in train are reported. Both counts go to the log.

    Raises:
        DataError: no such file or data set, an unreadable or empty one, or no rows left to hold out.
    """
    _check_options(test_fraction, limit)
    splits = _usable_splits(_read(name_or_path), label_column)
    label = (
        need_column(splits["train"], "label", label_column) if label_column else find_column(splits["train"], "label")
    )
    if not isinstance(name_or_path, Mapping):
        splits = _with_class_labels(splits, label)
    if "test" in splits:
        _report_leak(splits)
        return _dict({name: _limited(split, limit, seed) for name, split in splits.items()})
    rows = _limited(_without_duplicates(splits["train"]), limit, seed)
    return _dict(dict(zip(("train", "test"), _split(rows, test_fraction, seed, label), strict=True)))


def missing_file(path: str) -> DataError:
    """The error for a data file that does not exist: its nearest neighbours in the folder and the endings we read."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return DataError(f"No such data file {path!r}: the folder {folder!r} does not exist.")
    near = difflib.get_close_matches(name, files_in(folder or "."), n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return DataError(f"No such data file {path!r}.{hint} Files are read by ending: {', '.join(FORMATS)}.")


def files_in(folder: str) -> list[str]:
    """Sorted names; none where the folder cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def looks_local(name: str) -> bool:
    """Whether a name means a file or folder here rather than a Hub id: it exists, or is spelt like a path."""
    # os.path, which answers False where pathlib raises: names too long, a null byte, an unknown ~user
    path = os.path.expanduser(name)
    spelt = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.splitext(name)[1] in FORMATS
    return spelt or os.path.exists(path)


def _check_options(test_fraction: object, limit: object) -> None:
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, (int, float)) or not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1 (both excluded), got {test_fraction!r}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit must be a positive integer or None (all rows), got {limit!r}.")


def _read(source: Any) -> dict[str, Dataset]:
    import datasets

    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if isinstance(source, Mapping):
        wrong = [name for name, split in source.items() if not isinstance(split, datasets.Dataset)]
        if wrong or not source:
            raise DataError(f"A dict of splits must hold datasets.Dataset values, got {source!r:.200}.")
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise DataError(f"A data set is a name, a path, a Dataset or a dict of them, got {type(source).__name__}.")
    name = str(source)
    if name.startswith(PREFIX):
        return {"train": bundled_dataset(name.removeprefix(PREFIX))}
    return _read_local(Path(os.path.expanduser(name))) if looks_local(name) else _read_hub(name)


def _read_local(path: Path) -> dict[str, Dataset]:
    import datasets

    if os.path.isdir(path):
        if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            raise DataError(
                f"The folder {str(path)!r} was not written by save_to_disk. Give such a folder, or one file: "
                f"{', '.join(FORMATS)}."
            )
        loaded = datasets.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if not os.path.isfile(path):
        raise missing_file(str(path))
    if path.suffix not in FORMATS:
        raise DataError(f"Cannot tell what {str(path)!r} holds: its ending must be one of {', '.join(FORMATS)}.")
    if not path.stat().st_size:
        raise DataError(f"The data file {str(path)!r} is empty.")
    builder, arguments = FORMATS[path.suffix]
    try:
        splits = datasets.load_dataset(builder, data_files={"train": str(path)}, **arguments)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"Cannot read {str(path)!r} as {path.suffix}: {cause} "
            "It must be UTF-8 text (or Parquet) with one row or more."
        ) from error
    rows = splits["train"]
    if builder == "text":
        rows = rows.select([row for row, line in enumerate(rows["text"]) if line.strip()])
    return {"train": rows}


def _read_hub(name: str) -> dict[str, Dataset]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"Cannot load {name!r} from the Hub: {error} Check the name (user/name, or user/name:config) and the "
            f"network; for local data give an existing file ending in {', '.join(FORMATS)}."
        ) from error
    return dict(loaded)


def _usable_splits(splits: dict[str, Dataset], label_column: str | None) -> dict[str, Dataset]:
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise DataError(f"The data has the splits {', '.join(splits)}; one of several must be called 'train'.")
    splits = {name: splits[name] for name in ("train", "test", "validation") if name in splits}
    if "test" in splits and _labels_hidden(splits["test"], label_column):
        del splits["test"]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"The {name} split has no rows (columns: {', '.join(split.column_names)}).")
    return splits


def _labels_hidden(rows: Dataset, label_column: str | None) -> bool:
    label = label_column if label_column in rows.column_names else find_column(rows, "label")
    return label is not None and _is_class(rows, label) and set(rows[label]) <= {-1, None}


def _is_class(rows: Dataset, label: str) -> bool:
    """Strings, integers, booleans or a ClassLabel: not floats, lists or images."""
    return getattr(rows.features[label], "dtype", None) in ("string", "large_string", "int32", "int64", "bool")


def _with_class_labels(splits: dict[str, Dataset], label: str | None) -> dict[str, Dataset]:
    """Strings and integers become a ClassLabel here, so that `limit` cannot change the number of classes."""
    import datasets

    if label is None or isinstance(splits["train"].features[label], datasets.ClassLabel):
        return splits
    if any(label not in split.column_names or not _is_class(split, label) for split in splits.values()):
        return splits
    values = set().union(*(split[label] for split in splits.values()))
    if None in values or len(values) > MAX_LABELS:
        return splits
    ids = {value: index for index, value in enumerate(sorted(values))}
    class_label = datasets.ClassLabel(names=[str(value) for value in ids])
    return {
        name: split.remove_columns(label).add_column(label, [ids[v] for v in split[label]], feature=class_label)
        for name, split in splits.items()
    }


def _row_hashes(rows: Dataset) -> list[bytes]:
    hashes = []
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        hashes += [hashlib.blake2b(repr(sorted(row.items())).encode()).digest() for row in batch.to_pylist()]
    return hashes


def rows_digest(rows: Dataset) -> str:
    """sha256 of the content of all rows, in their order."""
    return hashlib.sha256(b"".join(_row_hashes(rows))).hexdigest()


def _without_duplicates(rows: Dataset) -> Dataset:
    first: dict[bytes, int] = {}
    for index, digest in enumerate(_row_hashes(rows)):
        first.setdefault(digest, index)
    if len(first) < len(rows):
        logger.warning("Removed %d exact duplicates of %d rows.", len(rows) - len(first), len(rows))
        rows = rows.select(list(first.values()))
    return rows


def _report_leak(splits: dict[str, Dataset]) -> None:
    train = set(_row_hashes(splits["train"]))
    leaked = sum(digest in train for digest in _row_hashes(splits["test"]))
    if leaked:
        logger.warning("%d of %d test rows also occur in train.", leaked, len(splits["test"]))


def _limited(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    import numpy as np

    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:limit])


def _split(rows: Dataset, test_fraction: float, seed: int, label: str | None) -> tuple[Dataset, Dataset]:
    """Seeded and stratified: each class gives its share of the test rows, to the nearest row over the whole."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(rows))
    stratify = label is not None and _is_class(rows, label)
    classes = np.asarray([str(value) for value in rows[label]])[order] if stratify else np.zeros(len(order))
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    quotas = counts * test_fraction
    taken = np.floor(quotas).astype(int)
    for index in np.argsort(taken - quotas, kind="stable"):  # largest remainder first
        if taken.sum() < round(len(rows) * test_fraction) and counts[index] > taken[index] + 1:  # train keeps a row
            taken[index] += 1
    held_out = np.zeros(len(order), dtype=bool)
    for index, count in enumerate(taken):
        held_out[np.flatnonzero(inverse == index)[:count]] = True
    if not held_out.any():
        raise DataError(
            f"{len(rows)} rows in {len(counts)} classes are too few to hold out a part of {test_fraction}. "
            "Give more rows, a larger test_fraction, or a test split."
        )
    return rows.select(order[~held_out]), rows.select(order[held_out])


def _dict(splits: dict[str, Dataset]) -> DatasetDict:
    import datasets

    return datasets.DatasetDict(splits)
