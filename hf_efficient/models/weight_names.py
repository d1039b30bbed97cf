"""Do the weights of a checkpoint and the model that was made of it belong together?

    model, info = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    check_weight_names(model, info, folder, new_head=False)

transformers fills what is missing at random, and leaves out what it has no place for; both give a model that runs, and
is not the one that was saved. What may differ is the head: a classifier is made of a language model. So names are
compared with those of the base model, `AutoModel`, without the prefix that a head puts before them.
"""

import logging
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..families import family_of
from .building import efficient_class
from .configs import EfficientConfigMixin

logger = logging.getLogger(__name__)

# What old checkpoints hold of tables that are computed today, and what only training reads.
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|version|_float_tensor|num_batches_tracked"
    r"|relative_position_index|embed_positions\.weights|cos_cached|sin_cached|masked_spec_embed)$"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_weight_names(model: PreTrainedModel, info: dict[str, Any], name: str, new_head: bool) -> None:
    """Compare what was found (`output_loading_info`) with what the model needs.

    Parameters:
        name: of the checkpoint, for messages.
        new_head: the head may be new, or of another shape, since it is about to be trained.

    Raises:
        CheckpointError: weights that are missing, of another shape, or left over though they belong to the base model.
    """
    missing = sorted(key for key in info["missing_keys"] if not _COMPUTED.search(key))
    left_over = sorted(key for key in info["unexpected_keys"] if not _COMPUTED.search(key))
    shapes = {str(key): f"{list(found)}, not {list(needed)}" for key, found, needed in info["mismatched_keys"]}
    if not (missing or left_over or shapes):
        return
    base = {_bare(key, model) for key in _base_state(model)}
    head = {key for key in (*missing, *shapes) if _bare(key, model) not in base}
    saved = _saved_class(model)
    known = {_bare(key, model) for key in _names(saved, model)} if saved else set()
    missing = [key for key in missing if not _is_computed(key, saved, model)]
    pooler = {key for key in missing if key not in head and _is_pooler(key) and _bare(key, model) not in known}
    pooler = set() if saved is type(model) else pooler
    kind = type(model).__name__
    if lost := [key for key in missing if key not in head | pooler]:
        raise CheckpointError(
            f"{name!r} lacks {_listed(lost)} that {kind} needs: they would be random. The weights are damaged, or "
            f"saved with another class or config ({_saved_name(model) or 'none is named'}). Take a good copy of them."
        )
    if wrong := [f"{key} ({shapes[key]})" for key in sorted(shapes) if not (new_head and key in head)]:
        raise CheckpointError(
            f"{name!r} has {_listed(wrong)} of another shape than its config says for {kind}. Take config.json and "
            "the weights from the same checkpoint."
        )
    if extra := [key for key in left_over if _belongs_to_base(_bare(key, model), base, known)]:
        raise CheckpointError(
            f"{name!r} has {_listed(extra)} for which {kind} has no place: without them it would compute something "
            "else. config.json is not that of the weights, or adapters were not merged. Take both from the same "
            "checkpoint."
        )
    new = sorted({*missing, *shapes})
    if (head & {*new} or (pooler and model.base_model is not model)) and not new_head:
        raise CheckpointError(
            f"{name!r} has no head of the kind {kind}: {_listed(new)} would be random. Name a checkpoint with that "
            "head, or train one first (the `teacher` section of a recipe does), or choose another task."
        )
    if new:
        logger.warning("New in %s of %s, to be trained: %s.", kind, name, _listed(new))


def _base_state(model: PreTrainedModel) -> set[str]:
    """The names of the whole base model: a head may leave out its pooler, or one of its towers."""
    kind = transformers.AutoModel._model_mapping.get(type(model.config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    return (_names(kind, model) if kind is not None else None) or {*model.base_model.state_dict()}


def _names(kind: type[PreTrainedModel], model: PreTrainedModel) -> set[str]:
    """The names of the weights of a class, made without memory for them."""
    if isinstance(model, kind):
        return {*model.state_dict()}
    try:
        with torch.device("meta"):
            return {*kind(model.config).state_dict()}
    except Exception:  # code of others, which may want more than a config
        return set()


def _bare(key: str, model: PreTrainedModel) -> str:
    return key.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else key


def _saved_name(model: PreTrainedModel) -> str:
    """The class that the checkpoint was saved with, by its config."""
    return next(iter(model.config.architectures or ()), "")


def _saved_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """That class, if the config is one of its."""
    if _saved_name(model) == type(model).__name__:
        return type(model)
    kind = getattr(transformers, _saved_name(model).removeprefix("Efficient"), None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel) or kind.config_class is None:
        return None
    if not isinstance(model.config, kind.config_class):
        return None
    is_efficient = isinstance(model.config, EfficientConfigMixin)
    return efficient_class(kind, family_of(model.config)) if is_efficient else kind


def _is_computed(key: str, saved: type[PreTrainedModel] | None, model: PreTrainedModel) -> bool:
    """True for what the class that saved the checkpoint makes anew whenever it is loaded (Marian's positions)."""
    patterns = getattr(saved, "_keys_to_ignore_on_load_missing", None) or ()
    names = (key, f"{model.base_model_prefix}.{key}")
    return any(re.search(pattern, each) for pattern in patterns for each in names)


def _is_pooler(key: str) -> bool:
    return "pooler" in key.split(".")


def _belongs_to_base(key: str, base: set[str], known: set[str]) -> bool:
    """True for a weight within a part of the base model of which neither it nor the class that was saved knows."""
    return key not in base | known and key.partition(".")[0] in {each.partition(".")[0] for each in base}


def _listed(keys: list[str]) -> str:
    """The number of weights and the first names, layers that are alike told once."""
    alike = list(dict.fromkeys(_NUMBER.sub("*", key) for key in keys))
    shown = ", ".join(alike[:4]) + (", ..." if len(alike) > 4 else "")
    return f"{len(keys)} weight{'s' * (len(keys) != 1)} ({shown})"
