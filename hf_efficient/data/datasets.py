"""Rows in, train and test splits out: a bundled name, a Hub id, a local file or folder, or one you already have.

    from hf_efficient.data import load_dataset_any, prepare

    rows = load_dataset_any("bundled:bbc-news", limit=200)             # also "reviews.csv", "nyu-mll/glue:sst2"
    ready = prepare(rows, "text-classification", tokenizer, max_length=128)
    Trainer(model, train_dataset=ready.train, eval_dataset=ready.test, data_collator=ready.collator)

`tables.py` reads files, `preparation.py` turns rows into model inputs. Bundled and local data never touch the network;
whatever is cached lies in the Hugging Face cache, never in the working directory or beside the user's files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from ..io.disk import write_atomic
from ..io.json import read_json
from .bundled import PREFIX, bundled_dataset
from .preparation import MAX_LABELS, find_column, is_missing, need_column, sorted_classes
from .queries import limit_groups, split_groups
from .tables import FORMATS, read_table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)


def load_dataset_any(
    name_or_path: str | Path | Mapping[str, Any] | Dataset,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    label_column: str | None = None,
    group_names: Sequence[str] = (),
    stratify: bool = True,
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
        group_names: the first of these columns that the data has keeps its values together: rows of equal ones come
            into one split, `test_fraction` is that of the values, and `limit` leaves whole groups.
        stratify: False where labels are numbers, and no classes.

    Exact duplicate rows are removed before a split is made; splits that the data comes with are left alone, and
    test rows that also occur in train are reported. Both counts go to the log.

    Raises:
        DataError: no such file or data set, an unreadable or empty one, or no rows left to hold out.
    """
    import datasets

    _check_options(test_fraction, limit, seed)
    splits = _usable_splits(_read(name_or_path), label_column)
    label = (
        need_column(splits["train"], "label", label_column) if label_column else find_column(splits["train"], "label")
    )
    label = label if stratify else None
    if not isinstance(name_or_path, Mapping):
        splits = _with_class_labels(splits, label)
    group = next((name for name in group_names if name in splits["train"].column_names), None)
    if "test" in splits:
        _tell_leaks(splits, group)
        return datasets.DatasetDict({name: _limited(split, limit, seed, group) for name, split in splits.items()})
    rows = _limited(_without_duplicates(splits["train"]), limit, seed, group)
    if group is not None:
        train_rows, test_rows = split_groups(rows, group, test_fraction, seed)
    else:
        train_rows, test_rows = _split(rows, test_fraction, seed, label)
    return datasets.DatasetDict(train=train_rows, test=test_rows)


def _tell_leaks(splits: dict[str, Dataset], group: str | None) -> None:
    """Whole test rows, or values of the column that keeps rows together, that are in train as well."""
    train = set(_row_hashes(splits["train"]))
    if leaked := sum(digest in train for digest in _row_hashes(splits["test"])):
        logger.warning("%d of %d test rows also occur in train.", leaked, len(splits["test"]))
    if group is not None and group in splits["test"].column_names:
        known, asked = (set(map(repr, splits[name][group])) for name in ("train", "test"))
        if known & asked:
            logger.warning("%d of %d values of %r in test also occur in train.", len(known & asked), len(asked), group)


def with_texts(rows: Dataset, column: str, others: Sequence[Dataset], seed: int) -> Dataset:
    """The texts of several data sets in one column, shuffled; other columns are left behind.

    `column`: of the texts in `rows`; in the others it is found by its usual names.
    """
    import datasets

    parts = [rows.select_columns([column])]
    for other in others:
        name = need_column(other, "text", None)
        part = other.select_columns([name])
        parts.append(part if name == column else part.rename_column(name, column))
    return datasets.concatenate_datasets(parts).shuffle(seed=seed)


def looks_local(name: str) -> bool:
    """Whether a name means a file or folder here rather than a Hub id: it exists, or is spelt like a path."""
    # os.path, which answers False where pathlib raises: names too long, a null byte, an unknown ~user
    path = os.path.expanduser(name)
    spelt = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.splitext(name)[1] in FORMATS
    return spelt or os.path.exists(path)


def _check_options(test_fraction: object, limit: object, seed: object) -> None:
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, (int, float)) or not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1 (both excluded), got {shown(test_fraction)}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit must be a positive integer or None (all rows), got {shown(limit)}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise DataError(f"seed must be an integer from 0 to 2**64 - 1, got {shown(seed)}.")


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
    if not looks_local(name):
        return _read_hub(name)
    return _read_local(Path(name if os.path.exists(name) else os.path.expanduser(name)))


def _read_local(path: Path) -> dict[str, Dataset]:
    if not os.path.isdir(path):
        return {"train": _on_disk(read_table(path), path)}
    if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"The folder {str(path)!r} was not written by save_to_disk. Give such a folder, or one file: "
            f"{', '.join(FORMATS)}."
        )
    try:
        if not (path / "dataset_dict.json").is_file():
            return {"train": _read_saved(path)}
        names = _entry(path / "dataset_dict.json", "splits")
        return {name: _read_saved(path / _plain(name)) for name in names}
    except Exception as error:  # Arrow says it in its own way when a file is damaged
        raise DataError(
            f"Cannot read the folder {str(path)!r} of save_to_disk: {str(error)[:500] or type(error).__name__} Write "
            "it again with save_to_disk, or take it from a good copy."
        ) from error


def _read_saved(folder: Path) -> Dataset:
    """The rows of one split. Not by `load_from_disk`, which takes "::" in the folder's name for an address."""
    import datasets
    import pyarrow as pa

    info = datasets.DatasetInfo.from_dict(read_json(folder / "dataset_info.json"))
    files = [folder / _plain(entry["filename"]) for entry in _entry(folder / "state.json", "_data_files")]
    if str(folder) == str(folder).encode("utf-8", "replace").decode():
        parts = [datasets.Dataset.from_file(str(file), info=info.copy()) for file in files]
    else:  # Arrow opens no file whose name is not UTF-8
        parts = [datasets.Dataset.from_buffer(pa.py_buffer(file.read_bytes()), info=info.copy()) for file in files]
    rows = datasets.concatenate_datasets(parts)
    rows.data.validate(full=True)
    return rows


def _entry(path: Path, name: str) -> list:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(name), list) or not content[name]:
        raise DataError(f"{path.name} has no list {name!r}.")
    return content[name]


def _plain(name: str) -> str:
    """The name of a file or folder that lies where it is named."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(f"{name!r} is not the name of a file in it.")
    return name


def _on_disk(rows: Dataset, source: Path) -> Dataset:
    """The same rows in a file of the Hugging Face cache, so that what is made of them need not lie in memory.

    The file is named after what is in it: a source that changes can never give what it held before.
    """
    import datasets
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.data.table.schema) as writer:
        writer.write_table(rows.data.table)
    content = sink.getvalue()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_efficient"
    target = folder / f"rows-{hashlib.sha256(content).hexdigest()}.arrow"
    try:
        if not target.is_file() or target.stat().st_size != content.size:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(target, content)
        rows = datasets.Dataset.from_file(str(target))
    except OSError as error:
        logger.warning("The rows stay in memory, as the cache cannot be written: %s", error)
    rows.info.download_checksums = {os.path.abspath(source): {"num_bytes": source.stat().st_size, "checksum": None}}
    return rows


def _read_hub(name: str) -> dict[str, Dataset]:
    import datasets

    repository, _, config = name.partition(":")
    if repository.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{repository}"):
        # `datasets` would read whatever files of that kind lie in the current folder
        raise DataError(f"{name!r} is a kind of file, not a data set. Give a file ending in {', '.join(FORMATS)}.")
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
    test = splits.get("test")
    if test is not None:
        label = label_column if label_column in test.column_names else find_column(test, "label")
        if label is not None and _is_class(test, label) and set(test[label]) <= {-1, None}:
            del splits["test"]  # its labels are hidden, as in GLUE
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"The {name} split has no rows (columns: {', '.join(split.column_names)}).")
    return splits


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
    if len(values) > MAX_LABELS or any(map(is_missing, values)):
        return splits
    try:
        ids = {value: index for index, value in enumerate(sorted_classes(values, splits["train"]))}
    except DataError:  # `prepare` tells it, if its task has labels at all
        return splits
    names = [value.strip() for value in values if isinstance(value, str)]
    if len(set(names)) < len(names):
        alike = sorted({value for value in values if names.count(value.strip()) > 1})[:10]
        logger.warning("Some classes differ in spaces alone, and are told apart: %s.", ", ".join(map(repr, alike)))
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


def _limited(rows: Dataset, limit: int | None, seed: int, group: str | None = None) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    if group is not None and group in rows.column_names:
        return limit_groups(rows, group, limit, seed)
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
    shares = np.floor(quotas).astype(int)
    for index in np.argsort(shares - quotas, kind="stable"):  # largest remainder first
        if shares.sum() < round(len(rows) * test_fraction) and counts[index] > shares[index] + 1:  # train keeps a row
            shares[index] += 1
    held_out = np.zeros(len(order), dtype=bool)
    for index, count in enumerate(shares):
        held_out[np.flatnonzero(inverse == index)[:count]] = True
    if not held_out.any():
        raise DataError(
            f"{len(rows)} rows in {len(counts)} classes are too few to hold out a part of {test_fraction}. "
            "Give more rows, a larger test_fraction, or a test split."
        )
    return rows.select(order[~held_out]), rows.select(order[held_out])
