"""What a model of any architecture is made of, found from the model itself and proven before it is used.

    family = family_for(config)          # written, kept in the `efficient` block, or derived now

A tiny model of the same architecture is made by rule (`tiny`), run and disturbed (`observe`, `roles`), described
(`entry`), the description tried on it (`proof`) and compared with the real model (`fitting`). It takes a second or
two, once for configs of one structure.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...errors import UnsupportedModelError
from ..family import Family
from ..rebuild import quietly
from ..registry import find_family, forget, remember, stock_type
from .entry import make_entry
from .fitting import fitted
from .inputs import tiny_inputs
from .proof import prove
from .roles import said_of
from .tiny import NotTinyError, first_tiny, model_classes, tiny_model

_DERIVING = RLock()  # the table of attention functions is there once for all threads
_ENTRIES: dict[str, Family | Exception] = {}  # by the tiny config


def family_for(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> Family:
    """The entry for a stock or an efficient config; where there is none yet it is derived, proven and remembered.

    Parameters:
        model: of the config, if it is there: so that none has to be built to see what all its layers are like.

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
            try:
                family = _derive(config, model)
            except Exception as error:  # whatever the code of a config or a model may raise
                raise UnsupportedModelError(
                    f"How models of type {stock_type(config)!r} are built could not be found out: "
                    f"{said_of(error).rstrip('.')}."
                ) from error
            remember(config, family)
    return family


def _derive(config: PreTrainedConfig, model: PreTrainedModel | None) -> Family:
    classes = list(model_classes(config)) or ([] if model is None else [type(model)])
    if not classes:
        raise UnsupportedModelError("transformers has no model class for it; load the model first, and ask of that")

    def found(small: PreTrainedConfig, whole: bool) -> Family | Exception:
        key = f"{classes[0].__module__}.{classes[0].__name__} {whole} {small.to_json_string(use_diff=False)}"
        if key not in _ENTRIES:
            with _undisturbed():
                _ENTRIES[key] = _made(small, classes, whole)
        entry = _ENTRIES[key]
        if isinstance(entry, NotTinyError):
            raise entry
        return entry

    with quietly():
        entry = first_tiny(config, found)
    if isinstance(entry, Exception):
        raise entry
    if model is None:
        with torch.device("meta"), no_init_weights():
            model = classes[0](copy.deepcopy(config))
    return fitted(entry, model)


def _made(small: PreTrainedConfig, classes: list[type[PreTrainedModel]], whole: bool) -> Family | Exception:
    try:
        with quietly():
            model = tiny_model(small, *classes)
            inputs = tiny_inputs(model, whole)
            family = prove(make_entry(model, inputs), model, inputs)
        remember(small, family)
        return family
    except Exception as error:  # whatever the code of a model may raise
        forget(small)
        return error.with_traceback(None)  # which holds the model


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The same tiny model whatever device, dtype or mode the caller has set; and the caller's random numbers stay."""
    usual, cpu = torch.get_default_dtype(), torch.device("cpu")
    # A device that is set has each call of torch pass through Python: a fifth of the time.
    is_set = torch.get_default_device() != cpu
    with torch.inference_mode(False), cpu if is_set else nullcontext(), torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
