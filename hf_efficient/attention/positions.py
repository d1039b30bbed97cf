"""Run a model on inputs longer than it was made for.

Learned absolute positions are tiled: position p of the longer table is position p mod n of the old one (Longformer,
Beltagy 2020, section 5). Rotary and relative positions have no table; only the length in the config is raised, and how
well the model then extrapolates is its own affair (`rope_parameters`).
"""

from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedModelError
from ..families import family_of
from ..models.building import check_model, rebuild
from ..models.configs import block_of, with_block


def extend_positions(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """A copy of `model` that takes `length` tokens; remember to raise the tokenizer's `model_max_length` too.

    Raises:
        UnsupportedModelError: the positions of this family are tied to something else (an image size), or need no
            extension at all.
        ConfigError: `length` is not longer than what the model takes now.
    """
    family = family_of(check_model(model).config)
    if family.max_positions is None:
        raise UnsupportedModelError(
            f"{family.model_type} models have no table of text positions to extend: positions are relative, "
            "or belong to the image size."
        )
    old = getattr(model.config, family.max_positions)
    if type(length) is not int or length <= old:
        raise ConfigError(f"length must be an integer larger than the {old} positions of this model, got {length!r}.")
    state = model.state_dict()
    if family.positions:
        suffix = f"{family.positions}.weight"
        key = next(name for name in state if name.endswith(suffix))
        repeats = -(-length // old)
        state[key] = state[key].repeat(repeats, 1)[:length]
    config = with_block(model.config, block_of(model.config), **{family.max_positions: length})
    return rebuild(model, config, state)
