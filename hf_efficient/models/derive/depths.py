"""Which field of a config says how many layers a list has, by trial: of a model with one less the list is shorter.

depth_field(model, "connector.perceiver_resampler.layers")        # ("perceiver_config", "resampler_depth")
"""

import copy
from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .fields import nested_configs

MOST_TRIALS = 12


def depth_field(model: PreTrainedModel, layers: str) -> tuple[str, str] | None:
    """The path of the config inside that of the model, and the field: an entry of a list as `depths.1`."""
    depth = len(model.base_model.get_submodule(layers))
    candidates = list(_numbers(model, depth))[:MOST_TRIALS]
    return next((one for one in candidates if _says(model, layers, *one)), None)


def is_depth_field(model: PreTrainedModel, layers: str, where: str, field: str) -> bool:
    """Whether a field says it, as far as that can be tried."""
    return _says(model, layers, where, field) is not False


def _numbers(model: PreTrainedModel, depth: int) -> Iterator[tuple[str, str]]:
    for where, config in nested_configs(model.config):
        for name, value in vars(config).items() if depth > 1 else ():
            entries = value if isinstance(value, list | tuple) else ()
            if type(value) is int and value == depth and not name.startswith("_"):
                yield where, name
            yield from ((where, f"{name}.{i}") for i, one in enumerate(entries) if type(one) is int and one == depth)


def _says(model: PreTrainedModel, layers: str, where: str, field: str) -> bool | None:
    """None: such a model is not built."""
    config = copy.deepcopy(model.config)
    part = attrgetter(where)(config) if where else config
    name, _, index = field.partition(".")
    value = getattr(part, name)
    less = [one - (str(i) == index) for i, one in enumerate(value)] if index else value - 1
    before = model.base_model.get_submodule(layers)
    try:
        setattr(part, name, less)
        with torch.device("meta"), no_init_weights():
            small: nn.Module = type(model)(config).base_model
        return len(small.get_submodule(layers)) == len(before) - 1
    except Exception:  # whatever a config or a model may raise
        return None
