"""Rows with an image or a sound and a text, through the processor of a model: tasks image-text-to-text and
automatic-speech-recognition.

    {"image": "shop.png", "text": "What is sold here?", "target": "bread"}
    {"audio": "said.wav", "text": "good morning"}

A path is relative to the file with the rows. What a processor makes of an image or a sound must have one shape in all
rows (sounds as plain samples may be of any length), as it has with processors that resize or fill up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .images import rgb_of
from .sounds import samples_of
from .text import IGNORED, strings

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS = ("input_ids", "attention_mask", "labels")
BATCH = 20  # rows that are made at once


def encoded(dataset: Mapping[str, Dataset], column: str) -> dict[str, Dataset]:
    """The splits with their images or sounds as bytes and paths: decoding is done here."""
    import datasets

    def cast(rows: Dataset) -> Dataset:
        feature = rows.features[column]
        if isinstance(feature, datasets.Image | datasets.Audio):
            return rows.cast_column(column, type(feature)(decode=False))
        return rows

    return {name: cast(rows) for name, rows in dataset.items()}


def check_processor(processor: Any, part: str) -> None:
    """ConfigError unless a processor has a tokenizer and what reads images (`image_processor`) or sounds
    (`feature_extractor`)."""
    for name in (part, "tokenizer"):
        if getattr(processor, name, None) is None:
            raise ConfigError(
                f"The processor {type(processor).__name__} has no {name}: load it with "
                "AutoProcessor.from_pretrained(model)."
            )


def media_settings(
    dataset: Mapping[str, Dataset], make: Callable[..., dict], settings: dict[str, Any]
) -> dict[str, Any]:
    """The features of what `make` gives: the first row decides the shapes."""
    import datasets
    import numpy as np

    first = {name: [value] for name, value in dataset["train"][0].items()}
    features = {}
    for name, [value] in make(first, [0], **settings).items():
        array = np.asarray(value)
        kind = "int64" if array.dtype.kind in "iub" else "float32"
        if array.ndim == 1:
            features[name] = datasets.List(datasets.Value(kind))
        else:
            features[name] = getattr(datasets, f"Array{array.ndim}D")(array.shape, kind)
    return {"features": datasets.Features(features)}


def describe(
    batch: dict, indices: list[int], *, columns: dict, ids: dict, processor: Any, max_length: int, folder: str
) -> dict:
    """A question about an image, and behind it the answer, of which alone the labels are."""
    images, questions, answers = (batch[columns["image"]], *_texts(batch, indices, columns, ("text", "target")))
    tokenizer, made = processor.tokenizer, []
    for index, image, question, answer in zip(indices, images, questions, answers, strict=True):
        with _naming(index, columns["image"]):
            pixels = rgb_of(_located(image, folder))
        inputs = processor(images=[pixels], text=[_prompt(processor, question)], return_tensors="np")
        row = {name: _one(name, values) for name, values in inputs.items()}
        prompt = len(row["input_ids"])
        if prompt >= max_length:
            raise DataError(
                f"Row {index}: the image and its question are {prompt} tokens, so that max_length={max_length} leaves "
                "none for the answer. Give a larger one, or a processor that makes fewer of an image."
            )
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *ends][: max_length - prompt]
        made.append(_with_answer(row, answer_ids))
    return _columns(made, indices)


def transcribe(
    batch: dict, indices: list[int], *, columns: dict, ids: dict, processor: Any, max_length: int, folder: str
) -> dict:
    """A sound, and the tokens of what is said in it."""
    extractor, made = processor.feature_extractor, []
    [texts] = _texts(batch, indices, columns, ("target",))
    for index, sound, text in zip(indices, batch[columns["audio"]], texts, strict=True):
        with _naming(index, columns["audio"]):
            samples = samples_of(_located(sound, folder), extractor.sampling_rate)
        inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
        row = {name: _one(name, values) for name, values in inputs.items() if name != "attention_mask"}
        labels = processor.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        start = getattr(processor.tokenizer, "prefix_tokens", [])[:1]  # of Whisper, which begins with it by itself
        made.append(row | {"labels": labels[1:] if labels[:1] == start else labels})
    return _columns(made, indices)


class Padding:
    """Pads samples to a batch: tokens on the side of the tokenizer, labels with -100, sounds on the right, with a mask
    where the feature extractor gives one. `decode` makes texts of token ids again."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        tokenizer = self.processor.tokenizer
        side = "left" if "input_ids" in samples[0] and tokenizer.padding_side == "left" else "right"
        batch = {}
        for name in samples[0]:
            rows = [torch.as_tensor(sample[name]) for sample in samples]
            if rows[0].ndim == 1:
                value = {"input_ids": tokenizer.pad_token_id or 0, "labels": IGNORED}.get(name, 0)
                batch[name] = torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)
            else:
                batch[name] = torch.stack(rows)
            if name == "input_values" and self.processor.feature_extractor.return_attention_mask:
                ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
                batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, True, 0)
        return batch

    def decode(self, ids: Any, **options: Any) -> list[str]:
        """Texts of token ids [batch, length], special tokens left out; `group_tokens=False` for labels of CTC."""
        tokenizer = self.processor.tokenizer
        ids = ids.masked_fill(ids < 0, tokenizer.pad_token_id or 0)
        return tokenizer.batch_decode(ids, skip_special_tokens=True, **options)


class _naming:
    """Whose row and column a fault is."""

    def __init__(self, index: int, column: str):
        self.place = f"Row {index}, column {column!r}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, DataError):
            raise DataError(f"{self.place}: {error}") from error


def _texts(batch: dict, indices: list[int], columns: dict, roles: tuple[str, ...]) -> list[list[str]]:
    return [strings(batch, indices, columns[role]) for role in roles]


def _located(value: Any, folder: str) -> Any:
    """A path as what `datasets` makes of it, relative to the folder of the rows."""
    if isinstance(value, str):
        return {"bytes": None, "path": value if "://" in value else os.path.join(folder, os.path.expanduser(value))}
    return value


def _prompt(processor: Any, question: str) -> str:
    """What the model was trained to answer: by its chat template, or the image and behind it the question."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ConfigError(f"{type(processor).__name__} has neither a chat_template nor an image_token. Set one.")
    return f"{token}\n{question}\n"


def _one(name: str, values: Any) -> Any:
    """The one example of a batch: most are [1, ...]; patches without a batch stay."""
    import numpy as np

    array = np.asarray(values)
    return array[0] if array.shape[:1] == (1,) else array


def _with_answer(row: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """The answer behind what is there for each token, and labels for it alone."""
    import numpy as np

    shape, behind = row["input_ids"].shape, {"input_ids": answer, "attention_mask": [1] * len(answer)}
    made = {
        name: np.concatenate([value, behind.get(name, [0] * len(answer))]) if value.shape == shape else value
        for name, value in row.items()
    }
    return made | {"labels": [IGNORED] * shape[0] + answer}


def _columns(rows: list[dict[str, Any]], indices: list[int]) -> dict[str, list]:
    import numpy as np

    for index, row in zip(indices, rows, strict=True):
        for name, value in row.items():
            shape, first = np.shape(value), np.shape(rows[0].get(name))
            if len(shape) > 1 and shape != first:
                raise DataError(
                    f"Row {index}: {name} has the shape {list(shape)}, another row {list(first)}. Set the processor "
                    "to give all of one size."
                )
    return {name: [np.asarray(row[name]) for row in rows] for name in rows[0]}
