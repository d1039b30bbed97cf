"""Tensors of one run on the disk: written whole, so that what is there is right, and read again by whoever goes on.

shelf = Shelf(folder)
shelf.put("states.3.0", {"states": states})
shelf.get("states.3.0")["states"], shelf.has("states.3.0")
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...io.disk import own_folder
from ...io.tensors import read_tensors, write_tensors

SUFFIX = ".safetensors"


class Shelf:
    """One file for each name."""

    def __init__(self, folder: Path):
        self.folder = own_folder(folder)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self._path(name), tensors)

    def get(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self._path(name))

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def drop(self, prefix: str) -> None:
        """Forget all whose names begin so."""
        for path in self.folder.glob(f"{prefix}*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"


class States(Sequence[Tensor]):
    """The states that one layer reads, batch by batch; what is set there are those that the next one reads."""

    def __init__(self, shelf: Shelf, name: str, batches: int, layer: int = 0):
        self.shelf, self.name, self.batches, self.layer = shelf, name, batches, layer

    def at(self, layer: int) -> "States":
        return States(self.shelf, self.name, self.batches, layer)

    def is_whole(self) -> bool:
        return all(self.shelf.has(self._place(self.layer, number)) for number in range(self.batches))

    def drop(self) -> None:
        self.shelf.drop(f"{self.name}.{self.layer}.")

    def put(self, number: int, states: Tensor) -> None:
        self.shelf.put(self._place(self.layer, number), {"states": states})

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number):  # type: ignore[override]
        if number >= self.batches:
            raise IndexError(number)
        return self.shelf.get(self._place(self.layer, number))["states"]

    def __setitem__(self, number: int, states: Tensor) -> None:
        place = self._place(self.layer + 1, number)
        if not self.shelf.has(place):
            self.shelf.put(place, {"states": states})

    def _place(self, layer: int, number: int) -> str:
        return f"{self.name}.{layer}.{number}"


class Kept:
    """A list of tensors on a shelf, that is filled once and read once."""

    def __init__(self, shelf: Shelf, name: str):
        self.shelf, self.name, self.count = shelf, name, 0

    def append(self, tensor: Tensor) -> None:
        self.shelf.put(f"{self.name}.{self.count}", {"tensor": tensor})
        self.count += 1

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.count):
            yield self.shelf.get(f"{self.name}.{number}")["tensor"]
