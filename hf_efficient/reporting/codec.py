"""Plain dicts back into dataclasses with every type checked, and settings made fit to be published.

decode(Score, {"name": "accuracy", "value": 0.9, ...}, "report.json")
clean({"output_dir": "/home/me/runs/a", "hub_token": "hf_..."})      # {"output_dir": "a"}
"""

import dataclasses
import functools
import math
import os
import re
import types
import typing
from typing import Any

from ..errors import CheckpointError, shown

MAX_INTEGER = 1 << 1000  # a larger one is no float

# An absolute path of two or more parts (Unix, `~`, Windows); group 1 is the last part, all that is kept of it.
_PATH = re.compile(r"(?<![\w/.~\\-])(?!(?<=:)//)(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:'\"]+)*[/\\]([^\s/\\:'\"]+)[/\\]?")
_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_key)$", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")


def clean(value: Any) -> Any:
    """A JSON-ready copy without secrets and absolute paths: keys become strings, tuples of dict values become lists.

    A tuple given at the top stays a tuple. Cleaning twice changes nothing.
    """
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not _SECRET_KEY.search(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _plain_text(os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def _plain_text(text: str) -> str:
    text = _SECRET.sub("[removed]", text).replace("file://", "")
    home = os.path.expanduser("~")
    if len(home) > 1:  # a user name with a space in it is still one part of a path
        text = text.replace(home + os.sep, "~/")
    if os.path.isabs(text) and "\n" not in text:
        return os.path.basename(text.rstrip("/\\")) or "/"
    return _PATH.sub(r"\1", text)


def decode(cls: type, data: Any, source: str) -> Any:
    """Build the dataclass `cls` from a dict.

    Raises:
        CheckpointError: a missing or unknown field or a value of the wrong type; it names the field and `source`.
    """
    if not isinstance(data, dict):
        raise _damaged(source, cls.__name__, f"expected a mapping, got {shown(data)}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise _damaged(source, f"{cls.__name__}.{shown(key)[1:-1]}", "unknown field")
    values = {}
    hints = _hints(cls)
    for name, item in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], source, f"{cls.__name__}.{name}")
        elif item.metadata.get("later"):
            continue
        elif item.default is dataclasses.MISSING or cls.__name__ == "Report":
            raise _damaged(source, f"{cls.__name__}.{name}", "missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise _damaged(source, cls.__name__, str(error)) from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, source: str, where: str) -> Any:
    """`value` as what the annotation says; only the forms that the schema uses are known."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [item for item in arguments if item is not type(None)]
        return None if value is None else _value(inner[0], value, source, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return decode(hint, value, source)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, source, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, source, where) for key, item in value.items()}
    if hint is float and value in ("nan", "inf", "-inf"):
        return float(value)
    if hint is float and (type(value) is float or (type(value) is int and abs(value) < MAX_INTEGER)):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise _damaged(source, where, f"expected {hint}, got {shown(value)}")


def _damaged(source: str, where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{source} is damaged at {where}: {why}. Write it again, or take it from a good copy.")
