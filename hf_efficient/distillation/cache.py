"""A teacher that was paid for once: its answers on disk, found by the content of each example.

cache = TeacherCache("out/cache")                    # written by `cache_teacher`
DistillationTrainer(student, args, teacher=cache, train_dataset=train, ...)

out/cache/
  cache.json                what is kept, of which teacher
  config.json               the teacher's config; its weights are not needed any more
  shard-00000/ ...          Arrow tables of `datasets`, memory-mapped
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigError, DataError, shown
from ..io.json import parse_json
from ..models.building import find_model_class
from .answers import Answer
from .batch import Batch, Task
from .cached_rows import KEY, PREFIX, Layout, row_keys
from .layer_map import Pairs
from .terms import LOSSES

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "cache.json"
FORMAT = "hf_efficient teacher cache"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Fields:
        layout: what is kept of each answer.
        model_class, teacher: the teacher's class, and sha256 of its weights and config.
        inputs: the names that its forward takes.
        rows, shard_size: how many examples there are, and in one table.
    """

    layout: Layout
    model_class: str
    teacher: str
    inputs: tuple[str, ...]
    rows: int
    shard_size: int

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(f"shard-{index:05d}" for index in range(-(-self.rows // self.shard_size)))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        try:
            values = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            layout, values["inputs"] = values.pop("layout"), tuple(values["inputs"])
            task = layout.pop("task")
            layout["task"] = Task(**task | {"stacks": tuple(task["stacks"])})
            layout["hidden_states"] = tuple(layout["hidden_states"])
            return cls(layout=Layout(**layout), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} has no teacher cache that this version can read ({error}). Make one with cache_teacher."
            ) from error


class TeacherCache:
    """The answers of a teacher, in its place: `DistillationTrainer(..., teacher=TeacherCache(folder))`.

    Of each example 16 bytes are held in memory, the rest is read where it lies.

    Raises:
        CheckpointError: no cache, one of another version, or one that was not written to its end.
    """

    def __init__(self, folder: str | Path):
        import datasets

        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.layout = self.manifest.layout
        missing = [name for name in self.manifest.shards if not (self.folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{folder} has {len(self.manifest.shards) - len(missing)} of {len(self.manifest.shards)} shards. Call "
                "cache_teacher again with the same arguments: it goes on where it was stopped."
            )
        shards = [open_shard(self.folder / name, self.manifest) for name in self.manifest.shards]
        self._rows = datasets.concatenate_datasets(shards).with_format("arrow")
        heads = _heads(self._rows.select_columns([KEY])[:][KEY].to_pylist())
        self._order = np.argsort(heads, kind="stable")
        self._heads = heads[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def skeleton(self) -> PreTrainedModel:
        """The teacher without its weights, on the meta device: its class, config and forward."""
        config = AutoConfig.from_pretrained(self.folder)
        name = self.manifest.model_class
        kind = getattr(transformers, name, None) or find_model_class(name)
        with torch.device("meta"):
            return kind(config)

    def check(self, args: Any, pairs: Mapping[str, Mapping[str, Pairs]]) -> None:
        """Whether the losses of these `DistillationArguments` find here what they need.

        Raises:
            ConfigError: losses that look into the teacher, or settings that the cache was not made for.
        """
        layout = self.layout
        for name in args.losses:
            if LOSSES[name].needs_attentions:
                raise ConfigError(f"The loss `{name}` looks into the teacher's attention, which no cache keeps.")
        wanted = {pair[1] for own in pairs.get("hidden", {}).values() for pair in own}
        if missing := sorted(wanted - set(layout.hidden_states)):
            raise ConfigError(
                f"The `hidden` loss needs the teacher's hidden states {missing}; this cache has "
                f"{list(layout.hidden_states) or 'none'}. Make it with hidden_states={sorted(wanted)}."
            )
        settings: dict[str, Any] = {"teacher_max_length": None, "teacher_dtype": None, "share_encoder": False}
        if layout.keeps_few:
            settings |= {"temperature": layout.temperature, "temperature_final": None, "truncate_vocabulary": False}
        if layout.sampled is not None:
            settings["divergence"] = "forward"
        if layout.task.kind == "embeddings":
            settings["pooling"] = layout.pooling
        for name, value in settings.items():
            if getattr(args, name) != value:
                raise ConfigError(f"{name}={getattr(args, name)!r} cannot be had of this cache: it needs {value!r}.")

    def collator(self, collate: Callable[[list], Any]) -> Callable[[list], dict[str, Any]]:
        """As `collate`; the batches have the teacher's answers with them."""
        return _Collator(self, collate)

    def find(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of the teacher's answers to a batch.

        Raises:
            DataError: an example that is not in the cache.
        """
        batch = Batch(dict(inputs), self.layout.task)
        keys = row_keys(batch, self.manifest.inputs)
        places = np.searchsorted(self._heads, _heads(keys)).clip(max=len(self) - 1)
        table = self._rows[self._order[places]]
        absent = sum(found != key for found, key in zip(table[KEY].to_pylist(), keys, strict=True))
        if absent:
            raise DataError(
                f"{absent} of {len(keys)} examples of a batch are not among the {len(self)} of {self.folder}. The "
                "cache holds what the teacher said about exactly these tokens or pixels: make it of this data "
                "(training and evaluation), cut and tokenised alike, without random masking or augmentation."
            )
        columns = {name: _arrays(table[name]) for name in self.layout.columns()}
        return self.layout.unpack(batch, columns)

    def answer(self, batch: Batch) -> Answer:
        """
        Raises:
            DataError: the batch was not made by `collator`.
        """
        if not any(name.startswith(PREFIX) for name in batch.inputs):
            raise DataError("The batch has no teacher's answers with it: it must come from cache.collator(...).")
        return self.layout.answer(batch)


def open_shard(path: Path, manifest: Manifest) -> "Dataset":
    """
    Raises:
        CheckpointError: it is cut short, or parts of it are missing.
    """
    import datasets

    try:
        shard = datasets.load_from_disk(str(path))
        expected = min(manifest.shard_size, manifest.rows - manifest.shards.index(path.name) * manifest.shard_size)
        if len(shard) != expected:
            raise ValueError(f"{len(shard)} of {expected} examples")
    except (OSError, ValueError, KeyError, TypeError) as error:  # of Arrow too
        raise CheckpointError(
            f"{path} is damaged ({shown(str(error))}). Delete that folder and call cache_teacher again with the same "
            "arguments: it makes what is missing."
        ) from error
    return shard


@dataclass(frozen=True)
class _Collator:
    cache: TeacherCache
    collate: Callable[[list], Any]

    def __call__(self, rows: list) -> dict[str, Any]:
        inputs = dict(self.collate(rows))
        return inputs | self.cache.find(inputs)


def _arrays(column: Any) -> list[np.ndarray]:
    """One flat array for each row of an Arrow column of lists."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if hasattr(lists, "chunk") else lists
    values, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(ends)]


def _heads(keys: list[bytes]) -> np.ndarray:
    """The first 64 bits of each key; two examples that share them would be told apart by the rest."""
    return np.frombuffer(b"".join(key[:8] for key in keys), dtype=np.uint64)
