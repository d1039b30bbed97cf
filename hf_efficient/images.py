"""Images to `pixel_values` with numpy and torch alone, or through an AutoImageProcessor where one is given.

An image is a Pillow image, or numbers shaped [H, W], [H, W, C] or [C, H, W] with C = 1 or 3: integers
0..255 or floats 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


def image_settings(
    dataset: Mapping[str, Dataset], column: str, processor: Any, image_size: int | None
) -> dict[str, Any]:
    """The arguments of `images_to_inputs`, and the features of its result, whose shape the first row decides."""
    import datasets

    wrong = isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= 4096
    if image_size is not None and (wrong or processor is not None):
        raise ConfigError(
            f"image_size must be an integer from 1 to 4096, and only where there is no image processor (which has its "
            f"own size), got {image_size!r}."
        )
    first = _pixel_values([dataset["train"][0][column]], [0], column, processor, image_size)[0]
    features = datasets.Features(pixel_values=datasets.Array3D(first.shape, "float32"), labels=datasets.Value("int64"))
    return {"processor": processor, "image_size": image_size, "shape": first.shape, "features": features}


def images_to_inputs(
    batch: dict,
    indices: list[int],
    *,
    columns: dict,
    ids: dict,
    processor: Any,
    image_size: int | None,
    shape: tuple[int, ...],
) -> dict:
    column = columns["image"]
    pixels = _pixel_values(batch[column], indices, column, processor, image_size)
    for index, image in zip(indices, pixels, strict=True):
        if image.shape != shape:
            raise DataError(
                f"Row {index} has an image of shape {image.shape} in column {column!r}, the first row {shape}: "
                "give image_size (or an image processor) to bring them to one size."
            )
    return {"pixel_values": pixels, "labels": [ids[value] for value in batch[columns["label"]]]}


def _pixel_values(
    images: list, indices: list[int], column: str, processor: Any, image_size: int | None
) -> list[np.ndarray]:
    """float32 [C, H, W] each: by the processor (as RGB), or mapped from 0..1 to -1..1."""
    import numpy as np

    arrays = [_unit_array(image, index, column) for image, index in zip(images, indices, strict=True)]
    if processor is None:
        return [(2 * _resized(array, image_size) - 1).astype("float32") for array in arrays]
    rgb = [np.broadcast_to((array * 255).round().astype("uint8"), (3, *array.shape[1:])) for array in arrays]
    channels_last = [np.ascontiguousarray(array.transpose(1, 2, 0)) for array in rgb]
    inputs = processor(images=channels_last, input_data_format="channels_last", return_tensors="np")
    return list(np.asarray(inputs["pixel_values"], dtype="float32"))


def _unit_array(image: Any, index: int, column: str) -> np.ndarray:
    """[C, H, W], floats 0..1."""
    import numpy as np

    if not isinstance(image, (list, np.ndarray)):
        if not hasattr(image, "convert"):
            raise DataError(f"Row {index} has {image!r:.80} in the image column {column!r}, where an image is needed.")
        image = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    try:
        array = np.asarray(image)
    except ValueError:  # rows of different length
        array = np.asarray(None)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in (1, 3):
        array = array.transpose(2, 0, 1)
    top = {"i": 255, "u": 255, "f": 1, "b": 1}.get(array.dtype.kind)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.size or top is None:
        raise DataError(
            f"Row {index} has shape {array.shape} and type {array.dtype} in the image column {column!r}; an image is "
            "[H, W], [H, W, C] or [C, H, W] with C = 1 or 3."
        )
    if not 0 <= array.min() <= array.max() <= top:  # also false for NaN
        raise DataError(
            f"Row {index} has values from {array.min()} to {array.max()} in the image column {column!r}; integers "
            "must lie in 0..255, floats in 0..1."
        )
    return array / top


def _resized(array: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or array.shape[1:] == (size, size):
        return array
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(array)[None], size=(size, size), mode="bilinear", antialias=True
    )
    return resized[0].clamp(0, 1).numpy()
