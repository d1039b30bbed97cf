"""The errors a user can cause. Each message says what was given, what is allowed, and what to do.

They subclass the built-in exception a caller would expect, so `except ValueError` keeps working.
"""

from collections.abc import Iterable

from .io.secrets import without_secrets
from .io.text import for_terminal


class HfEfficientError(Exception):
    """Base of every error raised on purpose by hf_efficient."""

    def __str__(self) -> str:
        # What was given is in the message: no secret of it is told, and no terminal obeys it.
        return for_terminal(without_secrets(super().__str__()))


class ConfigError(HfEfficientError, ValueError):
    """A value in a config, recipe or command line that is not allowed."""


class UnsupportedModelError(HfEfficientError, ValueError):
    """A model, or a combination of model and method, that cannot be handled."""


class DataError(HfEfficientError, ValueError):
    """A data set or file that does not hold what was asked of it."""


class CheckpointError(HfEfficientError, OSError):
    """A folder or checkpoint that is missing, corrupted, or would be overwritten."""


class TrainingError(HfEfficientError, RuntimeError):
    """Training that cannot go on: a loss that is not finite, or one example that does not fit into memory."""


class RequirementError(HfEfficientError):
    """A result that was made and measured, and does not reach what was required: `misses` has a line for each."""

    def __init__(self, misses: Iterable[str]):
        self.misses = list(misses)
        super().__init__(f"The result is there, and misses what is required: {'; '.join(self.misses)}.")


def shown(value: object) -> str:
    """`repr` for a message: at most 80 characters, whatever the value is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of 5,000 digits, a list nested 10,000 deep
        return f"something of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def check_positive(name: str, value: object, least: int = 1, otherwise: str = "") -> None:
    """Refuse what is not an integer (`True` is none) of at least `least`; `otherwise` is what else is allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        allowed = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{name} must be {allowed}{otherwise}, got {shown(value)}.")


def unknown_name(what: str, given: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: names the nearest match and lists what is known.

    Example: `raise unknown_name("attention kind", "locla", KINDS)`.
    """
    names = sorted(map(str, known))
    return ConfigError(f"Unknown {what} {shown(given)}.{did_you_mean(given, names)} Known: {', '.join(names)}.")


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: ` Did you mean 'local'?`, or nothing."""
    near = nearest(given, known)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(given: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that was most likely meant, if one is like it."""
    import difflib

    near = difflib.get_close_matches(given[:80], list(known), 1, cutoff) if isinstance(given, str) else []
    return near[0] if near else None
