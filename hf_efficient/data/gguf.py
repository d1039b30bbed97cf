"""Models in GGUF files: unpacked once into an ordinary folder of safetensors, which all the rest reads.

    file = find_gguf("models/SmolLM2-135M-Instruct.Q4_1.gguf")      # or a folder with one GGUF file, no other weights
    file.folder()                                           # of model, tokenizer, chat template, generation config
    file.config()                                           # without unpacking: the header alone is read

transformers reads the file; the weights are kept as plain floats: float32 of quantised blocks, else as the file has
them. The folder lies in the assets cache of Hugging Face (HF_HOME), appears there complete, and is made anew when the
file or transformers has changed, or when it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, HfEfficientError
from ..io.checkpoint import INDEX, WEIGHTS, check_links
from ..io.disk import clear_disk_errors, inside, new_folder, remove_own, write_atomic
from ..io.gguf import GgufHeader, read_gguf
from ..io.json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
MADE = "made-of.json"  # of what a folder was made, and its files; written last
_VERSION = 1


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, and the folder that it is unpacked to.

    Parameters:
        name: of the folder in the cache; default: the file's, with a digest of where it lies.
        sha256: what the file must be; the folder then serves it wherever it lies.
    """

    path: Path
    name: str | None = None
    sha256: str | None = None

    def config(self, **options: Any) -> PreTrainedConfig:
        """The config that the file says; only its header is read.

        Raises:
            CheckpointError: the file is damaged, or of an architecture that transformers does not read; the package
                gguf is not installed.
        """
        return _config(self.path, read_gguf(self.path), **options)

    @property
    def is_unpacked(self) -> bool:
        """Is its folder there, made of this very file, and as it was then? Files touched since are read."""
        try:
            made = read_json(self._place / MADE)
            if made["source"] != self._source() or not made["files"]:
                return False
            for name, (size, time, digest) in made["files"].items():
                file = inside(self._place, name)
                found = file.stat()
                if found.st_size != size or (found.st_mtime_ns != time and file_digest(file) != digest):
                    return False
        except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return False
        return True

    def folder(self) -> Path:
        """The folder of safetensors, made at the first call; of several processes one makes it.

        Raises:
            CheckpointError: as `config`; the file is another one, lacks weights, or the cache cannot be written.
        """
        from filelock import FileLock

        folder, path = self._place, self.path
        if self.is_unpacked:
            return folder
        header = read_gguf(path)
        if self.sha256 is not None and (digest := file_digest(path)) != self.sha256:
            raise CheckpointError(
                f"{path} is corrupted or not the published file: sha256 is {digest}, expected {self.sha256}."
            )
        try:
            with clear_disk_errors(folder.parent, "HF_HOME names where the cache lies."):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_name(f"{folder.name}.lock")):
                    if not self.is_unpacked:  # else another process made it meanwhile
                        remove_own(folder)
                        with new_folder(folder) as partial:
                            _unpack(path, header, partial)
                            made = {"source": self._source(), "files": _files(partial)}
                            write_atomic(partial / MADE, json.dumps(made, indent=2))
        except PermissionError as error:
            raise CheckpointError(f"{folder} cannot be written: {error}. Set HF_HOME to a folder that can.") from error
        logger.info("%s was unpacked into %s.", path, folder)
        return folder

    @property
    def _place(self) -> Path:
        from huggingface_hub import constants

        where = str(self.path.resolve()).encode("utf-8", "backslashreplace")
        name = self.name or f"{self.path.stem[:60]}-{hashlib.sha256(where).hexdigest()[:12]}"
        return Path(constants.HF_ASSETS_CACHE) / "hf_efficient" / "gguf" / name

    def _source(self) -> dict[str, Any]:
        """What the folder was made of: another file, another transformers, and it is made anew."""
        import transformers

        found = self.path.stat()
        file = {"size": found.st_size, "time": found.st_mtime_ns} if self.sha256 is None else {"sha256": self.sha256}
        return file | {"transformers": transformers.__version__, "version": _VERSION}


def find_gguf(name_or_path: str) -> GgufFile | None:
    """The GGUF file that a name stands for; None for any other name.

    Raises:
        CheckpointError: there is no such file, or the folder holds several.
    """
    path = Path(name_or_path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
        if not files or (path / WEIGHTS).exists() or (path / INDEX).exists():
            return None
        check_links(path)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:10])
            raise CheckpointError(f"{path} holds several GGUF files: {names}. Name one of them: {files[0]}")
        return GgufFile(files[0])
    if path.suffix.lower() != SUFFIX:
        return None
    if not path.is_file():
        raise CheckpointError(f"There is no GGUF file {name_or_path!r}. Give the path of one, or a folder with one.")
    return GgufFile(path)


def _config(path: Path, header: GgufHeader, **options: Any) -> PreTrainedConfig:
    import torch
    import transformers

    config = _read(transformers.AutoConfig, path, **options)
    config.architectures = [_class_name(config)]
    config.dtype = getattr(torch, header.dtype)
    vars(config).pop("_model_name_or_path", None)  # a title, where others look for a place
    return config


def _class_name(config: PreTrainedConfig) -> str:
    """The class that the file names, or the one that writes text."""
    from transformers.models.auto import modeling_auto as auto

    if config.architectures:
        return config.architectures[0]
    kinds = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING)
    return next(kind[type(config)].__name__ for kind in kinds if type(config) in kind)


def _unpack(path: Path, header: GgufHeader, folder: Path) -> None:
    """Write what transformers makes of the file: a plain model, the tokenizer, how it generates."""
    import torch
    import transformers

    config = _config(path, header)
    kind = getattr(transformers, config.architectures[0])
    packed, info = _read(
        kind,
        path,
        config=config,
        dtype=config.dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if lost := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise CheckpointError(
            f"{path} lacks {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}, which {kind.__name__} needs: they "
            "would be random. Take the file from a good copy."
        )
    with torch.device("meta"):
        model = kind._from_config(config)  # without the marks of a quantised model, which cannot be saved
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    if "tokenizer.ggml.model" in header.fields:
        tokenizer = _read(transformers.AutoTokenizer, path)
        _split_as_the_file_says(tokenizer, header.fields.get("tokenizer.ggml.pre"))
        length = header.fields.get(f"{header.architecture}.context_length")
        tokenizer.model_max_length = length or tokenizer.model_max_length
        tokenizer.save_pretrained(folder)


def _split_as_the_file_says(tokenizer: Any, kind: Any) -> None:
    """SmolLM's tokens never join digits, nor a space with one; transformers does not know that kind."""
    from tokenizers import pre_tokenizers as pre

    if kind == "smollm":
        digits, rest = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([digits, rest])


def _read(kind: Any, path: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of the file; whatever goes wrong there is a CheckpointError."""
    try:
        return kind.from_pretrained(path.parent, gguf_file=path.name, **options)
    except HfEfficientError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:500]
        raise CheckpointError(
            f"transformers cannot read the GGUF file {path}: {type(error).__name__}: {reason}. Take the model as "
            "safetensors, if there is such a copy, or update transformers and gguf."
        ) from error


def _files(folder: Path) -> dict[str, list[Any]]:
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns, file_digest(file)]
        for file in sorted(folder.iterdir())
        if file.name != MADE
    }


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
