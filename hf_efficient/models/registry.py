"""What is known of a model's architecture, by its config: the entry that is written, registered or was derived.

    family = family_of(model.config)                     # BERT, ViT, Llama, T5, ...
    family.stacks[0].layers                              # "encoder.layer"

`derive.family_for` makes an entry where there is none yet, and remembers it here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..errors import ConfigError, UnsupportedModelError
from .families import FAMILIES
from .family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EFFICIENT_PREFIX = "efficient_"

_OTHERS: dict[str, Family] = {}  # by `_key` of the config: derived entries, each for configs of one structure
_OWN: dict[str, Family] = {}  # by model type: what `register_family` was given


def register_family(family: Family) -> None:
    """Say of a model type of your own where it keeps what; nothing is derived for it then.

    Raises:
        ConfigError: transformers' own table has the type, or the entry names no stack.
    """
    if family.model_type in FAMILIES or not family.stacks:
        reason = "is in the table already" if family.stacks else "has no stacks"
        raise ConfigError(f"A family of type {family.model_type!r} cannot be registered: it {reason}.")
    _OWN[family.model_type] = family


def remember(config: PreTrainedConfig, family: Family) -> None:
    """From now on `family_of` gives this entry for configs with these fields."""
    _OTHERS[_key(config)] = family


def forget(config: PreTrainedConfig) -> None:
    """The entry of these fields was wrong."""
    _OTHERS.pop(_key(config), None)


NOT_STRUCTURE = ("efficient", "auto_map", "problem_type")  # the last is set by a forward with labels


def _key(config: PreTrainedConfig) -> str:
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_STRUCTURE}
    return f"{type(config).__module__} {type(config).__name__} {json.dumps(fields, sort_keys=True, default=str)}"


def stock_type(config: PreTrainedConfig) -> str:
    """`bert` for a stock config and for an efficient one."""
    return config.model_type.removeprefix(EFFICIENT_PREFIX)


def find_family(config: PreTrainedConfig) -> Family | None:
    """The entry for a stock or an efficient config, if there is one already: written, registered, kept in the
    `efficient` block, or derived before."""
    model_type = stock_type(config)
    known = FAMILIES.get(model_type) or _OWN.get(model_type)
    if known is None and config.model_type != model_type:
        block = getattr(config, "efficient", None)
        return Family.from_dict(block["family"]) if isinstance(block, dict) and "family" in block else None
    return known or (_OTHERS.get(_key(config)) if _OTHERS else None)


def is_known(config: PreTrainedConfig) -> bool:
    """True if `family_of` has an entry for a stock or efficient config."""
    return find_family(config) is not None


def family_of(config: PreTrainedConfig) -> Family:
    """The entry for a stock or an efficient config. `derive.family_for` makes one where there is none yet.

    Raises:
        UnsupportedModelError: there is none.
    """
    family = find_family(config)
    if family is None:
        raise UnsupportedModelError(f"Nothing is known yet of how models of type {stock_type(config)!r} are built.")
    return family


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """That of the text of a model; where both an encoder and a decoder read one, of the decoder (Musicgen)."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def token_limit(config: PreTrainedConfig, *, rotary: bool = True) -> int | None:
    """How many tokens a text may have; None where nothing says so (relative positions, images alone).

    Parameters:
        config: of any model; one outside the table is taken at its word.
        rotary: count the length that a model with rotary positions was made for. It also runs on longer texts; False
            gives what no text can exceed, the rows of a table.
    """
    text = text_config(config)
    family = family_of(text) if is_known(text) else None
    field = family.max_positions if family else "max_position_embeddings"
    limit: int | None = getattr(text, field, None) if field else None
    if limit is None or (family and not family.positions and not rotary):
        return None
    if family and family.positions_after_pad:  # RoBERTa counts the rows up to that of the padding token
        return limit - family.first_position(text)
    rope = getattr(text, "rope_parameters", None) or {}
    return int(limit * rope["factor"]) if rope.get("rope_type") == "dynamic" else limit  # where the scaling sets in
