"""What the header of a GGUF file says: every size is bounded by the file before anything is made of it.

    header = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    header.architecture, header.fields["llama.block_count"], header.tensors["token_embd.weight"]

The format: magic, version, the number of tensors and of fields, the fields (key, type, value), the tensors (name,
dimensions, type, offset), then their data (github.com/ggml-org/ggml, docs/gguf.md). No tensor is read here.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

INSTALL = 'pip install "hf-efficient[llm]"'
PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}  # types of tensors that hold numbers, not blocks
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_FIELDS, _MAX_TENSORS, _MAX_ITEMS = 1 << 12, 1 << 17, 1 << 22  # above any real file
_MAX_TEXT, _MAX_DIMENSIONS = 1 << 24, 4
# Sizes of which a model has a tensor. Others, such as the longest context, may be any number.
_SIZE = re.compile(r"(embedding|feed_forward|key|value)_length(_\w+)?$|vocab_size$|head_count(_kv)?$|expert_count$")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class GgufHeader:
    """`fields`: numbers and texts; of an array its length. `tensors`: name -> (shape as in PyTorch, type)."""

    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]

    @property
    def dtype(self) -> str:
        """What its weights are as floats: the narrower of a file of plain numbers, float32 of blocks."""
        kinds = {kind for _, kind in self.tensors.values()}
        if not kinds <= PLAIN.keys():
            return "float32"
        return next((PLAIN[kind] for kind in (30, 1) if kind in kinds), "float32")


def read_gguf(path: Path) -> GgufHeader:
    """The header; CheckpointError if the file is cut short, damaged, of several parts, or says what cannot be."""
    if _PART.search(path.name):
        raise CheckpointError(
            f"{path} is one part of several, which transformers does not read. Join them: llama-gguf-split --merge."
        )
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} is read with the package 'gguf', which is not installed: {INSTALL}") from error
    except (OSError, ValueError) as error:  # mmap says ValueError of an empty file
        raise CheckpointError(
            f"Cannot read the GGUF file {path}: {error}. The file is damaged or not whole: take it from a good copy."
        ) from error


class _Reader:
    """The next numbers and texts of a file; ValueError where it ends too early."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def skip(self, count: int) -> int:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise ValueError(f"it ends after {len(self.data):,} bytes, where at least {self.position:,} are needed")
        return start

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{layout}", self.data, self.skip(struct.calcsize(f"<{layout}")))

    def number(self, layout: str, most: int, what: str) -> int:
        [value] = self.numbers(layout)
        if value > most:
            raise ValueError(f"it says {value:,} {what}, at most {most:,} are read")
        return value

    def text(self) -> str:
        length = self.number("Q", _MAX_TEXT, "bytes of one text")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _FORMATS:
            return self.numbers(_FORMATS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a field of the unknown type {kind}")
        [inner] = self.numbers("I")
        count = self.number("Q", _MAX_ITEMS, "items in one list")
        if inner in _FORMATS:
            self.skip(count * struct.calcsize(_FORMATS[inner]))
        elif inner == _TEXT:
            for _ in range(count):
                self.skip(self.number("Q", _MAX_TEXT, "bytes of one text"))
        else:
            raise ValueError(f"a list of the unknown type {inner}")
        return count


def _read(data: mmap.mmap) -> GgufHeader:
    reader = _Reader(data)
    magic = data[reader.skip(4) : 4]
    if magic != b"GGUF":
        raise ValueError(f"it begins with {shown(magic)}, not with b'GGUF'")
    version = reader.number("I", 1 << 16, "for its version")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}, and 2 and 3 are read")
    tensor_count = reader.number("Q", _MAX_TENSORS, "tensors")
    fields: dict[str, Any] = {}
    for _ in range(reader.number("Q", _MAX_FIELDS, "fields")):
        key = reader.text()
        fields[key] = reader.value(reader.numbers("I")[0])
    places = dict(_tensor(reader) for _ in range(tensor_count))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {shown(alignment)}")
    start = -(-reader.position // alignment) * alignment
    for name, (shape, kind, offset) in places.items():
        if start + offset + _bytes(name, shape, kind) > len(data):
            raise ValueError(f"it ends after {len(data):,} bytes, within the tensor {shown(name)} or before it")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ValueError(f"general.architecture is {shown(architecture)}")
    header = GgufHeader(architecture, fields, {name: place[:2] for name, place in places.items()})
    _check_sizes(header)
    return header


def _tensor(reader: _Reader) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    name = reader.text()
    dimensions = reader.numbers(f"{reader.number('I', _MAX_DIMENSIONS, f'dimensions of {shown(name)}')}Q")
    kind, offset = reader.numbers("IQ")
    return name, (tuple(reversed(dimensions)), kind, offset)


def _bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(each): size for each, size in GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ValueError(f"the tensor {shown(name)} is of the unknown type {kind}; a newer package gguf may know it")
    block, width = sizes[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"the tensor {shown(name)} of shape {shown(shape)} is no whole number of blocks of {block}")
    return prod(shape) // block * width


def _check_sizes(header: GgufHeader) -> None:
    """The numbers of which a model is made can be those of the tensors: nothing larger is ever built."""
    largest = max((size for shape, _ in header.tensors.values() for size in shape), default=0)
    for key, value in header.fields.items():
        if not key.startswith(f"{header.architecture}.") or isinstance(value, bool) or not isinstance(value, int):
            continue
        most = len(header.tensors) if key.endswith("block_count") else largest if _SIZE.search(key) else None
        if most is not None and not 0 <= value <= most:
            raise ValueError(f"it says {key}: {value:,}, where its {len(header.tensors):,} tensors allow {most:,}")
