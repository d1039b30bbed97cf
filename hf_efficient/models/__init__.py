"""Efficient classes of the stock families, made when they are asked for.

from hf_efficient.models import EfficientBertForSequenceClassification
"""

from .families import EFFICIENT_PREFIX, FAMILIES

# model_type -> class name: `efficient_bert` -> `EfficientBertConfig`. All that `AutoConfig` needs to find a class.
CONFIG_NAMES = {EFFICIENT_PREFIX + name: f"Efficient{family.config_name}" for name, family in FAMILIES.items()}


def __getattr__(name: str):
    if not name.startswith("Efficient"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .classes import find_config_class, find_model_class

    return find_config_class(name) if name in CONFIG_NAMES.values() else find_model_class(name)
