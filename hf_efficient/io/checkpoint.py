"""What must hold of a checkpoint folder before transformers reads it: files that are its own, and plausible numbers.

    check_links(folder)
    tensors = read_weights(folder)                      # {name: Tensor(dtype, shape)} of the headers alone
    check_config(folder / "config.json", len(tensors))

Nothing here needs PyTorch, and nothing is read but JSON and the headers of safetensors files.
"""

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from .json import MAX_BYTES, parse_json, read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
MAX_CONFIG = 1 << 23  # bytes: a name for each of 100,000 labels
_MAX_HEADER = 100_000_000  # the limit of safetensors itself
_MAX_LABELS = 1 << 17  # or as many as a weight has rows
_MAX_COUNT = 1 << 16
_FEW = 64  # layers that a model may have whatever its file holds: they may share their weights
_READ = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py", ".bin", ".gguf"}
# Numbers that say how often a constructor goes round a loop; the sizes of tensors are compared with the weights.
_COUNT = re.compile(r"(^|_)(layers?|blocks?|heads?|experts|groups|stages|depth|codebooks)$")
_LAYERS = re.compile(r"^((num|n|encoder|decoder)_.*)?(layers?|blocks|depth)$")
_LABELS = re.compile(r"(^|_)num_(labels|classes)( |$)")


@dataclass(frozen=True)
class Tensor:
    """What the header of a safetensors file says of one tensor: `size` numbers, from byte `start` to `stop` of it."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    path: Path | None = None
    start: int = 0
    stop: int = 0

    @property
    def is_integer(self) -> bool:
        return self.dtype[0] in "IU" or self.dtype == "BOOL"


def check_links(folder: Path) -> None:
    """CheckpointError if a file that loading reads lies neither in the folder nor in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [folder.resolve(), Path(HF_HUB_CACHE).resolve()]
    if folder.resolve().parent.name == "snapshots":  # of a Hub cache, wherever it lies
        roots.append(folder.resolve().parent.parent / "blobs")
    for path in folder.iterdir():
        if not path.is_symlink() or path.suffix not in _READ or path.is_dir():
            continue
        target = Path(path.resolve(strict=False)) if path.exists() else None
        if target is None:
            raise CheckpointError(f"{path} is a link to nothing. Take the file from a good copy.")
        if not any(target.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{path} is a link to {target}, outside of the folder. Put the file itself there (cp -L copies what a "
                "link leads to), or link the whole folder."
            )


def read_mapping(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError as `read_json`, or if it holds something else."""
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object {{...}}, got {shown(value)}. Take it from a good copy.")
    return value


def check_processor(folder: Path, images: bool) -> None:
    """CheckpointError unless the files of a tokenizer or image processor are objects, and their classes names."""
    for name in _PROCESSOR if images else _TOKENIZER:
        if (folder / name).is_file():
            data = read_mapping(folder / name)
            for field in ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type"):
                _of_type(data.get(field), (str, type(None)), field, folder / name)
            _of_type(data.get("auto_map"), (dict, type(None)), "auto_map", folder / name)


def check_config(path: Path, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """config.json with names where names belong, and no more layers than there are weights.

    Parameters:
        tensors: what the weight files hold, where that is known.

    Raises:
        CheckpointError: it is not so.
    """
    data = read_mapping(path, MAX_CONFIG)
    _of_type(data.get("model_type"), (str, type(None)), "model_type", path)
    _of_type(data.get("architectures"), (list, type(None)), "architectures", path)
    for name in data.get("architectures") or ():
        _of_type(name, (str,), "architectures", path)
    for field in ("id2label", "label2id", "auto_map", "quantization_config", "rope_scaling", "rope_parameters"):
        _of_type(data.get(field), (dict, type(None)), field, path)
    _of_type(data.get("transformers_weights"), (str, type(None)), "transformers_weights", path)
    layers = max(_FEW, len(tensors)) if tensors else _MAX_COUNT
    labels = max((size for tensor in (tensors or {}).values() for size in tensor.shape), default=0)
    _check_counts(data, path, layers, max(_MAX_LABELS, labels))
    return data


def _check_counts(data: dict[str, Any], path: Path, layers: int, labels: int) -> None:
    for field, value in data.items():
        if field in ("id2label", "label2id") and isinstance(value, dict):
            field, value = f"num_labels ({field})", len(value)
        if isinstance(value, dict):
            _check_counts(value, path, layers, labels)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if _LABELS.search(field):
            low, high = 0, labels
        elif _LAYERS.search(field):
            low, high = 0, layers
        else:
            low, high = -(1 << 62), _MAX_COUNT if _COUNT.search(field) else 1 << 62
        if not low <= value <= high:
            raise CheckpointError(
                f"{path} says {field}: {shown(value)}, where {low:,} to {high:,} can be (with its weights, where they "
                "are known). Take config.json and the weights from the same checkpoint."
            )


def _of_type(value: Any, kinds: tuple[type, ...], field: str, path: Path) -> None:
    if not isinstance(value, kinds):
        names = {str: "text", dict: "an object {...}", list: "a list", type(None): "null"}
        allowed = " or ".join(names[kind] for kind in kinds)
        raise CheckpointError(f"{path} has {field}: {shown(value)}, must be {allowed}. Take it from a good copy.")


def read_weights(folder: Path, explicit: str | None = None) -> dict[str, Tensor]:
    """The tensors of a folder, by the headers of its safetensors files; {} where it has none (an adapter).

    Parameters:
        explicit: the file that config.json names by `transformers_weights`.

    Raises:
        CheckpointError: weights as pickles only, an index that names files outside of the folder, a damaged header.
    """
    if explicit is not None:
        names = _plain_names([explicit], folder / CONFIG)
        if explicit.endswith(".json"):
            names = _shards(folder / explicit)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        names = _shards(folder / INDEX)
    else:
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt"))]
        if pickles and not (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder} has no model.safetensors; {min(pickles)} is a pickle, which could run code when read, and "
                "is not. Load it with transformers where you trust it, and save it again with save_pretrained."
            )
        names = []
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_header(folder / name)
    return tensors


def _shards(index: Path) -> list[str]:
    """The files that an index names: plain names of files that lie beside it."""
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must have a weight_map {{tensor: file}}, got {shown(weight_map)}. {_AGAIN}")
    return _plain_names(list(weight_map.values()), index)


_AGAIN = "Take the index and the weights from a good copy."


def _plain_names(names: list[Any], source: Path) -> list[str]:
    for name in names:
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name and name not in ("", "..")
        if not plain or not name.endswith((".safetensors", ".json")):
            raise CheckpointError(
                f"{source} names the file {shown(name)}; it must be a safetensors file in the same folder. {_AGAIN}"
            )
        if not (source.parent / name).is_file():
            raise CheckpointError(f"{source} names {name}, which is not there. {_AGAIN}")
    return sorted(set(names))


def read_header(path: Path) -> dict[str, Tensor]:
    """The header of a safetensors file, and that the file is as long as it says."""
    try:
        with path.open("rb") as file:
            whole = path.stat().st_size
            [length] = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(_MAX_HEADER, whole - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {whole:,}")
            header = parse_json(file.read(length).decode("utf-8"))
            if not isinstance(header, dict):
                raise ValueError("the header is no object")
            tensors = {
                name: _tensor(name, entry, path, 8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            }
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            if max(ends, default=0) != whole - 8 - length:
                raise ValueError(f"{whole:,} bytes, where the header says {8 + length + max(ends, default=0):,}")
            return tensors
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot load the weights {path}: {error}. The file is damaged or not whole: take it from a good copy."
        ) from error


def _tensor(name: str, entry: Any, path: Path, begin: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    numbers = [*shape, *place] if isinstance(shape, list) and isinstance(place, list) else [None]
    whole = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
    if not (isinstance(dtype, str) and dtype and whole and len(place) == 2 and place[0] <= place[1]):
        raise ValueError(f"the entry of {shown(name)} says {shown(entry)}")
    return Tensor(dtype, tuple(shape), prod(shape), path, begin + place[0], begin + place[1])
