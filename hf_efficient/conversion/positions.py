"""Run a model on inputs longer than it was made for.

    model = extend_positions(model, 4096)                       # a learned table, tiled
    model = extend_positions(model, 32768, rope="yarn")         # rotary positions, rescaled
    tokenizer.model_max_length = 4096                           # the tokenizer truncates too

Learned tables: position p of the longer table is position p mod n of the old one (`tile`: Longformer, Beltagy 2020,
section 5; inputs that fitted before give the same output), or lies between old positions at p (n - 1) / (length - 1)
(`interpolate`: the table is stretched, which needs training). Rows that stand before the first position (RoBERTa,
BART) stay. Rotary positions have no table: `rope` changes the config's `rope_parameters` as transformers spells it,
`linear` (position interpolation, Chen 2023, arXiv 2306.15595), `dynamic` (NTK-aware, only beyond the old length) or
`yarn` (Peng 2023, arXiv 2309.00071). Without it only the length in the config is raised.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ConfigError, UnsupportedModelError, unknown_name
from ..models.anatomy import Anatomy
from ..models.classes import with_block
from ..models.derive import family_for
from ..models.family import Family
from ..models.rebuild import check_model, rebuild
from ..models.registry import token_limit
from .methods import METHODS, ROPE


def extend_positions(
    model: PreTrainedModel, length: int, method: str = "tile", rope: str | dict[str, Any] | None = None
) -> PreTrainedModel:
    """A copy of `model` that takes `length` tokens; remember to raise the tokenizer's `model_max_length` too.

    Parameters:
        length: in tokens.
        method: for learned positions: `"tile"` or `"interpolate"`.
        rope: for rotary positions: `"linear"`, `"dynamic"`, `"yarn"`, or a whole `rope_parameters` of transformers.

    Raises:
        UnsupportedModelError: the positions of this family are tied to something else (an image size), or need no
            extension at all; rotary positions that are rescaled already, or differ between layers.
        ConfigError: `length` is not longer than what the model takes now, or an option that its positions have no use
            for.
    """
    anatomy = Anatomy.of(check_model(model))
    family, changes = anatomy.family, longer_config(model.config, length, method, rope)
    extended = _sinusoids if family.sinusoidal else METHODS[method]
    first = family.first_position(model.config) if family.positions else 0
    state, tables = model.state_dict(), tuple(f"{path}.weight" for path in family.positions)
    for key in state:
        if key.endswith(tables):
            state[key] = torch.cat([state[key][:first], extended(state[key][first:], length)])
    return rebuild(model, with_block(model.config, anatomy.block, **changes), state)


def longer_config(
    config: PreTrainedConfig, length: int, method: str = "tile", rope: str | dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config fields that `extend_positions` changes, with their new values; it says what is raised."""
    family, old = family_for(config), token_limit(config)
    if family.max_positions is None or old is None:
        raise UnsupportedModelError(
            f"{family.model_type} models have no table of text positions to extend: positions are relative, "
            "or belong to the image size."
        )
    if type(length) is not int or length <= old:
        raise ConfigError(f"length must be an integer larger than the {old} positions of this model, got {length!r}.")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if family.positions:
        if rope is not None:
            raise ConfigError(f"rope={rope!r} has no use: {family.model_type} has a table of positions. Leave it out.")
        return {family.max_positions: getattr(config, family.max_positions) + length - old}
    if method != "tile":
        raise ConfigError(
            f"method={method!r} is for tables of positions; {family.model_type} has rotary ones: give rope='linear'."
        )
    limit, now = getattr(config, family.max_positions), config.rope_parameters or {}
    if rope is None and now.get("rope_type") == "dynamic":
        return {"rope_parameters": now | {"factor": length / limit}}
    changes = {} if rope == "dynamic" else {family.max_positions: length}  # where the dynamic scaling sets in
    return changes if rope is None else changes | {"rope_parameters": _scaled(config, family, length / old, rope)}


def _scaled(config: PreTrainedConfig, family: Family, factor: float, rope: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(rope, dict):
        is_by_layer_type = all(isinstance(value, dict) for value in rope.values())
        for parameters in rope.values() if is_by_layer_type else (rope,):
            if parameters.get("rope_type") not in (known := ("default", *ROPE_INIT_FUNCTIONS)):
                raise unknown_name("rope_type", parameters.get("rope_type"), known)
        return rope
    if rope not in ROPE:
        raise unknown_name("rope", rope, ROPE)
    now = config.rope_parameters
    if now.get("rope_type") != "default":
        what = (
            f"are scaled already (rope_type {now['rope_type']!r})" if "rope_type" in now else "differ between layers"
        )
        raise UnsupportedModelError(
            f"The rotary positions of this {family.model_type} model {what}. Give rope as a dict: all of the config's "
            "rope_parameters, as transformers spells them."
        )
    original = {"original_max_position_embeddings": token_limit(config)} if rope == "yarn" else {}
    return now | {"rope_type": rope, "factor": factor} | original


def tile(table: Tensor, length: int) -> Tensor:
    """[n, width] -> [length, width]: the table again and again."""
    return table.repeat(-(-length // len(table)), 1)[:length]


def interpolate(table: Tensor, length: int) -> Tensor:
    """[n, width] -> [length, width]: straight lines between the rows, the first and the last row kept."""
    place = torch.linspace(0, len(table) - 1, length, dtype=torch.float64, device=table.device)
    lower = place.long().clamp(max=max(len(table) - 2, 0))
    upper = (lower + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[lower].double(), table[upper].double(), (place - lower)[:, None]).to(table.dtype)


def _sinusoids(table: Tensor, length: int) -> Tensor:
    """[n, width] -> [length, width] of the formula: sines in the first half, cosines in the second."""
    width = table.shape[1]
    rates = 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / -width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()[:, : width // 2]], 1).to(table)
