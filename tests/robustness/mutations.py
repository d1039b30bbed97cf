"""Documents that were right once: dropped, renamed, swapped, nested, made huge, by a source of choices.

    broken = mutated({"seed": 0, "stages": []}, pick)      # pick(n) gives a number from 0 to n - 1

The source is hypothesis in the tests, and the coverage-guided fuzzer in scripts/fuzz.py.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

Pick = Callable[[int], int]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.0, 5e-324, 0.5, math.nan, math.inf,
    "", " ", "\0", "\ud800", "\ufeff", "null", "1e5", "2:4", "0-4", "3::4", "²", "true", "~", ".", "../x", "x" * 5000,
    "bundled:", "kind", "local", "full", "head", "nan", "🤗", [], [[]], {}, {"": None}, {"kind": "local"}, [0, 0],
    {"0": {}}, {"all": {"kind": "full"}}, ["head", "head"], list(range(2000)),
)  # fmt: skip
KEYS = (
    "",
    "kind",
    "layers",
    "ratio",
    "version",
    "stacks",
    "all",
    "0",
    "1-4",
    "options",
    "extra",
    "efficient",
    "é",
    "\0",
)
# Inserted into the text of a document; YAML has a meaning for most of them.
SNIPPETS = (
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['true']\n", "!!binary aGk=", "!mine ", "? ", "---\n",
    "...\n", "\t", "'", '"', "{", "[", "]", "}", ": ", "- ", "#", "|\n", ">\n", "%YAML 1.1\n", "\ufeff", "2024-01-01",
    "0x1F", "1_000", "1:30:00", ".nan", "-.inf", "!!set {a}", "!!omap [a: 1]", "\x01", "\r", "\u2028", "=",
)  # fmt: skip


def mutated(document: Any, pick: Pick, most: int = 3) -> Any:
    """A copy after one to `most` changes."""
    copied = copy.deepcopy(document)
    for _ in range(1 + pick(most)):
        copied = _changed(copied, pick)
    return copied


def scrambled(text: str, pick: Pick, most: int = 3) -> str:
    """The text after up to `most` lines were repeated, dropped, moved in, or given a snippet."""
    for _ in range(pick(most + 1)):
        lines = text.split("\n")
        row, kind = pick(len(lines)), pick(5)
        line = lines[row]
        column = pick(len(line) + 1)
        if kind == 0:
            lines.insert(row, line)
        elif kind == 1:
            del lines[row]
        elif kind == 2:
            lines[row] = "  " * pick(4) + line.strip()
        elif kind == 3:
            lines[row] = line[:column]
        else:
            lines[row] = line[:column] + SNIPPETS[pick(len(SNIPPETS))] + line[column:]
        text = "\n".join(lines)
    return text


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it."""
    found, level = [], [document]
    while level:
        container = level.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                level.append(container[key])
    return found


def _changed(document: Any, pick: Pick) -> Any:
    where = places(document) if isinstance(document, dict | list) else []
    if not where or pick(50) == 0:
        return ODD[pick(len(ODD))]
    container, key = where[pick(len(where))]
    other, other_key = where[pick(len(where))]
    value, kind = container[key], pick(8)
    if kind <= 1:
        container[key] = copy.deepcopy(ODD[pick(len(ODD))])
    elif kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, dict):
        container[_renamed(key, pick)] = container.pop(key)
    elif kind == 4:
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 5:
        container[key] = [value] if pick(2) else {str(KEYS[pick(len(KEYS))]): value}
    elif kind == 6:
        for _ in range(1 + pick(150)):
            value = [value]
        container[key] = value
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(value))
    else:
        container[KEYS[pick(len(KEYS))]] = copy.deepcopy(value)
    return document


def _renamed(key: Any, pick: Pick) -> Any:
    name = str(key)
    return (name + "s", name[1:], name.upper(), KEYS[pick(len(KEYS))], 3, None, ("a",))[pick(7)]
