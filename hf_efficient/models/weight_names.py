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

logger = logging.getLogger(__name__)

# What old checkpoints hold of tables that are computed today, and what only training reads.
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|version|_float_tensor|num_batches_tracked"
    r"|relative_position_index|embed_positions\.weights|cos_cached|sin_cached|masked_spec_embed)$"
)
PACKED = 16  # weights of 2 bits, packed into integers of 32
SPARE = 1 << 26  # a new head, or tables that are computed
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PACKAGE = __package__.partition(".")[0]
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
    shapes = {str(key): f"{list(saved)}, not {list(needed)}" for key, saved, needed in info["mismatched_keys"]}
    if not (missing or left_over or shapes):
        return
    owners, kind = _Owners(model), type(model).__name__
    missing = [key for key in missing if not owners.makes(key)]
    head = {key for key in (*missing, *shapes) if not owners.is_of_base(key)}
    pooler = {key for key in missing if owners.is_of_new_pooler(key)}
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
    if extra := [key for key in left_over if owners.lacks(key)]:
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


class _Owners:
    """What the weights of a checkpoint belong to, by their names without the prefix that a head puts before them.

    base: the names of the whole base model; a head may leave out its pooler, or one of its towers.
    saved: the class that saved the checkpoint, if the config is one of its; known: the names of its weights.
    """

    def __init__(self, model: PreTrainedModel):
        auto = transformers.AutoModel._model_mapping.get(type(model.config), None)
        auto = auto[0] if isinstance(auto, tuple) else auto
        base = (_names(auto, model) if auto is not None else None) or {*model.base_model.state_dict()}
        self.model, self.saved = model, _saved_class(model)
        self.base = {_bare(key, model) for key in base}
        self.known = {_bare(key, model) for key in _names(self.saved, model)} if self.saved else set()
        self.parts = {key.partition(".")[0] for key in self.base} | dict(model.base_model.named_children()).keys()

    def is_of_base(self, key: str) -> bool:
        return _bare(key, self.model) in self.base

    def is_of_new_pooler(self, key: str) -> bool:
        """A pooler that the saved class did not have: a masked language model becomes a classifier."""
        is_pooler = "pooler" in key.split(".") and self.is_of_base(key)
        return is_pooler and self.saved is not type(self.model) and _bare(key, self.model) not in self.known

    def lacks(self, key: str) -> bool:
        """The weight belongs inside the base model, which has no place for it; heads may be dropped."""
        name = _bare(key, self.model)
        return name not in self.base and name not in self.known and name.partition(".")[0] in self.parts

    def makes(self, key: str) -> bool:
        """No checkpoint needs it: the saved class makes it anew when it is loaded (Marian's positions), or it is a
        random projection of our own kinds, drawn from the seed in the config."""
        patterns = getattr(self.saved, "_keys_to_ignore_on_load_missing", None) or ()
        names = (key, f"{self.model.base_model_prefix}.{key}")
        if any(re.search(pattern, name) for pattern in patterns for name in names):
            return True
        place, attached, name = key.rpartition(f".{ATTACHED}.")
        if not attached:
            return False
        variant = self.model.get_submodule(f"{place}.{ATTACHED}")
        return type(variant).__module__.startswith(_PACKAGE) and name in dict(variant.named_buffers())


def check_sizes(skeleton: PreTrainedModel, tensors: Mapping[str, Any], folder: Path) -> None:
    """Is the model about as large as its weights?

    Parameters:
        skeleton: the model on the meta device.
        tensors: what the headers of the weight files say: see `io.checkpoint.read_weights`.

    Raises:
        CheckpointError: the model would need far more memory than the weights have numbers, or those are integers.
    """
    numbers = sum(tensor.size for tensor in tensors.values())
    needed = sum(each.numel() for each in skeleton.parameters())
    computed = sum(each.numel() for each in skeleton.buffers())
    if needed > PACKED * numbers + SPARE or computed > PACKED * numbers + 4 * SPARE:
        raise CheckpointError(
            f"{folder} holds {numbers:,} numbers, and its config asks for a model of {max(needed, computed):,}. Take "
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
    return efficient_class(kind, model.config._stock_class) if is_efficient else kind


def _listed(keys: list[str]) -> str:
    """The number of weights and the first names, layers that are alike told once."""
    alike = list(dict.fromkeys(_NUMBER.sub("*", key) for key in keys))
    shown = ", ".join(alike[:4]) + (", ..." if len(alike) > 4 else "")
    return f"{len(keys)} weight{'s' * (len(keys) != 1)} ({shown})"
