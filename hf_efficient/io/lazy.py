"""A table of named things whose code is imported when it is first used: names can be checked and listed at no cost.

LOSSES = LazyTable({"mse": "distillation.losses.losses:mse"})     # paths are relative to hf_efficient
"mse" in LOSSES, sorted(LOSSES), len(LOSSES)                      # imports nothing
LOSSES["mse"](student, teacher)                                   # imports distillation.losses.losses
LOSSES["own"] = my_loss                                           # an object of one's own is an entry too
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGE = __name__.partition(".")[0]


def load(path: str) -> Any:
    """What a path names: `"pruning.score.units:taylor"` is `taylor` of the module `hf_efficient.pruning.score.units`.

    Raises:
        ImportError: there is no such module, or the module has no such name.
    """
    module, _, name = path.partition(":")
    loaded = import_module(f"{PACKAGE}.{module}")
    try:
        return attrgetter(name)(loaded)
    except AttributeError as error:
        raise ImportError(f"{path!r}: {loaded.__name__} has no {name!r}.") from error


class LazyTable(MutableMapping[str, T]):
    """A dict of name -> object, or of name -> path of the object, which `load` reads at the first `table[name]`.

    `in`, iteration and `len` look at names only. An unknown name is a KeyError, as in a dict; what is told to a user
    is `errors.unknown_name(what, name, table)`.
    """

    def __init__(self, entries: Mapping[str, T | str]):
        self._entries: dict[str, T | str] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = load(entry)
        return entry

    def __setitem__(self, name: str, entry: T | str) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"LazyTable({self._entries!r})"
