"""Single tensors of safetensors files, read without mapping the file, and files of a few tensors, written whole.

    found = read_weights(folder)                                   # of `io.checkpoint`: the headers alone
    weight = read_tensor(found["model.norm.weight"])
    write_tensors(folder / "model-00001-of-00030.safetensors", {"model.norm.weight": weight})

A mapped shard counts as memory of the process where its address space is limited, and may be larger than that limit.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError
from .checkpoint import Tensor, read_header
from .disk import replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(entry: Tensor) -> torch.Tensor:
    """The tensor of one entry of a header, in memory of its own.

    Raises:
        CheckpointError: a dtype without a counterpart here, or a file that ends too early.
    """
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or entry.path is None:
        raise CheckpointError(
            f"{entry.path} holds numbers of the type {entry.dtype}; {', '.join(DTYPES)} can be read. Save the model "
            "anew with transformers, in float32 or bfloat16."
        )
    numbers = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view, done = memoryview(numbers.numpy()), 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{entry.path} ends too early: take it from a good copy.")
            done += count
    return numbers.view(dtype).reshape(entry.shape)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file."""
    return {name: read_tensor(entry) for name, entry in read_header(path).items()}


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, complete or not at all."""
    with replacing(path) as temporary:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, {"format": "pt"})
