"""Do the weights of a checkpoint and the model that was made of it belong together?

    model, info = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    check_weight_names(model, info, folder, new_head=False)

transformers fills what is missing at random, and leaves out what it has no place for; both give a model that runs, and
is not the one that was saved. What may differ is the head: a classifier is made of a language model. So names are
compared with those of the base model, `AutoModel`, without the prefix that a head puts before them.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..attention.dispatch import ATTACHED
from ..errors import CheckpointError
from .classes import EfficientConfigMixin, efficient_class
from .families import family_of

logger = logging.getLogger(__name__)

# What old checkpoints hold of tables that are computed today, and what only training reads.
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|version|_float_tensor|num_batches_tracked"
    r"|relative_position_index|embed_positions\.weights|cos_cached|sin_cached|masked_spec_embed)$"
)
PACKED = 16  # weights of 2 bits, packed into integers of 32
SPARE = 1 << 26  # a new head, or tables that are computed
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
    parts = {_part(key, model) for key in base} | {part for part, _ in model.base_model.named_children()}
    head = {key for key in (*missing, *shapes) if _bare(key, model) not in base}
    saved = _saved_class(model)
    known = {_bare(key, model) for key in _names(saved, model)} if saved else set()
    missing = [key for key in missing if not (_is_computed(key, saved, model) or _is_drawn(key, model))]
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
    if extra := [
        key
        for key in left_over
        if _bare(key, model) not in base | known and _bare(key, model).partition(".")[0] in parts
    ]:
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


def check_sizes(skeleton: PreTrainedModel, tensors: Mapping[str, Any], folder: Path) -> None:
    """Is the model about as large as its weights?

    Parameters:
        skeleton: the model on the meta device.
        tensors: what the headers of the weight files say: see `io.checkpoint.read_weights`.

    Raises:
        CheckpointError: the model would need far more memory than the weights have numbers, or those are integers.
    """
    held = sum(tensor.size for tensor in tensors.values())
    needed = sum(each.numel() for each in skeleton.parameters())
    computed = sum(each.numel() for each in skeleton.buffers())
    if needed > PACKED * held + SPARE or computed > PACKED * held + 4 * SPARE:
        raise CheckpointError(
            f"{folder} holds {held:,} numbers, and its config asks for a model of {max(needed, computed):,}. Take "
            "config.json and the weights from the same checkpoint."
        )
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return
    real = {_bare(key, skeleton) for key, value in skeleton.state_dict().items() if value.is_floating_point()}
    if wrong := sorted(key for key, each in tensors.items() if each.is_integer and _bare(key, skeleton) in real):
        raise CheckpointError(
            f"{folder} holds {_listed(wrong)} as {tensors[wrong[0]].dtype}, where {type(skeleton).__name__} computes "
            "with floats, and its config names no quantisation. Take the weights from a good copy."
        )


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Raises CheckpointError where a weight is NaN or infinite."""
    for key, value in model.named_parameters():
        values = value.data
        if type(values) is torch.Tensor and values.dtype in _FLOATS and not values.is_meta and values.numel():
            low, high = torch.aminmax(values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"The weights {key} of {name!r} hold numbers that are not finite: a training that diverged, or a "
                    "damaged file. Take an earlier checkpoint, or a good copy."
                )


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


def _part(key: str, model: PreTrainedModel) -> str:
    """`encoder` of `bert.encoder.layer.0.output.dense.bias`."""
    return _bare(key, model).partition(".")[0]


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


def _is_drawn(key: str, model: PreTrainedModel) -> bool:
    """True for a random projection of our own kinds: it is drawn from the seed in the config, the same each time."""
    place, found, name = key.rpartition(f".{ATTACHED}.")
    if not found:
        return False
    variant = model.get_submodule(f"{place}.{ATTACHED}")
    return type(variant).__module__.startswith(__package__.partition(".")[0]) and name in dict(variant.named_buffers())


def _is_pooler(key: str) -> bool:
    return "pooler" in key.split(".")


def _listed(keys: list[str]) -> str:
    """The number of weights and the first names, layers that are alike told once."""
    alike = list(dict.fromkeys(_NUMBER.sub("*", key) for key in keys))
    shown = ", ".join(alike[:4]) + (", ..." if len(alike) > 4 else "")
    return f"{len(keys)} weight{'s' * (len(keys) != 1)} ({shown})"
