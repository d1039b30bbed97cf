"""Load what a user named. However that fails, the error is a CheckpointError that names it and says what to do.

    model = load_model("AutoModelForSequenceClassification", "google-bert/bert-base-uncased")

Weights are read from safetensors and GGUF files only, never from pickle files. Of a local folder the files are looked
at first: they must lie in it, with plausible numbers, and weights as large as the config says. Memory is taken only
then.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..data.bundled import gguf_file, resolve_model, whole_model
from ..data.sentence_modules import BESIDE, MODULES, SentenceModules, read_modules, transformer_folder
from ..errors import CheckpointError, HfEfficientError, shown
from ..io.checkpoint import CONFIG, MAX_CONFIG, check_config, check_links, check_processor, read_mapping, read_weights
from .checks import quantization_method
from .heads import auto_class_of_architecture
from .weight_names import check_finite, check_sizes, check_weight_names

logger = logging.getLogger(__name__)

ADAPTER, GENERATION = "adapter_config.json", "generation_config.json"


def load_config(name: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedConfig:
    """The config of a Hub id, a folder, a GGUF file or a bundled model; CheckpointError if none can be loaded.

    Of a GGUF file that was not unpacked yet, the header alone is read.
    """
    if (file := gguf_file(str(name))) is not None and not file.is_unpacked:
        return file.config(**options)
    folder = local_folder(name)
    if folder is not None:
        check_links(folder)
        if (folder / CONFIG).is_file():
            try:
                tensors = read_weights(folder)
            except CheckpointError:  # a config may be wanted without its weights
                tensors = {}
            check_config(folder / CONFIG, tensors)
    return _load(transformers.AutoConfig, name, trust_remote_code=trust_remote_code, **options)


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
    auto = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    folder = local_folder(name)
    if folder is not None:
        check_folder(auto, folder, trust_remote_code, options.get("config"))
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load(auto, name, trust_remote_code=trust_remote_code, **options)
    check_weight_names(model, info, str(name), new_head)
    check_finite(model, str(name))
    if folder is not None and model.can_generate() and (folder / GENERATION).is_file():
        read_mapping(folder / GENERATION)  # transformers leaves out one that it cannot read, and says nothing
    return model


def check_folder(
    auto: Any, folder: Path, trust_remote_code: bool = False, config: PreTrainedConfig | None = None
) -> None:
    """What can be known before memory is taken: see `io.checkpoint`, and are model and weights of a size?"""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as QUANTIZATIONS

    check_links(folder)
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            base = read_mapping(folder / ADAPTER).get("base_model_name_or_path")
            raise CheckpointError(
                f"{folder} holds an adapter of {shown(base)}, not a model. Load that model and the adapter with peft, "
                "merge them (merge_and_unload) and save the result, or give the model itself."
            )
        return
    written = read_mapping(folder / CONFIG, MAX_CONFIG)
    tensors = read_weights(folder, written.get("transformers_weights"))
    check_config(folder / CONFIG, tensors)
    if tensors and not (trust_remote_code and "auto_map" in written):
        config = config or _load(transformers.AutoConfig, folder)
        method = quantization_method(config)
        if method is not None and method not in QUANTIZATIONS:  # it would be loaded as if it were not quantised
            raise CheckpointError(
                f"{folder / CONFIG} names the quantisation {shown(method)}, which this transformers does not know. "
                f"Known: {', '.join(sorted(map(str, QUANTIZATIONS)))}."
            )
        check_sizes(_skeleton(auto, config, folder), tensors, folder)


def _skeleton(auto: Any, config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model without memory for its weights."""
    make = auto.from_config if hasattr(auto, "from_config") else auto
    try:
        with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
            return make(copy.deepcopy(config))
    except HfEfficientError:
        raise
    except Exception as error:
        raise _load_error(error, folder, auto) from error


def auto_class_of(name: str | Path, *, trust_remote_code: bool = False) -> str:
    """The Auto class for the head that a checkpoint was saved with; CheckpointError if its config names none."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    [architecture, *_] = config.architectures or [""]
    auto_class = auto_class_of_architecture(architecture)
    remote = getattr(config, "auto_map", None) or {}
    if auto_class is None and trust_remote_code:
        auto_class = next((auto for auto, path in remote.items() if path.endswith(f".{architecture}")), None)
    if auto_class is None:
        what = f"{architecture}, which no Auto class of transformers makes" if architecture else "no class"
        raise CheckpointError(
            f"The config of {str(name)!r} names {what}, so its head is not known. Name the task of the head that you "
            "want, or take a checkpoint that was saved with one of the usual classes."
        )
    return auto_class


def load_processor(
    name: str | Path, *, images: bool = False, whole: bool = False, trust_remote_code: bool = False
) -> Any:
    """The tokenizer or image processor that comes with a model; None for a folder of an image model that has none.

    `whole`: the AutoProcessor, with all its parts.
    """
    folder = local_folder(name)
    if folder is not None:
        if images and not (folder / "preprocessor_config.json").is_file():
            return None
        check_links(folder)
        for is_of_images in {images, whole} if whole else {images}:
            check_processor(folder, is_of_images)
    auto = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    auto = transformers.AutoProcessor if whole else auto
    return _load(auto, name, trust_remote_code=trust_remote_code)


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """How the model of a folder generates, if that is said there."""
    if not (folder / GENERATION).is_file():
        return None
    read_mapping(folder / GENERATION)  # transformers does not say that it cannot read one
    return _load(GenerationConfig, folder)


def load_sentence_modules(name: str | Path) -> SentenceModules | None:
    """What sentence-transformers has beside the transformer of a folder, Hub id or bundled model; None if nothing.

    Raises:
        CheckpointError, UnsupportedModelError: see `read_modules`; a Hub id whose transformer lies in a folder.
    """
    folder = Path(whole_model(str(name)))
    if folder.is_dir():
        return read_modules(folder)
    try:
        if not Path(hf_hub_download(str(name), MODULES)).is_file():
            return None
        folder = Path(snapshot_download(str(name), allow_patterns=list(BESIDE)))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # the Hub was not asked
            logger.warning("%s of %s is not in the cache: it is read as a plain model.", MODULES, name)
        return None
    except Exception as error:  # of the network, of the Hub, of a name that it cannot have
        raise _load_error(error, name, transformers.AutoModel) from error
    if transformer_folder(folder) != folder:
        raise CheckpointError(
            f"{str(name)!r} keeps its transformer in a folder of its own. Download it (hf download {name} --local-dir "
            "FOLDER) and give that folder."
        )
    return read_modules(folder)


def local_folder(name: str | Path) -> Path | None:
    """The local folder that a name stands for, for a GGUF file the one it is unpacked to; None for a Hub id."""
    folder = Path(resolve_model(str(name)))
    return folder if folder.is_dir() else None


def _load(auto: Any, name: str | Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(resolve_model(str(name)), **options)
    except HfEfficientError:
        raise  # a bad `efficient` block says best itself what is wrong
    except Exception as error:  # whatever a wrong number or type leads to, far below
        raise _load_error(error, name, auto) from error


def _load_error(error: Exception, name: str | Path, auto: Any) -> CheckpointError:
    reason = " ".join(str(error).split()).rstrip(".")[:500]
    if not isinstance(error, (OSError, ValueError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"
    missing = "" if Path(str(name)).exists() or ":" in str(name) else f" There is no folder {str(name)!r} here."
    return CheckpointError(
        f"Cannot load {str(name)!r} with {auto.__name__}: {reason}.{missing} Give a folder or Hub id with "
        "config.json and model.safetensors, or a GGUF file; a Hub id needs the network unless it is cached."
    )
