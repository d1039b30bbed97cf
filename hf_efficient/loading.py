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
    auto_class: str, name: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """The model, loaded by the Auto class of that name."""
    auto = getattr(transformers, auto_class)
    return _load(auto, name, trust_remote_code=trust_remote_code, use_safetensors=True, **options)


def auto_class_of(name: str | Path, *, trust_remote_code: bool = False) -> str:
    """The Auto class for the head that a checkpoint was saved with, by its config: `AutoModelForCausalLM`.

    Raises:
        CheckpointError: the config names no class, or one with a head that has no Auto class.
    """
    [architecture, *_] = load_config(name, trust_remote_code=trust_remote_code).architectures or [""]
    heads = [head for head in dir(transformers) if head.startswith("AutoModelFor")]
    by_length = sorted(heads, key=len, reverse=True)
    found = next((head for head in by_length if architecture.endswith(head.removeprefix("AutoModel"))), None)
    if found is None and architecture.endswith(("LMHeadModel", "ForConditionalGeneration")):
        found = "AutoModelForCausalLM" if architecture.endswith("LMHeadModel") else "AutoModelForSeq2SeqLM"
    if found is None and architecture.endswith("Model"):
        found = "AutoModel"
    if found is None:
        raise CheckpointError(f"The config of {str(name)!r} does not say which head it has ({architecture!r}).")
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
