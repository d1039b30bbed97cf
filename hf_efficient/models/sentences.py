"""The chain of sentence-transformers around a model: found by the model's name, written beside what became of it.

modules = sentence_modules("BAAI/bge-small-en-v1.5")   # its own, or one that pools a plain model
small = prune(AutoModel.from_pretrained("BAAI/bge-small-en-v1.5"), config, batches)
small.save_pretrained("out/small"), tokenizer.save_pretrained("out/small")
write_modules(modules, small.config, tokenizer, "out/small")          # SentenceTransformer("out/small")
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..data.sentence_modules import SentenceModules, new_modules
from ..data.tasks import TASKS
from ..errors import UnsupportedModelError
from .loading import load_sentence_modules
from .registry import token_limit


def sentence_modules(name: str | Path | None, pooling: str = "mean", *, normalize: bool = False) -> SentenceModules:
    """What stands behind the transformer of a folder, Hub id or bundled model.

    Parameters:
        name: None: of a model that comes from nowhere.
        pooling, normalize: of a plain model; see `new_modules`.

    Raises:
        CheckpointError, UnsupportedModelError: see `load_sentence_modules`.
    """
    found = None if name is None else load_sentence_modules(name)
    if found is not None and found.pooling is None:
        raise UnsupportedModelError(
            f"{str(name)!r} is a CrossEncoder: it scores pairs of texts and makes no vectors. Its task is reranking."
        )
    return found or new_modules(pooling, normalize=normalize)


def cross_encoder_modules(name: str | Path | None) -> SentenceModules:
    """The same of a model that scores pairs: what a CrossEncoder has, or gets. A chain that makes vectors ends here:
    its transformer gets a head in the place of Pooling."""
    found = None if name is None else load_sentence_modules(name)
    return found if found is not None and found.pooling is None else new_modules(None)


def modules_of(
    task: str, name: str | Path | None, pooling: str = "mean", *, normalize: bool = False
) -> SentenceModules | None:
    """What stands beside a model of a task; None where sentence-transformers has no part in it."""
    kind = TASKS[task].kind
    if kind == "embeddings":
        return sentence_modules(name, pooling, normalize=normalize)
    return cross_encoder_modules(name) if kind == "scores" else None


def write_modules(
    modules: SentenceModules, config: PreTrainedConfig, tokenizer: Any, folder: str | Path, *, extended: bool = False
) -> None:
    """Write the chain beside a model of this config and its tokenizer, which lie in `folder`.

    `extended`: the model takes longer texts than the one that the chain was made for.

    Raises:
        UnsupportedModelError: the model became too narrow for a module that computes.
    """
    limit = token_limit(config)
    if limit is not None and modules.is_new:
        limit = min(limit, tokenizer.model_max_length)
    modules.write(folder, width=config.hidden_size, max_length=limit if modules.is_new or extended else None)
