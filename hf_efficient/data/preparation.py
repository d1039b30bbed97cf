"""From rows to model inputs: which columns a task needs, tokenisation, labels, and the collator that pads a batch.

    ready = prepare(rows, "text-classification", AutoTokenizer.from_pretrained(name), max_length=128)
    ready.num_labels, ready.label_names                                # 5, ("business", "entertainment", ...)

Labels are classes: strings and integers are numbered in sorted order, those of a CSV file as numbers if all of them
are whole numbers; floats (regression) and lists (several labels per row) are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, did_you_mean, shown, unknown_name
from .images import image_settings, undecoded
from .media import BATCH, check_processor, encoded, media_settings
from .queries import are_chances, number_queries, with_numbers
from .tables import FORMATS, place_of, read_table
from .tasks import ROLES, TASKS, Task, column_name
from .text import IGNORED, check_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


DEFAULT_MAX_LENGTH = 512
LONGEST = 1 << 24  # tokens
MAX_LABELS = 100_000
ONE_LABEL = ("LABEL_0",)  # as transformers names it
MULTI_LABEL = "multi_label_classification"  # its loss of one label: yes or no, or how likely yes is
INPUTS = 2  # raised when the same rows give other inputs than before, so that no older cache file is used


@dataclass(frozen=True)
class PreparedData:
    """Ready for a `Trainer`. `num_labels` is None and `label_names` empty where the task has no classes.

    `problem`: transformers' `problem_type` of a model that has one label, where the labels say it.
    """

    train: Dataset
    test: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    num_labels: int | None
    label_names: tuple[str, ...]
    task: str
    problem: str | None = None


def prepare(
    dataset: Mapping[str, Dataset],
    task: str,
    processor: Any,
    *,
    max_length: int | None = None,
    image_size: int | None = None,
    **names: str | None,
) -> PreparedData:
    """Tokenise (or normalise images of) the `train` and `test` splits for one of `TASKS`.

    - text-classification: `input_ids`, `attention_mask`, `labels`, truncated to `max_length`, padded per batch.
    - causal-lm: documents are joined, each closed by the end-of-sequence token, and cut into blocks of `max_length`;
      the rest of each 1,000 documents is a shorter block. Labels are the tokens themselves, -100 at padding.
    - seq2seq: `text_column` in, `target_column` out, labels padded with -100.
    - image-classification: `pixel_values` float32 [C, H, W]. Without a processor integers 0..255 and floats 0..1 are
      mapped to -1..1 and, where `image_size` is given, resized to a square; needs neither torchvision nor Pillow.
    - sentence-embeddings: texts without labels; both texts of a pair are rows of their own. In `test` two rows with
      the same `pair` belong together: text and pair or, without `text_pair_column`, the halves of a text. Where
      `label_column` says how alike the two are, it is their `similarity`.
    - reranking: a query (`text_column`) and a document (`text_pair_column`) as one input, `labels` [1] float: any
      number in `train`, 0 and up in `test`, where rows with the same `query` are the candidates of one.
    - token-classification: a list of words and a list with a label for each (`label_column`). The first token of a
      word carries its label, all others -100.
    - masked-lm: blocks as for causal-lm. 15% of the tokens are masked, in `train` anew in every epoch, in `test` once.
    - image-text-to-text: image and question in, `target_column` out, labels -100 before it; see data/media.py.
    - automatic-speech-recognition and speech-ctc: `audio_column` in, `target_column` out; see data/sounds.py.
    - question-answering: rows as in SQuAD. A context that is too long is cut at its end, without a second part that
      begins later; an answer that is not in what is left has the positions 0.

    Parameters:
        processor: the tokenizer; for images an AutoImageProcessor or None; for both, or for sounds, an AutoProcessor.
            A tokenizer without a padding token gets its end-of-sequence token as one.
        names: the columns, as `<role>_column` for each of `tasks.ROLES` (`text_column="review"`); those that are not
            named are found by their usual names.
        max_length: in tokens; by default what the tokenizer says, at most 512.

    Raises:
        ConfigError: unknown task, or an option out of range or of another task. TypeError: no such role.
        DataError: a missing column or split, a row that cannot be used, fewer than two classes.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    entry = TASKS[task]
    arguments = {column_name(role): role for role in ROLES}
    if foreign := [name for name in names if name not in arguments]:
        raise TypeError(f"prepare() has no argument {foreign[0]!r}. Columns are named by {', '.join(arguments)}.")
    columns = _columns(dataset, entry, {arguments[name]: column for name, column in names.items()})
    problem = None
    if "label" in columns and not entry.has_classes:
        dataset = {name: with_numbers(dataset[name], columns["label"]) for name in ("train", "test")}
    if entry.kind == "scores":
        problem = MULTI_LABEL if are_chances(dataset["train"], columns["label"]) else None
    classes, ids = _labels(dataset, entry, columns)
    dataset, settings, batch_size = _reading(dataset, task, columns, ids, processor, (max_length, image_size))
    train = _map(dataset["train"], entry.tokenize, settings, batch_size)
    test = _map(dataset["test"], entry.tokenize_test or entry.tokenize, settings, batch_size)
    if not len(train) or not len(test):
        raise DataError(f"No tokens are left of the {'test' if len(train) else 'train'} split: its texts are empty.")
    return PreparedData(train, test, entry.collate(processor), len(classes) or None, classes, task, problem)


def _labels(dataset: Mapping[str, Dataset], entry: Task, columns: dict) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the labels, and the number of each value; of scores those of the queries in test."""
    if entry.kind == "scores":
        return ONE_LABEL, number_queries(dataset["test"], columns["text"], columns["label"])
    return _classes(dataset, columns["label"], "tokens" in columns) if entry.has_classes else ((), {})


def _reading(
    dataset: Mapping[str, Dataset], task: str, columns: dict, ids: dict, processor: Any, sizes: tuple
) -> tuple[Mapping[str, Dataset], dict[str, Any], int]:
    """The rows as they are stored, the arguments of the function that makes inputs of them, and how many at once.

    `sizes`: max_length and image_size as they were given.
    """
    settings: dict[str, Any] = {"columns": columns, "ids": ids}
    entry, (max_length, image_size) = TASKS[task], sizes
    if entry.reads:
        check_processor(processor, entry.reads)
        dataset = encoded(dataset, columns["image" if "image" in columns else "audio"])
        settings |= {"processor": processor, "folder": os.path.dirname(_source(dataset["train"]) or "")}
        settings |= {"max_length": _text_settings(processor.tokenizer, max_length)["max_length"]}
        return dataset, settings | media_settings(dataset, entry.tokenize, settings), BATCH
    if entry.is_of_images:
        dataset = undecoded(dataset, columns["image"])
        return dataset, settings | image_settings(dataset, columns["image"], processor, image_size), 100
    settings |= _text_settings(processor, max_length)
    check_tokenizer(task, entry.needs, processor)
    return dataset, settings, 1000


def check_labels(model_config: Any, prepared: PreparedData) -> None:
    """DataError if the model has not the data's classes: another number, or the same names in another order."""
    if prepared.num_labels is None:
        return
    known = [model_config.id2label[index] for index in sorted(model_config.id2label)]
    if len(known) != prepared.num_labels:
        raise DataError(
            f"The model has {len(known)} labels ({_some(known)}), the data has {prepared.num_labels} "
            f"({_some(prepared.label_names)}). Load the model with num_labels={prepared.num_labels} and fine-tune it, "
            "or choose data with the model's labels."
        )
    if sorted(known) == sorted(prepared.label_names) and tuple(known) != prepared.label_names:
        raise DataError(
            f"The model numbers its labels {_some(known)}, the data {_some(prepared.label_names)}: the same names in "
            "another order. Cast the label column to datasets.ClassLabel with the model's order."
        )


def find_column(rows: Dataset, role: str) -> str | None:
    """The first usual name of the role that the rows have."""
    return next((name for name in ROLES[role].usual if name in rows.column_names), None)


def need_column(
    rows: Dataset, role: str, given: str | None, usual: Mapping[str, tuple[str, ...]] | None = None
) -> str:
    """The named column, or the first usual name of its role; an error lists the columns there are."""
    columns = rows.column_names
    names = (given,) if given is not None else (usual or {}).get(role) or ROLES[role].usual
    column = next((name for name in names if name in columns), None)
    if column is None:
        what = f"called {given!r}" if given is not None else f"with a usual name ({', '.join(names)})"
        fix = "" if given is not None else f" Name it with {column_name(role)}."
        hint = did_you_mean(given, columns)
        raise DataError(f"The data has no {role} column {what}.{hint} Columns: {_some(columns)}.{fix}")
    return column


def _columns(dataset: Mapping[str, Dataset], task: Task, named: dict[str, str | None]) -> dict[str, str]:
    """The column of each role, found in train and present in test."""
    for split in ("train", "test"):
        if split not in dataset:
            raise DataError(f"The splits train and test are needed, got {_some(dataset)}: see load_dataset_any.")
        if not len(dataset[split]):
            raise DataError(f"The {split} split has no rows.")
    wanted = [*task.columns, *(role for role in task.optional if named.get(role) is not None)]
    columns = {role: need_column(dataset["train"], role, named.get(role), task.usual) for role in wanted}
    for role, column in columns.items():
        need_column(dataset["test"], f"{role} (test split)", column)
    if task.kind == "embeddings" and "label" in columns and "text_pair" not in columns:
        raise ConfigError("label_column says how alike two texts are: name the second one with text_pair_column.")
    return columns


def _classes(dataset: Mapping[str, Dataset], column: str, is_by_word: bool) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The label names and the number of each value of the column; of lists, one label for each word."""
    import datasets

    feature, test_feature = (dataset[split].features[column] for split in ("train", "test"))
    rows = [row for split in ("train", "test") for row in dataset[split][column]]
    if is_by_word:
        if not all(isinstance(each, datasets.List) for each in (feature, test_feature)):
            raise DataError(f"The label column {column!r} must hold a list with a label for each word, not {feature}.")
        feature, test_feature = feature.feature, test_feature.feature
        rows = [value for row in rows for value in row or ()]
    dtype = str(getattr(feature, "dtype", "list")) if not isinstance(feature, datasets.ClassLabel) else "int64"
    values = set(rows) if isinstance(feature, datasets.ClassLabel | datasets.Value) else set()
    if is_by_word:
        values -= {IGNORED}
    gaps = {value for value in values if is_missing(value)}
    if "float" in dtype and gaps and all(value.is_integer() for value in values - gaps):
        dtype = "int64"  # how pandas holds whole numbers where one is missing
    if isinstance(feature, datasets.List) or dtype.startswith(("float", "double", "list", "dict")):
        kind = NUMBERS if "float" in dtype else "several labels per row"
        raise DataError(f"The label column {column!r} holds {kind}; only classes (strings or integers) are supported.")
    if gaps or (isinstance(feature, datasets.ClassLabel) and values & {-1}):
        gaps |= {-1} & values
        raise DataError(
            f"The label column {column!r} has rows without a label ({_some(sorted(set(map(repr, gaps))))}"
            f"{_where(dataset['train'], column)}): give them one, or remove them."
        )
    if len(values) > MAX_LABELS:
        raise DataError(
            f"The label column {column!r} has {len(values):,} classes, at most {MAX_LABELS:,} are allowed."
        )
    if isinstance(feature, datasets.ClassLabel):
        if not isinstance(test_feature, datasets.ClassLabel) or test_feature.names != feature.names:
            raise DataError(f"The label column {column!r} has other class names or order in test than in train.")
        names, ids = tuple(feature.names), {index: index for index in range(len(feature.names))}
        if beyond := values - set(ids):
            raise DataError(
                f"The label column {column!r} has labels beyond its {len(names)} classes ({_some(sorted(beyond))}): "
                f"they count from 0 to {len(names) - 1}."
            )
    else:
        ids = {value: index for index, value in enumerate(sorted_classes(values, dataset["train"]))}
        names = tuple(map(str, ids))
    if len(values) < 2:
        present = [names[ids[value]] for value in values]
        raise DataError(f"The label column {column!r} has the single class {_some(present)}: two or more are needed.")
    return names, ids | ({IGNORED: IGNORED} if is_by_word else {})


def is_missing(label: object) -> bool:
    """Nothing, not a number, or a text of spaces."""
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def sorted_classes(values: set, rows: Dataset) -> list:
    """In the order in which they are numbered: that of text or of numbers; in a file that has only text, of numbers
    where every class is a whole number as a person would write it (`01` is not).

    Raises:
        DataError: they are numbers with a point, or of more digits than an integer of 64 bits has.
    """
    source = _source(rows)
    if source is None or not source.endswith((".csv", ".tsv")) or not all(isinstance(each, str) for each in values):
        return sorted(values)
    if all(map(WHOLE.fullmatch, values)):
        if longest := max((each for each in values if len(each) > 18), key=len, default=None):
            raise DataError(f"{source!r} has the class {longest:.60}: numbers of more than 18 digits are no classes.")
        return sorted(values, key=int)
    if all(map(DECIMAL.fullmatch, values)) and any(set(each) & set(".eE") for each in values):
        raise DataError(f"The labels of {source!r} are {NUMBERS}; only classes (strings or integers) are supported.")
    return sorted(values)


NUMBERS = "numbers (regression)"
WHOLE, DECIMAL = re.compile(r"0|-?[1-9][0-9]*"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _source(rows: Dataset) -> str | None:
    """The file that the rows were read from, if that was one of ours."""
    names = [name for name in rows.info.download_checksums or {} if os.path.splitext(name)[1] in FORMATS]
    return names[0] if len(names) == 1 else None


def _where(rows: Dataset, column: str) -> str:
    """The place of the first row without a label in the file, read again; nothing where that is not possible."""
    source = _source(rows)
    if source is None:
        return ""
    try:
        labels = read_table(source)[column]
        first = next(index for index, label in enumerate(labels) if is_missing(label))
        return f", the first on {place_of(source, first)} of {source!r}"
    except (DataError, OSError, KeyError, StopIteration):  # gone, or another file by now
        return ""


def _text_settings(tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    if tokenizer is None:
        raise ConfigError("A text task needs a tokenizer, got None: AutoTokenizer.from_pretrained(model).")
    if max_length is None:
        known = tokenizer.model_max_length
        is_length = isinstance(known, int) and 0 < known < DEFAULT_MAX_LENGTH  # a stranger's config may say anything
        max_length = known if is_length else DEFAULT_MAX_LENGTH
    if not isinstance(max_length, int) or isinstance(max_length, bool) or not 2 <= max_length <= LONGEST:
        raise ConfigError(
            f"max_length must be an integer of 2 tokens or more, at most {LONGEST:,}, got {shown(max_length)}."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError("The tokenizer has neither a pad_token nor an eos_token: set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return {"tokenizer": tokenizer, "max_length": max_length}


def _map(rows: Dataset, function: Callable, settings: dict[str, Any], batch_size: int) -> Dataset:
    """`Dataset.map` whose cache lies in the Hugging Face cache, not beside the rows (`save_to_disk` folders)."""
    import datasets
    from datasets.fingerprint import Hasher

    features = settings.get("features")
    settings = {name: value for name, value in settings.items() if name != "features"}
    cache_file = None
    if rows.cache_files and datasets.is_caching_enabled():
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_efficient"
        folder.mkdir(parents=True, exist_ok=True)
        cache_file = str(folder / f"{Hasher.hash((INPUTS, rows._fingerprint, function, settings, batch_size))}.arrow")
    mapped = rows.with_format(None).map(
        function,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        fn_kwargs=settings,
        features=features,
        remove_columns=rows.column_names,
        cache_file_name=cache_file,
    )
    return mapped.with_format("torch") if features is not None else mapped


def _some(names: Any) -> str:
    names = [f"{name!s:.60}" for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
