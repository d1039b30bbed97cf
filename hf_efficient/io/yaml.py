"""YAML and plain values from strangers: no tags, no aliases, no duplicate keys, no NaN, nothing deep or huge.

parse("learning_rate: 1e-4")          # {"learning_rate": 0.0001}: unlike PyYAML's own reading, which is a string
plain(value, "recipe")                # a copy made of dict, list, str, int, float, bool and None only
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..errors import ConfigError, shown

MAX_CHARACTERS = 1 << 16
MAX_DEPTH = 20
MAX_VALUES = 10_000
MAX_INTEGER = (1 << 63) - 1


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2: 1e-4 is a float, 1:30 is text, not 90. It refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag not in (f"{_TAG}int", f"{_TAG}float")]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SIGNS = list("-+.0123456789")
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), _SIGNS)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?((\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"),
    _SIGNS,
)


def parse(text: str, source: str = "YAML") -> Any:
    """The value of a YAML text, `plain`; any fault is a ConfigError that starts with `source`."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source}: {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source}: the alias *{event.anchor} is not allowed: write the value out.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source}: nested deeper than {MAX_DEPTH} levels.")
        value = yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: impossible dates, integers of 5,000 digits
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    return plain(value, source)


def plain(value: Any, path: str) -> Any:
    """A copy made of plain values; whatever else is in there is a ConfigError that names where."""
    return _copy(value, path, 0, iter(range(MAX_VALUES)))


def _copy(value: Any, path: str, depth: int, budget: Iterator[int]) -> Any:
    if next(budget, None) is None:  # shared references can unfold to any size
        raise ConfigError(f"{path}: more than {MAX_VALUES:,} values.")
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if type(key) is int and 0 <= key <= MAX_INTEGER:
                key = str(key)  # layer numbers
            if not isinstance(key, str) or not _is_text(key):
                raise ConfigError(f"{path}: a key must be text, got {shown(key)}.")
            copy[key] = _copy(item, f"{path}.{shown(key)[1:-1]}", depth + 1, budget)
        return copy
    if isinstance(value, list | tuple):
        return [_copy(item, f"{path}[{index}]", depth + 1, budget) for index, item in enumerate(value)]
    if value is None or type(value) is bool:
        return value
    if type(value) is str and _is_text(value):
        return value
    if (type(value) is int and abs(value) <= MAX_INTEGER) or (type(value) is float and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{path} must be text, a finite number of at most 64 bits, true, false, null, a list or a mapping, "
        f"got {shown(value)} ({type(value).__name__})."
    )


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
