"""What a model of any architecture is made of, found from the model itself and proven before it is used.

    family = family_for(config)          # written, kept in the `efficient` block, or derived now

A tiny model of the same architecture is made by rule (`tiny`), run and disturbed (`observe`, `roles`), described
(`entry`), and the description tried on it (`proof`). It takes a second or two, once for configs of one structure.
"""

import copy
from dataclasses import replace
from threading import RLock

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...errors import UnsupportedModelError
from ..families import find_family, forget, remember, stock_type
from ..family import Family
from ..linears import num_inputs
from ..stacks import model_stacks
from .entry import make_entry
from .proof import prove
from .tiny import model_classes, tiny_config, tiny_inputs, tiny_model

_DERIVING = RLock()  # the table of attention functions is there once for all threads
_ENTRIES: dict[str, Family | UnsupportedModelError] = {}  # by the tiny config


def family_for(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> Family:
    """The entry for a stock or an efficient config; where there is none yet it is derived, proven and remembered.

    Parameters:
        model_class: of a model, for an architecture that no Auto class knows.

    Raises:
        UnsupportedModelError: it cannot be derived; the message says why.
    """
    if getattr(config, "efficient_in_memory", None):
        raise UnsupportedModelError(
            f"This {stock_type(config)} model was converted in memory (`convert_attention`); nothing else can be done "
            "with it, for no config could say what it is."
        )
    family = find_family(config)
    if family is None:
        with _DERIVING:
            family = _derive(config, model_class)
            remember(config, family)
    return family


def _derive(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> Family:
    try:
        small = tiny_config(config)
        key = f"{stock_type(config)} {small.to_json_string(use_diff=False)}"
        if key not in _ENTRIES:
            is_known = next(model_classes(small), None) is not None
            _ENTRIES[key] = _made(small, () if is_known or model_class is None else (model_class,))
        entry = _ENTRIES[key]
        if isinstance(entry, Family) and any(stack.num_neurons for stack in entry.stacks):
            entry = _counted(entry, config, model_class or next(model_classes(config)))
    except Exception as error:  # whatever the code of a config may raise
        entry = error if isinstance(error, UnsupportedModelError) else UnsupportedModelError(_said(error))
    if isinstance(entry, UnsupportedModelError):
        raise UnsupportedModelError(
            f"How models of type {stock_type(config)!r} are built could not be found out: {str(entry).rstrip('.')}."
        ) from entry
    return entry


def _counted(family: Family, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Family:
    """The entry with the FFN widths of this config, where no field says them: those of a model without memory."""
    with torch.device("meta"), no_init_weights():
        model = model_class(copy.deepcopy(config))
    widths = {
        stack.name: num_inputs(stack.layers[0].get_submodule(stack.down))
        for stack in model_stacks(model, family)
        if stack.entry.num_neurons and stack.down
    }
    return replace(
        family,
        stacks=tuple(
            replace(one, num_neurons=widths[one.name]) if one.name in widths else one for one in family.stacks
        ),
    )


def _made(small: PreTrainedConfig, classes: tuple[type[PreTrainedModel], ...]) -> Family | UnsupportedModelError:
    try:
        model = tiny_model(small, *classes)
        inputs = tiny_inputs(model)
        family = prove(make_entry(model, inputs), model, inputs)
        remember(small, family)
        return family
    except Exception as error:  # whatever the code of a model may raise
        forget(small)
        return error if isinstance(error, UnsupportedModelError) else UnsupportedModelError(_said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
