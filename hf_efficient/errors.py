"""The errors a user can cause. Each message says what was given, what is allowed, and what to do.

They subclass the built-in exception a caller would expect, so `except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable


class HfEfficientError(Exception):
    """Base of every error raised on purpose by hf_efficient."""


class ConfigError(HfEfficientError, ValueError):
    """A value in a config, recipe or command line that is not allowed."""


class UnsupportedModelError(HfEfficientError, ValueError):
    """A model, or a combination of model and method, that cannot be handled."""


class DataError(HfEfficientError, ValueError):
    """A data set or file that does not hold what was asked of it."""


class CheckpointError(HfEfficientError, OSError):
    """A folder or checkpoint that is missing, corrupted, or would be overwritten."""


def unknown_name(what: str, given: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: names the nearest match and lists what is known.

    Example: `raise unknown_name("attention kind", "locla", KINDS)`.
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"Unknown {what} {given!r}.{hint} Known: {', '.join(names)}.")
