"""The attention kinds, one file each. `register_attention` and `ATTENTIONS` stood here in version 0.1."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("ATTENTIONS", "register_attention"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import registry

    return getattr(registry, name)
