"""A checkpoint written a few tensors at a time, as `save_pretrained` would leave it: shards, index, what lies beside.

portions = in_portions(stored, stored.names())
shards = shard_paths(target, len(portions))
for shard, names in zip(shards, portions):
    write_tensors(shard, {name: change(stored.read(name)) for name in names})
write_beside(model, stored.folder, target, shards)
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from ..io.checkpoint import INDEX, read_header
from ..io.disk import copy_file, write_atomic
from .on_disk import StoredModel

PORTION = 1 << 28  # bytes of one file, unless a single tensor has more
# What lies beside a model: tokenizer, processor, templates.
_BESIDE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|(video_)?preprocessor_config|processor_config|chat_template"
    r"|spiece|sentencepiece|.*\.model$).*"
)


def in_portions(stored: StoredModel, names: Iterable[str]) -> list[list[str]]:
    """The names of stored weights, those of one file together."""
    portions: list[list[str]] = []
    size = PORTION
    for name in names:
        own = stored.tensors[name].size * stored.model.dtype.itemsize
        if size + own > PORTION:
            portions.append([])
            size = 0
        portions[-1].append(name)
        size += own
    return portions


def shard_paths(target: Path, count: int) -> list[Path]:
    return [target / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_beside(
    model: PreTrainedModel, source: Path, target: Path, shards: Iterable[Path], tokenizer: bool = True
) -> None:
    """Config, generation config and, from the folder `source`, tokenizer and processor; at the very end the index.

    Parameters:
        model: that of the result, which may be without weights; its generation config counts where it generates.
        tokenizer: False: the caller writes another one.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    for path in source.iterdir() if tokenizer else ():
        if path.is_file() and _BESIDE.fullmatch(path.name) and path.suffix not in (".safetensors", ".bin"):
            copy_file(path, target / path.name)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    headers = {shard.name: read_header(shard) for shard in shards}
    size = sum(one.stop - one.start for header in headers.values() for one in header.values())
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
        "weight_map": {name: file for file, header in headers.items() for name in header},
    }
    write_atomic(target / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
