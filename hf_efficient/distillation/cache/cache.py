"""A teacher that was paid for once: its answers on disk, found by the content of each example.

cache = TeacherCache("out/cache")                    # written by `cache_teacher`
DistillationTrainer(student, args, teacher=cache, train_dataset=train, ...)

out/cache/
  cache.json                what is kept, of which teacher
  config.json               the teacher's config; its weights are not needed any more
  shard-00000/ ...          Arrow tables of `datasets`, memory-mapped
    shard.json              sha256 of its files, and to which cache they belong
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import CheckpointError, ConfigError, DataError, shown
from ...io.codec import decode
from ...io.disk import inside
from ...io.json import read_json
from ...models.classes import find_model_class
from ...models.loading import load_config
from ...training.batch import Batch, forward_names
from ..answers import Answer
from ..collating import Collator
from ..layer_map import Pairs
from ..terms import LOSSES
from .rows import KEY, KEY_BYTES, PREFIX, Layout, row_keys

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "cache.json"
CONFIG = "config.json"
SEAL = "shard.json"
FORMAT = "hf_efficient teacher cache"
VERSION = 2
UNSEALED = 1  # the version whose shards have no digest
MAX_SHARDS = 100_000
MAX_ROWS = 1 << 40
MAX_INPUTS = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Fields:
        layout: what is kept of each answer.
        model_class, teacher: the teacher's class, and sha256 of its weights and config.
        inputs: the names that its forward takes.
        rows, shard_size: how many examples there are, and in one table.
        config: sha256 of config.json; empty in a cache of the first version, which had no digests.
    """

    layout: Layout
    model_class: str
    teacher: str
    inputs: tuple[str, ...]
    rows: int
    shard_size: int
    config: str = ""

    def __post_init__(self) -> None:
        """ValueError for numbers that no cache has."""
        numbers = {"rows": (self.rows, MAX_ROWS), "shard_size": (self.shard_size, MAX_ROWS)}
        for name, (value, most) in numbers.items():
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {value}")
        if -(-self.rows // self.shard_size) > MAX_SHARDS:
            raise ValueError(
                f"{self.rows} rows in tables of shard_size={self.shard_size} are more than {MAX_SHARDS} tables"
            )
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise ValueError(f"inputs must be 1 to {MAX_INPUTS} names, got {len(self.inputs)}")

    @property
    def is_sealed(self) -> bool:
        return bool(self.config)

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(f"shard-{index:05d}" for index in range(-(-self.rows // self.shard_size)))

    @property
    def identity(self) -> str:
        """sha256 of what makes an answer: the teacher, and what is kept of it."""
        facts = [self.teacher, self.model_class, self.config, self.inputs, asdict(self.layout)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """CheckpointError if there is none, or it cannot be read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no teacher cache: {MANIFEST} is missing. Make one with cache_teacher."
            )
        values = read_json(path)
        kind = (values.pop("format", None), values.pop("version", None)) if isinstance(values, dict) else None
        if kind not in ((FORMAT, VERSION), (FORMAT, UNSEALED)):
            raise CheckpointError(
                f"{folder} has no teacher cache that this version can read (another format or version). Make one with "
                "cache_teacher."
            )
        manifest: Manifest = decode(cls, values, str(path))
        if manifest.is_sealed != (kind == (FORMAT, VERSION)):
            raise CheckpointError(f"{path} is damaged at Manifest.config. Write the cache again, with cache_teacher.")
        return manifest


class TeacherCache:
    """The answers of a teacher, in its place: `DistillationTrainer(..., teacher=TeacherCache(folder))`.

    Of each example 16 bytes are held in memory, the rest is read where it lies. All files are read once, here, to
    compare them with their digests; a cache that was written before there were any is taken as it is, with a warning.

    Raises:
        CheckpointError: no cache, one of another version, one that was not written to its end, or one that is not
            as `cache_teacher` wrote it.
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
        if not self.manifest.is_sealed:
            logger.warning(
                "%s was written by an earlier version, without digests: damaged files would not be noticed. "
                "cache_teacher into a new folder writes them.",
                folder,
            )
        shards = [open_shard(self.folder / name, self.manifest) for name in self.manifest.shards]
        self._rows = datasets.concatenate_datasets(shards).with_format("arrow")
        heads = _heads(self._rows.select_columns([KEY])[:][KEY].to_pylist())
        self._order = np.argsort(heads, kind="stable")
        self._heads = heads[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def skeleton(self) -> PreTrainedModel:
        """The teacher without weights, on the meta device; CheckpointError for a class or config not the teacher's."""
        path, name = self.folder / CONFIG, self.manifest.model_class
        if self.manifest.is_sealed and digest_of(path) != self.manifest.config:
            raise CheckpointError(f"{path} is not the file that cache_teacher wrote. Take it from a good copy.")
        config = load_config(self.folder)
        kind = getattr(transformers, name, None)
        try:
            kind = find_model_class(name) if kind is None else kind
        except AttributeError:
            kind = None
        is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel
        if not is_model or not isinstance(config, kind.config_class or ()):
            raise CheckpointError(
                f"{self.folder / MANIFEST} names {shown(name)} as the teacher's class, which is not a model of "
                f"transformers for its {type(config).__name__}. Make the cache again, with cache_teacher."
            )
        with torch.device("meta"):
            model = kind(config)
        if unknown := set(self.manifest.inputs) - forward_names(model):
            raise CheckpointError(
                f"{self.folder / MANIFEST} names inputs that {name} does not take: {shown(sorted(unknown))}. Make the "
                "cache again, with cache_teacher."
            )
        return model

    def check(self, args: Any, pairs: Mapping[str, Mapping[str, Pairs]]) -> None:
        """ConfigError for losses that look into the teacher, or settings that the cache was not made for."""
        layout = self.layout
        for name in args.losses:
            if LOSSES[name].needs_attentions:
                raise ConfigError(f"The loss `{name}` looks into the teacher's attention, which no cache keeps.")
            if not LOSSES[name].needs_states:
                continue
            positions = {pair[1] for own in pairs[name].values() for pair in own}
            if missing := sorted(positions - set(layout.hidden_states)):
                raise ConfigError(
                    f"The `{name}` loss needs the teacher's hidden states {missing}; this cache has "
                    f"{list(layout.hidden_states) or 'none'}. Make it with hidden_states={sorted(positions)}."
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
        """The tensors of the teacher's answers to a batch; DataError for an example that is not in the cache."""
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
        """DataError if the batch was not made by `collator`."""
        if not any(name.startswith(PREFIX) for name in batch.inputs):
            raise DataError("The batch has no teacher's answers with it: it must come from cache.collator(...).")
        return self.layout.answer(batch)


def digest_of(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Seal:
    """What lies beside the files of a shard. cache: `Manifest.identity`. files: sha256 by name."""

    cache: str
    files: dict[str, str]


def seal(shard: Path, manifest: Manifest) -> str:
    """The text of `SEAL` for a shard that has just been written."""
    files = {path.name: digest_of(path) for path in sorted(shard.iterdir())}
    return json.dumps(asdict(Seal(manifest.identity, files)), indent=1)


def open_shard(path: Path, manifest: Manifest) -> "Dataset":
    """A shard as it was written, for this cache; CheckpointError if it is cut short, changed, or of another cache."""
    import datasets

    try:
        if manifest.is_sealed:
            _check_seal(path, manifest)
        shard = datasets.load_from_disk(str(path))
        for file in shard.cache_files:
            inside(path, file["filename"])
        _check_rows(shard, path.name, manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise CheckpointError(
            f"{path} is damaged ({shown(str(error))}). Delete that folder and call cache_teacher again with the same "
            "arguments: it makes what is missing."
        ) from error
    return shard


def _check_seal(path: Path, manifest: Manifest) -> None:
    """OSError or ValueError for other files than the seal says, or a seal of another cache."""
    sealed: Seal = decode(Seal, read_json(path / SEAL), str(path / SEAL))
    if sealed.cache != manifest.identity:
        raise ValueError("it belongs to the cache of another teacher or of other settings")
    for name, digest in sealed.files.items():
        if Path(name).name != name or digest_of(path / name) != digest:
            raise ValueError(f"{name} is not the file that was written")
    if not sealed.files.keys() >= {file.name for file in path.glob("*.arrow")} | {"state.json", "dataset_info.json"}:
        raise ValueError("it has files that are not its own")


def _check_rows(shard: Any, name: str, manifest: Manifest) -> None:
    """ValueError for a table that does not hold what the manifest says."""
    expected = min(manifest.shard_size, manifest.rows - manifest.shards.index(name) * manifest.shard_size)
    if len(shard) != expected:
        raise ValueError(f"{len(shard)} of {expected} examples")
    if shard.features != features_of(manifest.layout):
        raise ValueError("its columns are not those of the manifest")
    first = shard.with_format("arrow")[:1]
    for column, shape in manifest.layout.columns().items():
        if len(first[column][0].as_py()) % shape.width:
            raise ValueError(f"{column} is not made of vectors of {shape.width}, as the manifest says")


def features_of(layout: Layout) -> Any:
    """The columns of a shard, as `datasets` describes them."""
    import datasets

    types = {name: datasets.LargeList(datasets.Value(column.dtype)) for name, column in layout.columns().items()}
    return datasets.Features({KEY: datasets.Value("binary")} | types)


class _Collator(Collator):
    def __init__(self, cache: TeacherCache, collate: Callable[[list], Any]):
        super().__init__(collate)
        self.cache = cache

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
    """The first 64 bits of each key (CheckpointError if it is none); the rest tells two apart that share them."""
    if any(key is None or len(key) != KEY_BYTES for key in keys):
        raise CheckpointError("The cache has keys that are none. Make it again, with cache_teacher.")
    return np.frombuffer(b"".join(key[:8] for key in keys), dtype=np.uint64)
