"""Data: rows from anywhere, the table of tasks, and rows turned into model inputs.

from hf_efficient.data import load_dataset_any, prepare
"""

from importlib import import_module
from typing import Any

_LAZY = {"load_dataset_any": "datasets", "prepare": "preparation"}

__all__ = ["load_dataset_any", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
