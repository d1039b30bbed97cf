"""Efficient classes of the stock ones, made when they are asked for.

from hf_efficient.models import EfficientBertForSequenceClassification
"""


def __getattr__(name: str):
    if not name.startswith("Efficient"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .classes import find_class

    return find_class(name)
