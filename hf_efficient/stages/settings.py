"""Settings as small dataclasses: each field carries the rule for its value, checked when made.

TrainingSettings(epochs=2, batch_size=32)
read(TrainingSettings, {"epohcs": 2}, "teacher")       # ConfigError: teacher.epohcs: unknown key. Did you ...
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import ConfigError, did_you_mean, shown
from ..training.precision import PRECISIONS

MAX_TOKENS = 1 << 20
MAX_BATCH = 1 << 16
MAX_STEPS = 10**9
OPTION = "option"
Words = str | Callable[[], str]


@dataclass(frozen=True)
class Rule:
    """What a field accepts, in words for the message and as a test."""

    allowed: Callable[[], str]
    accepts: Callable[[Any], bool]


def ruled(default: Any, allowed: Words, accepts: Callable[[Any], bool], optional: bool = False) -> Any:
    """A field with a rule of its own; `optional`: null is accepted too. A function as default makes a new value."""

    def words() -> str:
        return (allowed if isinstance(allowed, str) else allowed()) + ", or null" * optional

    rule = Rule(words, lambda value: (optional and value is None) or accepts(value))
    if callable(default):
        return field(default_factory=default, metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def integer(default: int | None, low: int, high: int, optional: bool = False) -> Any:
    allowed = f"an integer from {low} to {high}"
    return ruled(default, allowed, lambda value: type(value) is int and low <= value <= high, optional)


def number(default: float | None, low: float, high: float, above: bool = False, optional: bool = False) -> Any:
    """`above`: more than `low`, instead of at least."""
    return ruled(
        default,
        f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}",
        lambda value: type(value) in (int, float) and (low < value if above else low <= value) and value <= high,
        optional,
    )


def text(default: str | None = None, optional: bool = True) -> Any:
    return ruled(default, "text", lambda value: isinstance(value, str) and value.strip() != "", optional)


def one_of(default: str | None, names: Collection[str], optional: bool = False) -> Any:
    """`names` may be a table: what is added to it later is accepted too."""
    return ruled(
        default,
        lambda: f"one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value in names,
        optional,
    )


def flag(default: bool) -> Any:
    return ruled(default, "true or false", lambda value: isinstance(value, bool))


def option() -> Any:
    """A field that is an argument of another class, which checks it; null: its default."""
    return field(default=None, metadata={OPTION: True})


@dataclass(frozen=True)
class Settings:
    """Base of the sections: checks every field by its rule; whole numbers in float fields become floats."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, rule = getattr(self, entry.name), entry.metadata.get("rule")
            if rule is not None and not rule.accepts(value):
                raise ConfigError(f"{entry.name} must be {rule.allowed()}, got {shown(value)}.")
            if entry.type in (float, "float"):
                object.__setattr__(self, entry.name, float(value))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


S = TypeVar("S", bound=Settings)


def read(settings: type[S], section: Any, path: str) -> S:
    """The section made of a mapping; every message starts with the path of the faulty key."""
    check_keys(section, keys_of(settings), path)
    try:
        return settings(**section)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


def make(config: type, values: dict[str, Any], path: str) -> Any:
    """A config of another room made of checked keys; what it says is wrong gets the path."""
    try:
        return config(**values)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError; TypeError: a list where text is needed
        raise ConfigError(f"{path}: {error}") from error


def keys_of(config: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(config)]


def part(section: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What a mapping says under these keys, in their order."""
    return {key: section[key] for key in keys if key in section}


def check_keys(section: Any, known: list[str], path: str) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(known)}, got {shown(section)}.")
    for key in section:
        if key not in known:
            name = key if isinstance(key, str) and len(key) <= 80 else shown(key)
            raise ConfigError(f"{path}.{name}: unknown key.{did_you_mean(key, known)} Known: {', '.join(known)}.")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """One fine-tuning: what a recipe may say of `TrainingArguments`. `max_steps` wins over `epochs`."""

    epochs: float = number(1.0, 0, 10_000, above=True)
    max_steps: int | None = integer(None, 1, MAX_STEPS, optional=True)
    batch_size: int = integer(16, 1, MAX_BATCH)
    learning_rate: float = number(5e-5, 0, 10, above=True)
    warmup_ratio: float = number(0.1, 0, 0.99)
    weight_decay: float = number(0.0, 0, 10)
    max_length: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens; null: as data.max_length
    mixed_precision: str | None = one_of(None, PRECISIONS, optional=True)  # null: float32
    group_by_length: bool = flag(True)  # texts of nearly one length in a batch; false: random rows

    def to_dict(self) -> dict[str, Any]:
        """`mixed_precision` and `group_by_length` only where they are asked for."""
        written = super().to_dict()
        if self.mixed_precision is None:
            del written["mixed_precision"]
        if self.group_by_length:
            del written["group_by_length"]
        return written
