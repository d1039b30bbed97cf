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
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, shown
from .secrets import is_secret, without_secrets

MAX_INTEGER = 1 << 1000  # a larger one is no float

# An absolute path of two or more parts (Unix, `~`, Windows); group 1 is the last part, all that is kept of it.
_PATH = re.compile(
    r"(?<![\w/.~\\-])(?!(?<=:)//|\\u[0-9a-f]{4})(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:'\"]+)*[/\\]([^\s/\\:'\"]+)[/\\]?"
)


def clean(value: Any, secrets: Iterable[str | None] = ()) -> Any:
    """A JSON-ready copy without secrets and absolute paths: keys become strings, tuples of dict values become lists.

    A tuple given at the top stays a tuple, and a dataclass stays one. Cleaning twice changes nothing.

    Parameters:
        secrets: known ones, such as the caller's token, to be removed in whatever form they appear.
    """
    secrets = tuple(secrets)
    if isinstance(value, tuple):
        return tuple(clean(item, secrets) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        cleaned = {name: clean(item, secrets) for name, item in fields.items() if not _is_number(item)}
        changed = {name: item for name, item in cleaned.items() if item != fields[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return _plain(value, secrets)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _plain(value: Any, secrets: tuple[str | None, ...]) -> Any:
    if isinstance(value, dict):
        return {
            _plain_text(str(key), secrets): _plain(item, secrets)
            for key, item in value.items()
            if not is_secret(str(key), item)
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, secrets) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if _is_number(value):
        return value
    return _plain_text(os.fspath(value) if isinstance(value, os.PathLike) else str(value), secrets)


def _plain_text(text: str, secrets: tuple[str | None, ...]) -> str:
    if len(text) < 16 and text.isidentifier() and not secrets:
        return text  # most are keys, and a secret or a path has more letters or other signs
    text = without_secrets(text, secrets).replace("file://", "")
    home = os.path.expanduser("~")
    if len(home) > 1:  # a user name with a space in it is still one part of a path
        text = text.replace(home + os.sep, "~/")
    if os.path.isabs(text) and "\n" not in text:
        text = os.path.basename(text.rstrip("/\\")) or "/"
    else:
        text = _PATH.sub(r"\1", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # bytes of a path that are no text


def encode(value: Any) -> Any:
    """A dataclass as `dataclasses.asdict` has it, without the fields that are `unsaid` while they have their default:
    so that what an older version wrote is written as it was."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((each, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {
            each.name: encode(one) for each, one in pairs if not (each.metadata.get("unsaid") and one == each.default)
        }
    if isinstance(value, Mapping):
        return {name: encode(one) for name, one in value.items()}
    return type(value)(map(encode, value)) if type(value) in (list, tuple) else value


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


_hints = functools.cache(typing.get_type_hints)


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
