"""Images to `pixel_values` with numpy and torch alone, or through an AutoImageProcessor where one is given.

An image is a `datasets.Image`, or numbers shaped [H, W], [H, W, C] or [C, H, W] with C = 1 or 3: integers
0..255 (0..65535 where the column's type is uint16) or floats 0..1.

    read_image(Path("scan.png").read_bytes())           # [C, H, W], floats 0..1

No value is clipped. Black is 0 and white is 1: of 16 bits 65535 is white; images of 32 bits must hold 16-bit values,
floats lie in 0..1. Grey images (L, 16 or 32 bits, floats) have one channel, all others are RGB. What is transparent is
laid upon white, as a viewer shows it, and EXIF turns the image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, shown
from ..io.secrets import without_secrets

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from datasets import Dataset

MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb
_HERE = {"file", "zip", "tar", "gzip", "hf"}  # where an image may lie: in files, archives, and on the Hub
GREY = ("1", "L", "LA", "I", "F", "I;16")  # modes of a datasets.Image that ask for one channel


def undecoded(dataset: Mapping[str, Dataset], column: str) -> dict[str, Dataset]:
    """The splits with their images as encoded: `datasets` would clip them to 8 bits where its feature has a mode."""
    import datasets

    def cast(rows: Dataset) -> Dataset:
        feature = rows.features[column]
        if not isinstance(feature, datasets.Image):
            return rows
        return rows.cast_column(column, datasets.Image(mode=feature.mode, decode=False))

    return {name: cast(rows) for name, rows in dataset.items()}


def stack(processor: Any) -> Callable:
    """Images have one size: nothing is padded."""
    import transformers

    return transformers.default_data_collator


def image_settings(
    dataset: Mapping[str, Dataset], column: str, processor: Any, image_size: int | None
) -> dict[str, Any]:
    """The arguments of `images_to_inputs`, and the features of its result, whose shape the first row decides."""
    import datasets

    wrong = isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= 4096
    if image_size is not None and (wrong or processor is not None):
        raise ConfigError(
            f"image_size must be an integer from 1 to 4096, and only where there is no image processor (which has its "
            f"own size), got {shown(image_size)}."
        )
    feature = dataset["train"].features[column]
    settings = {"processor": processor, "image_size": image_size, "mode": getattr(feature, "mode", None)}
    while hasattr(feature, "feature"):  # lists of lists
        feature = feature.feature
    settings["white"] = 65535 if getattr(feature, "dtype", None) == "uint16" else 255
    first = _pixel_values([dataset["train"][0][column]], [0], column, **settings)[0]
    features = datasets.Features(pixel_values=datasets.Array3D(first.shape, "float32"), labels=datasets.Value("int64"))
    return settings | {"shape": first.shape, "features": features}


def images_to_inputs(
    batch: dict, indices: list[int], *, columns: dict, ids: dict, shape: tuple[int, ...], **settings: Any
) -> dict:
    column = columns["image"]
    pixels = _pixel_values(batch[column], indices, column, **settings)
    for index, image in zip(indices, pixels, strict=True):
        if image.shape != shape:
            raise DataError(
                f"Row {index} has an image of shape {image.shape} in column {column!r}, the first row {shape}: "
                "give image_size (or an image processor) to bring them to one size."
            )
    return {"pixel_values": pixels, "labels": [ids[value] for value in batch[columns["label"]]]}


def read_image(data: bytes, *, mode: str | None = None) -> np.ndarray:
    """An encoded image as floats 0..1, [C, H, W].

    Parameters:
        mode: of a `datasets.Image`: decides between one channel and three; None: as the image is.

    Raises:
        DataError: not an image or a damaged one, more than 89 million pixels, or values whose white is not known.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        image = PIL.Image.open(io.BytesIO(data))
        if image.format in ("EPS", "WMF"):
            raise DataError(f"{image.format} is a program that draws, and is not run. Save it as PNG.")
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded.")
        image.load()
        sixteen = image.format == "PNG" and image.mode == "I"
        if image.getexif().get(PIL.Image.ExifTags.Base.Orientation) is not None:
            image = PIL.ImageOps.exif_transpose(image)
        return _from_pillow(image, mode, sixteen)
    except DataError:
        raise
    except Exception as error:  # the decoders raise whatever the bytes make them run into
        raise DataError(
            f"the image cannot be decoded ({str(error)[:200] or type(error).__name__}): mend or remove it."
        ) from error


def _from_pillow(image: PIL.Image.Image, mode: str | None, sixteen: bool) -> np.ndarray:
    import numpy as np
    import PIL.Image

    is_grey = mode in GREY
    if image.mode[0] in "IF":
        array = np.asarray(image).astype("float64")
        low, high = array.min(), array.max()
        white = 1 if image.mode == "F" else 65535
        if not 0 <= low <= high <= white:  # also false for NaN
            raise DataError(
                f"its values go from {low:g} to {high:g} (mode {image.mode}), where 0 is black and {white} white. "
                "Scale it."
            )
        if image.mode == "I" and not sixteen and 0 < high < 256:
            raise DataError(
                f"it has 32 bits, and no value above {high:g}: nobody knows if 255 or 65535 is white. Save it with 8 "
                "or 16 bits."
            )
        array = array[None] / white
        return array if is_grey or mode is None else np.repeat(array, 3, axis=0)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(paper, image)
    if is_grey or (mode is None and image.mode == "L"):
        return np.asarray(image.convert("L"))[None] / 255
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1) / 255


def _pixel_values(
    images: list,
    indices: list[int],
    column: str,
    *,
    processor: Any,
    image_size: int | None,
    mode: str | None,
    white: int,
) -> list[np.ndarray]:
    """float32 [C, H, W] each: by the processor (as RGB of 8 bits), or mapped from 0..1 to -1..1."""
    import numpy as np

    arrays = []
    for image, index in zip(images, indices, strict=True):
        try:
            arrays.append(_unit_array(image, mode, white))
        except DataError as error:
            raise DataError(f"Row {index}, image column {column!r}: {error}") from error
    if processor is None:
        return [(2 * _resized(array, image_size) - 1).astype("float32") for array in arrays]
    channels_last = [_rgb(array) for array in arrays]
    inputs = processor(images=channels_last, input_data_format="channels_last", return_tensors="np")
    return list(np.asarray(inputs["pixel_values"], dtype="float32"))


def rgb_of(image: Any) -> np.ndarray:
    """An image of a row as RGB of 8 bits, [H, W, 3]: a `datasets.Image`, or numbers; DataError if it is none."""
    return _rgb(_unit_array(image, None, 255))


def _rgb(array: np.ndarray) -> np.ndarray:
    import numpy as np

    channels = np.broadcast_to((array * 255).round().astype("uint8"), (3, *array.shape[1:]))
    return np.ascontiguousarray(channels.transpose(1, 2, 0))


def _unit_array(image: Any, mode: str | None, white: int) -> np.ndarray:
    """[C, H, W], floats 0..1."""
    import numpy as np

    if isinstance(image, dict) and {"bytes", "path"} <= image.keys():
        return read_image(bytes_of(image), mode=mode)
    if not isinstance(image, (list, np.ndarray)):
        raise DataError(f"it has {shown(image)}, where an image is needed.")
    try:
        array = np.asarray(image)
    except (ValueError, OverflowError):  # rows of different length
        array = np.asarray(None)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in (1, 3):
        array = array.transpose(2, 0, 1)
    top = {"i": white, "u": white, "f": 1, "b": 1}.get(array.dtype.kind)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.size or top is None:
        raise DataError(
            f"it has shape {array.shape} and type {array.dtype}; an image is [H, W], [H, W, C] or [C, H, W] with "
            "C = 1 or 3."
        )
    if not 0 <= array.min() <= array.max() <= top:  # also false for NaN
        raise DataError(
            f"it has values from {array.min()} to {array.max()}; integers must lie in 0..{white}, floats in 0..1."
        )
    return array / top


def bytes_of(image: Mapping[str, Any], what: str = "image") -> bytes:
    """The encoded image or sound: in the row, in a file that it names, or behind an address of the Hub."""
    data, path = image["bytes"], image["path"]
    if data is not None:
        return data
    if path is None:
        raise DataError(f"it has no {what}: neither bytes nor a path.")
    try:
        if "://" in path:
            import fsspec

            kinds = {part.partition("://")[0].lower() for part in path.split("::") if "://" in part}
            if not kinds <= _HERE:
                raise DataError(
                    f"the {what} lies at {without_secrets(path)!r}, and {what}s are read from files and from the Hub. "
                    "Download it, and name the file."
                )
            with fsspec.open(path, "rb") as file:
                return file.read()
        if not Path(path).is_file():
            raise DataError(f"there is no {what} file {path!r}.")
        return Path(path).read_bytes()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the {what} {path!r} cannot be read: {error}") from error


def _resized(array: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or array.shape[1:] == (size, size):
        return array
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(array)[None], size=(size, size), mode="bilinear", antialias=True
    )
    return resized[0].clamp(0, 1).numpy()
