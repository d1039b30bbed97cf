"""Run a teacher over data once and keep its answers.

    cache_teacher(teacher, [train, test], "out/cache", data_collator=collator, top_k=64, temperature=2.0)

Under `accelerate launch` the processes share the shards out. Each shard is written under a temporary name and renamed;
a call that was killed goes on with those that are missing, and one that asks for something else is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, default_data_collator

from ...errors import CheckpointError, ConfigError
from ...io.disk import clear_disk_errors, new_folder, write_atomic
from ...models.modes import eval_mode
from ...models.pooling import POOLINGS
from ...models.registry import text_config
from ...models.token_masks import counts_columns, first_positions
from ...training.batch import Batch, base_of, forward_names, head_of
from ...training.lengths import in_batches
from ...training.progress import told
from ...training.ranks import in_order, meet, on_main, share, together
from ..answers import read_answer
from ..collating import CheckedCollator
from ..hidden_states import wanted_states
from ..layer_map import depths, width
from ..losses.tables import MAX_TEMPERATURE
from .cache import CONFIG, MANIFEST, MAX_SHARDS, SEAL, Manifest, TeacherCache, digest_of, features_of, open_shard, seal
from .rows import DTYPES, KEY, Layout, row_keys

if TYPE_CHECKING:
    from datasets import Dataset

MAX_CLASSES = 4096  # of each token; a whole vocabulary would fill the disk


def cache_teacher(
    teacher: PreTrainedModel,
    dataset: "Dataset | Sequence[Dataset]",
    folder: str | Path,
    *,
    data_collator: Callable[[list], Any] = default_data_collator,
    batch_size: int = 8,
    top_k: int | None = None,
    sampled: int | None = None,
    temperature: float = 1.0,
    hidden_states: Sequence[int] = (),
    pooling: str = "mean",
    dtype: str | None = None,
    shard_size: int = 1000,
) -> TeacherCache:
    """Write the teacher's answers to all examples into `folder`, and open them.

    Classifiers, question answering and embeddings (pooled) are kept whole. Of a vocabulary the `top_k` largest logits
    of each token are kept with the log-sum-exp of all at `temperature`, which is then that of the training:
    k (4 + 2) + 4 bytes a token, k (4 + 4) + 4 above 65,536 entries; k x 2 less with dtype="float16". Or `sampled`
    tokens are drawn by their chances at `temperature` and kept with the entropy of these: unbiased for the forward
    divergence, and (k + 1) 2 + 4 bytes a token, (k + 1) 4 + 4 above 65,536 entries.

    Parameters:
        teacher: a loaded model, on the device where it is to run; it runs in eval mode, and gets its own back.
        dataset: tokenised examples, or several data sets (train and test) for one cache.
        data_collator: the one of the training.
        top_k, sampled: how many of each token, one of both; `None` keeps all logits, up to 4,096 classes for each.
        hidden_states: which of them to keep for the `hidden` loss, as in `layer_map`; 0 is the embeddings.
        dtype: `float16`, `float32` or `float64` on disk; default: what the teacher computes, at least float32.
        shard_size: examples in one table.

    Raises:
        ConfigError: an option out of range, or a vocabulary without `top_k` or `sampled`.
        CheckpointError: the folder holds something else, or the cache of another teacher, data or options; a shard in
            it is damaged; the disk is full.
    """
    import datasets

    names = forward_names(teacher) | {"label", "label_ids"}  # text columns that are left over would break the collator
    parts = [dataset] if hasattr(dataset, "column_names") else list(dataset)
    parts = [part.remove_columns([name for name in part.column_names if name not in names]) for part in parts]
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    choice = Choice(top_k, sampled, temperature, tuple(hidden_states), pooling, dtype)
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size!r}.")
    manifest = _manifest(teacher, choice, len(rows), shard_size)
    PartialState()  # makes the process group where `accelerate launch` or torchrun means one
    folder, collate = Path(folder), CheckedCollator(data_collator, teacher)
    then = "Then call cache_teacher again: it goes on with the shards that are missing."
    with together("cache_teacher"), clear_disk_errors(folder, then):
        on_main(lambda: _begin(folder, manifest, teacher))
        manifest = _begin(folder, manifest, teacher)  # what is there now
        with eval_mode(teacher):
            for index in told(share(range(len(manifest.shards))), f"teacher, {manifest.shard_size:,} rows each"):
                part = rows.select(range(index * shard_size, min((index + 1) * shard_size, len(rows))))
                _write_shard(folder / manifest.shards[index], part, teacher, manifest, collate, batch_size)
        meet()
    return TeacherCache(folder)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 of the weights and of what the config says about the computation."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        for place, part in _plain_parts(name, tensor.detach()):
            digest.update(f"{place}{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor itself; of a quantised one, whose bytes cannot be seen, what it is made of: integers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()  # the rest is in the config's quantization_config too
    for part in inner:
        yield from _plain_parts(f"{name}.{part} of {type(tensor).__name__}", getattr(tensor, part))


@dataclass(frozen=True)
class Choice:
    """What `cache_teacher` is told to keep of each answer."""

    top_k: int | None
    sampled: int | None
    temperature: float
    hidden_states: tuple[int, ...]
    pooling: str
    dtype: str | None


def _manifest(teacher: PreTrainedModel, choice: Choice, rows: int, shard_size: int) -> Manifest:
    for name, value in (("shard_size", shard_size), ("rows of the data", rows)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value!r}.")
    if rows > shard_size * MAX_SHARDS:
        raise ConfigError(f"shard_size={shard_size} makes more than {MAX_SHARDS} tables of {rows} examples.")
    return Manifest(
        layout=_layout(teacher, choice),
        model_class=type(base_of(teacher)).__name__,
        teacher=fingerprint(teacher),
        inputs=tuple(sorted(forward_names(teacher))),
        rows=rows,
        shard_size=shard_size,
    )


def _layout(teacher: PreTrainedModel, choice: Choice) -> Layout:
    head, dtype, temperature, hidden_states = head_of(teacher), choice.dtype, choice.temperature, choice.hidden_states
    if head.kind == "ctc":
        raise ConfigError(
            "Answers to sounds frame by frame (CTC) are not cached. Give the trainer the teacher itself."
        )
    if dtype is None:
        dtype = "float64" if teacher.dtype == torch.float64 else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if choice.pooling not in POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {choice.pooling!r}.")
    classes = 0 if head.kind in ("embeddings", "spans") else head.num_labels
    if head.kind in ("tokens", "causal_lm") and not classes:
        classes = text_config(base_of(teacher).config).vocab_size
    if choice.top_k is not None and choice.sampled is not None:
        raise ConfigError(f"Give top_k={choice.top_k!r} or sampled={choice.sampled!r}, not both.")
    for name, k in (("top_k", choice.top_k), ("sampled", choice.sampled)):
        if k is not None and (head.kind not in ("tokens", "causal_lm") or type(k) is not int or k < 1):
            raise ConfigError(f"{name}={k!r} must be 1 or more, and is for models with an answer for each token.")
    top_k, sampled = (None if k is not None and k >= classes else k for k in (choice.top_k, choice.sampled))
    keeps_all = top_k is None and sampled is None
    if head.kind in ("tokens", "causal_lm") and keeps_all and classes > MAX_CLASSES:
        raise ConfigError(
            f"All {classes} logits of each token would be {classes * 4 / 1024:.0f} KiB a token. Give top_k=64 or "
            "sampled=64, and the temperature of the training."
        )
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not 0 < temperature <= MAX_TEMPERATURE:
        raise ConfigError(f"temperature must be above 0 and at most {MAX_TEMPERATURE:g}, got {temperature!r}.")
    depth = min(depths(teacher, head.stacks).values()) if hidden_states else 0
    if any(type(p) is not int or not 0 <= p <= depth for p in hidden_states):
        raise ConfigError(f"hidden_states={list(hidden_states)} must be positions from 0 (embeddings) to {depth}.")
    return Layout(
        task=head,
        classes=classes,
        top_k=top_k,
        sampled=sampled,
        temperature=1.0 if keeps_all else float(temperature),
        hidden_states=tuple(sorted(set(hidden_states))),
        hidden_size=width(teacher) if hidden_states or head.kind == "embeddings" else 0,
        pooling=choice.pooling,
        dtype=dtype,
    )


def _begin(folder: Path, manifest: Manifest, teacher: PreTrainedModel) -> Manifest:
    """The manifest of a new cache, or of one to go on with; CheckpointError if the folder holds something else."""
    if (folder / MANIFEST).is_file():
        there = Manifest.read(folder)
        differing = [name for name, value in vars(manifest).items() if getattr(there, name) != value]
        if differing := [name for name in differing if name != "config"]:  # `teacher` covers it
            raise CheckpointError(
                f"{folder} is a teacher cache with another {' and '.join(differing)}. Choose another folder, or "
                "delete this one."
            )
        return there
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and is not a teacher cache. Choose another folder.")
    with new_folder(folder) as new:
        values = base_of(teacher).config.to_dict()
        values.pop("quantization_config", None)  # says how its weights lie in memory, which is not kept
        type(base_of(teacher).config).from_dict(values).save_pretrained(new)
        manifest = replace(manifest, config=digest_of(new / CONFIG))
        write_atomic(new / MANIFEST, manifest.to_json())
    return manifest


def _write_shard(
    path: Path,
    rows: "Dataset",
    teacher: PreTrainedModel,
    manifest: Manifest,
    collate: Callable[[list], Any],
    batch_size: int,
) -> None:
    """Nothing where it is there already; CheckpointError if it has other examples, or is damaged."""
    import datasets

    layout, places = manifest.layout, in_batches(rows, batch_size)
    numbers = [row for place in places for row in place]

    def batches() -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        for place in places:
            inputs = dict(collate([rows[row] for row in place]))
            yield inputs, row_keys(Batch(inputs, layout.task), manifest.inputs)

    if path.is_dir():
        if list(open_shard(path, manifest)[KEY]) != in_order([key for _, keys in batches() for key in keys], numbers):
            raise CheckpointError(f"{path} holds answers to other examples. Choose another folder for this data.")
        return
    table: dict[str, list[Any]] = {name: [] for name in (KEY, *layout.columns())}
    for inputs, keys in batches():
        table[KEY] += keys
        for name, values in _answers(teacher, inputs, keys, layout).items():
            table[name] += values
    with new_folder(path) as new:
        in_place = {name: in_order(values, numbers) for name, values in table.items()}
        datasets.Dataset.from_dict(in_place, features=features_of(layout)).save_to_disk(str(new))
        write_atomic(new / SEAL, seal(new, manifest))


@torch.no_grad()
def _answers(
    teacher: PreTrainedModel, inputs: dict[str, Any], keys: list[bytes], layout: Layout
) -> dict[str, list[np.ndarray]]:
    placed = {k: v.to(teacher.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    batch = Batch(placed, layout.task)
    names = forward_names(teacher)
    kwargs = batch.model_inputs(names, base_of(teacher))
    if counts_columns(base_of(teacher), names):
        kwargs |= first_positions(batch.inputs)
    return layout.pack(batch, read_answer(batch, teacher(**kwargs, **wanted_states(layout.hidden_states)), {}), keys)
