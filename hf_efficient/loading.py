"""Load what a user named. However that fails, the error is a CheckpointError that names it and says what to do.

    model = load_model("AutoModelForSequenceClassification", "google-bert/bert-base-uncased")

Weights are read from safetensors only, never from pickle files.
"""

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from .bundled import resolve_model
from .errors import CheckpointError, HfEfficientError

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a Hub id, a folder, or a bundled model."""
    return _load(transformers.AutoConfig, name, trust_remote_code=trust_remote_code)


def load_model(
    auto_class: str | type[PreTrainedModel],
    name: str | Path,
    *,
    trust_remote_code: bool = False,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The model, loaded by the Auto class of that name or by a model class.

    Parameters:
        new_head: a head that the checkpoint does not have, or has for other labels, is made at random and named in the
            log: it is about to be trained.

    Raises:
        CheckpointError: it cannot be loaded, or its weights are not those of the model: missing, of another shape, or
            left over.
    """
    from .models.weight_names import check_weight_names

    auto = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load(auto, name, trust_remote_code=trust_remote_code, **options)
    check_weight_names(model, info, str(name), new_head)
    return model


def auto_class_of(name: str | Path, *, trust_remote_code: bool = False) -> str:
    """The Auto class for the head that a checkpoint was saved with, by its config: `AutoModelForCausalLM`.

    Raises:
        CheckpointError: the config names no class, or one that no Auto class makes.
    """
    from .models.heads import auto_class_of_architecture

    config = load_config(name, trust_remote_code=trust_remote_code)
    [architecture, *_] = config.architectures or [""]
    found = auto_class_of_architecture(architecture)
    remote = getattr(config, "auto_map", None) or {}
    if found is None and trust_remote_code:
        found = next((auto for auto, path in remote.items() if path.endswith(f".{architecture}")), None)
    if found is None:
        what = f"{architecture}, which no Auto class of transformers makes" if architecture else "no class"
        raise CheckpointError(
            f"The config of {str(name)!r} names {what}, so its head is not known. Name the task of the head that you "
            "want, or take a checkpoint that was saved with one of the usual classes."
        )
    return found


def load_processor(name: str | Path, *, images: bool, trust_remote_code: bool = False) -> Any:
    """The tokenizer or image processor that comes with a model; None for a folder of an image model that has none."""
    folder = Path(resolve_model(str(name)))
    if images and folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        return None
    auto = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    return _load(auto, name, trust_remote_code=trust_remote_code)


def _load(auto: Any, name: str | Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(resolve_model(str(name)), **options)
    except HfEfficientError:
        raise  # a bad `efficient` block says best itself what is wrong
    except _FAILURES as error:
        reason = " ".join(str(error).split()).rstrip(".")
        missing = "" if Path(str(name)).exists() or ":" in str(name) else f" There is no folder {str(name)!r} here."
        raise CheckpointError(
            f"Cannot load {str(name)!r} with {auto.__name__}: {reason}.{missing} Give a folder or Hub id with "
            "config.json and model.safetensors; a Hub id needs the network unless it is cached."
        ) from error
