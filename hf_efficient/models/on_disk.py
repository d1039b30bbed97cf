"""A model whose weights stay on the disk: modules without memory for their parameters, a part at a time filled.

    stored = StoredModel.open("meta-llama/...", ...)          # a local folder with safetensors
    with stored.loaded("model.layers.3."):
        stored.model.model.layers[3](states, ...)             # only this layer holds weights

Parameters are on the meta device until they are loaded; buffers (rotary frequencies, causal masks) are real. Tensors
are read one by one, not mapped, and have the dtype in which transformers would load them.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights

from ..errors import CheckpointError, UnsupportedModelError
from ..io import checkpoint
from ..io.tensors import DTYPES, read_tensor
from .checks import check_floats
from .classes import EFFICIENT, find_class
from .loading import check_folder, load_config, load_generation_config, local_folder
from .rebuild import quietly
from .weight_names import check_weight_names

_GAMMA, _BETA = re.compile(r"LayerNorm\.gamma$"), re.compile(r"LayerNorm\.beta$")  # in checkpoints of old
WHOLE = "Load the model whole and give that: AutoModel.from_pretrained(folder)."


SHARE = 0.5  # of the memory of the machine: weights that take more are read layer by layer, where that is left open


def is_large(name: str | Path) -> bool:
    """Whether the weights in a local folder take more than `SHARE` of this machine's memory."""
    folder = local_folder(name)
    if folder is None:
        return False
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size > SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A checkpoint folder and its model.

    Fields:
        model: on the meta device, but for its buffers and for what is loaded.
        tensors: where each weight lies, by its name in the model; of tied ones that which is stored.
        aliases: the further names of tied weights, by the name that is stored.
    """

    folder: Path
    model: PreTrainedModel
    tensors: dict[str, checkpoint.Tensor]
    aliases: dict[str, tuple[str, ...]]

    @classmethod
    def open(cls, name: str | Path) -> "StoredModel":
        """A folder with the class that its config names; nothing is read but JSON and headers.

        Raises:
            CheckpointError: no such folder, or one whose weights are damaged or not those of the config.
            UnsupportedModelError: weights that transformers would change while it loads them, and quantised ones.
        """
        folder = local_folder(name)
        if folder is None:
            raise CheckpointError(
                f"{str(name)!r} is no folder here. What is read layer by layer has to lie on this disk: download it "
                f"first (hf download {name}), and name the folder."
            )
        config = load_config(folder)
        kind = model_class(config)
        check_folder(kind, folder)
        found = checkpoint.read_weights(folder)
        if not found:
            raise CheckpointError(f"{folder} has no weights: model.safetensors, or shards with their index.")
        model = skeleton(kind, config, _dtype(config, found))
        check_floats(model, "Prune or convert the original weights and quantise the result.")
        model.name_or_path = str(folder)
        if model.can_generate() and (generation := load_generation_config(folder)) is not None:
            model.generation_config = generation
        tensors, strange = _by_name(model, found)
        aliases = _tied(model, tensors)
        known = set(tensors) | {other for names in aliases.values() for other in names}
        needed = model.state_dict()
        missing = {key for key in needed if key not in known} - set(model._keys_to_ignore_on_save or ())
        wrong = [
            (key, list(one.shape), list(needed[key].shape))
            for key, one in tensors.items()
            if tuple(one.shape) != tuple(needed[key].shape)
        ]
        if missing and strange and get_model_conversion_mapping(model, add_legacy=False):
            raise UnsupportedModelError(
                f"{folder} stores {len(strange)} weights, such as {min(strange)}, in another form than "
                f"{kind.__name__} computes with ({min(missing)}), so they cannot be read layer by layer. {WHOLE}"
            )
        info = {"missing_keys": missing, "unexpected_keys": strange, "mismatched_keys": wrong}
        check_weight_names(model, info, str(folder), new_head=False)
        return cls(folder, model, tensors, aliases)

    @property
    def weight_bytes(self) -> int:
        return sum(one.size * self.model.dtype.itemsize for one in self.tensors.values())

    def names(self, prefix: str = "") -> list[str]:
        """The stored weights whose names begin so."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """One weight, in the dtype of the model.

        Raises:
            CheckpointError: numbers that are not finite.
        """
        tensor = read_tensor(self.tensors[name])
        if not tensor.is_floating_point():
            return tensor
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"The weights {name} of {str(self.folder)!r} hold numbers that are not finite: a training that "
                    "diverged, or a damaged file. Take an earlier checkpoint, or a good copy."
                )
        return tensor if self._keeps_dtype(name) else tensor.to(self.model.dtype)

    def _keeps_dtype(self, name: str) -> bool:
        """Weights that a class computes in single precision whatever the others are."""
        kept = (*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ()))
        return any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """These weights, and those whose names begin with them, are there for a while."""
        chosen = [key for key in self.tensors if key.startswith(names)]
        try:
            for key in chosen:
                self._put(key, self.read(key))
            yield
        finally:
            for key in chosen:
                self._put(key, torch.empty(self.tensors[key].shape, dtype=self.model.dtype, device="meta"))

    def _put(self, key: str, tensor: Tensor) -> None:
        for name in (key, *self.aliases.get(key, ())):
            put(self.model, name, tensor)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter, which asks for no gradient, or a buffer of a model is this tensor."""
    place, _, own = name.rpartition(".")
    module = model.get_submodule(place)
    if own in module._buffers:
        if not tensor.is_meta:  # a buffer that is left behind does no harm
            module._buffers[own] = tensor
    else:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config was saved with; CheckpointError if it names none that is known."""
    for name in config.architectures or ():
        found = find_class(name) if name.startswith(EFFICIENT) else getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    raise CheckpointError(
        f"The config names {config.architectures or 'no architecture'}, of which transformers has no class: it is not "
        f"known which head the weights have. Models with code of their own are not read layer by layer. {WHOLE}"
    )


def skeleton(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model in eval mode whose parameters have no memory, and whose buffers are real."""
    with init_empty_weights(include_buffers=False), no_init_weights(), quietly():
        model = kind._from_config(config, dtype=dtype)
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise UnsupportedModelError(f"{kind.__name__} makes {empty[0]} of its weights, which are not there. {WHOLE}")
    return model.requires_grad_(False).eval()


def _dtype(config: PreTrainedConfig, found: dict[str, checkpoint.Tensor]) -> torch.dtype:
    """As `from_pretrained` chooses: what the config says, else that of the first floats."""
    said: Any = config.dtype
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    kinds = (DTYPES.get(one.dtype) for one in found.values())
    return next((kind for kind in kinds if kind is not None and kind.is_floating_point), torch.float32)


def _by_name(
    model: PreTrainedModel, found: dict[str, checkpoint.Tensor]
) -> tuple[dict[str, checkpoint.Tensor], set[str]]:
    """The stored weights by their names in the model, and the names of those that it has no place for. A checkpoint of
    a base model lacks the prefix that a model with a head puts before it, and the other way round."""
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    tensors, strange = {}, set()
    for key, one in found.items():
        today = _GAMMA.sub("LayerNorm.weight", _BETA.sub("LayerNorm.bias", key))
        name = next((name for name in (today, prefix + today, today.removeprefix(prefix)) if name in known), None)
        if name is None:
            strange.add(key)
        else:
            tensors[name] = one
    return tensors, strange


def _tied(model: PreTrainedModel, tensors: dict[str, checkpoint.Tensor]) -> dict[str, tuple[str, ...]]:
    """The names that share a weight, by the one that is stored; `tensors` loses what is stored twice."""
    model.tie_weights()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    aliases = {}
    for names in groups.values():
        stored = [name for name in names if name in tensors]
        if len(names) > 1 and stored:
            aliases[stored[0]] = tuple(name for name in names if name != stored[0])
            for name in stored[1:]:
                del tensors[name]
    return aliases
