"""The one table of baselines: what a recipe calls them. A new one is a file beside this one, and an entry here.

    BASELINES["tfidf"].check(run)

Light to import: each is imported when it is first used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, shown, unknown_name
from ..io.lazy import LazyTable

if TYPE_CHECKING:
    from .base import Baseline

TASK = "text-classification"
BASELINES: "LazyTable[Baseline]" = LazyTable(
    {
        "tfidf": "baselines.tfidf:TFIDF",
        "static": "baselines.static:STATIC",
        "shallow": "baselines.shallow:SHALLOW",
        "int8": "baselines.int8:INT8",
    }
)


def read_baselines(names: Any) -> tuple[str, ...]:
    """What a recipe says: a list of names, or null for none."""
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"baselines must be a list of {', '.join(BASELINES)}, or null, got {shown(names)}.")
    return tuple(names)


def check_baselines(names: Sequence[str], task: str) -> None:
    """ConfigError for an unknown name, one that is there twice, or a task that has no such ways."""
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"baselines: {unknown_name('baseline', name, BASELINES)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"baselines: a name is there twice: {', '.join(names)}.")
    if names and task != TASK:
        raise ConfigError(f"baselines are for task {TASK!r} so far, not for {task!r}. Leave them out.")
