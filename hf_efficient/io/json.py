"""The one place that reads JSON which somebody else may have written.

    read_json("out/model/report.json")         # a fault is a CheckpointError with the file and what to do
    parse_json(text)                           # a fault is a ValueError

Size and depth are bounded, and text is text: a lone surrogate, which no file could hold again, is refused.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_BYTES = 1 << 26  # above any config, report, index or tokenizer of a real model
MAX_DEPTH = 100


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file; CheckpointError, with its name, if it is none, too large, not UTF-8 or not JSON."""
    target = Path(path)
    try:
        return parse_json(read_text(target, max_bytes))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"Cannot read {target} as JSON: {error}. Take the file from a good copy.") from error


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """What a file holds, as UTF-8; OSError or ValueError if it is none, is too large, or is not UTF-8."""
    if not path.is_file():
        raise ValueError("it is not a file" if path.exists() else "there is no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes, at most {max_bytes:,} are read")
    return path.read_bytes().decode("utf-8")


def parse_json(text: str, *, halves: bool = False, unique_keys: bool = False) -> Any:
    """The value of a JSON text.

    Parameters:
        halves: let half a character pass; the caller replaces it.
        unique_keys: a key that an object has twice is refused; else the last one counts.

    Raises:
        ValueError: not JSON, nested deeper than anything that is written here, or text with half a character.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("nested far too deep") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not halves and not item.isascii():
                item.encode("utf-8")  # UnicodeEncodeError is a ValueError
        level = below
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"the key {str(first_twice(key for key, _ in pairs))[:60]!r} is given twice")
    return mapping


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that stood there before."""
    known: set[str] = set()
    return next((name for name in names if name in known or known.add(name)), None)  # type: ignore[func-returns-value]
