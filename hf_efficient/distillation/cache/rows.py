"""How one example's teacher answer becomes a row of a table and finds its way back into a batch.

A row is found by the content of the example, not by its number: `row_keys` hashes what the teacher reads of it,
without padding. So shuffling, other batches or more processes do not matter, and data that has changed is not found.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...models.heads import PROBLEMS
from ...models.pooling import POOLINGS, pool
from ...training.batch import KINDS, LABELS, Batch, Head
from ..answers import Answer
from ..losses.draws import DrawnTokens
from ..losses.tables import MAX_TEMPERATURE
from ..losses.top_k import TopLogits

PREFIX = "teacher_"
KEY = "key"
KEY_BYTES = 32
DTYPES = ("float16", "float32", "float64")
MAX_CLASSES = 1 << 31  # ids are int32 at most
MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class Column:
    """stack: whose tokens it has a vector for, None for one vector for each example. width: of each vector."""

    stack: str | None
    width: int
    dtype: str


@dataclass(frozen=True)
class Layout:
    """What is kept of a teacher's answers.

    classes: the width of its logits, 0 without a head.
    top_k: how many logits of each token; sampled: how many tokens drawn for each. Neither: all logits.
    temperature: at which the log-sum-exp of `top_k` is taken, or tokens are drawn.
    hidden_states: which positions, 0 is the embeddings.
    hidden_size: their width.
    pooling: of the embedding of a model without a head.
    dtype: of all numbers but ids, entropy and log-sum-exp.
    """

    task: Head  # the name that manifests have
    classes: int
    top_k: int | None
    temperature: float
    hidden_states: tuple[int, ...]
    hidden_size: int
    pooling: str
    dtype: str
    sampled: int | None = None

    def __post_init__(self) -> None:
        """ValueError for what no teacher has; a manifest may say anything, and these numbers decide about memory."""
        head = self.task
        numbers = {
            "classes": (self.classes, 0, MAX_CLASSES),
            "num_labels": (head.num_labels, 0, MAX_CLASSES),
            "hidden_size": (self.hidden_size, 0, MAX_WIDTH),
        }
        few = {"top_k": self.top_k, "sampled": self.sampled}
        numbers |= {f"{n} (classes {self.classes})": (k, 1, self.classes) for n, k in few.items() if k is not None}
        numbers |= {f"hidden_states {i}": (position, 0, MAX_WIDTH) for i, position in enumerate(self.hidden_states)}
        for name, (value, low, high) in numbers.items():
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        names = {
            "kind": (head.kind, KINDS),
            "problem": (head.problem, (None, *PROBLEMS)),
            "stacks": (head.stacks, (("encoder",), ("encoder", "decoder"))),
            "pooling": (self.pooling, POOLINGS),
            "dtype": (self.dtype, DTYPES),
        }
        for name, (choice, known) in names.items():
            if choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {choice!r}")
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be above 0 and at most {MAX_TEMPERATURE:g}, got {self.temperature!r}")
        if self.top_k is not None and self.sampled is not None:
            raise ValueError("top_k and sampled are not to be had together")

    @property
    def keeps_few(self) -> bool:
        """Whether less is kept of each token than all its logits."""
        return self.top_k is not None or self.sampled is not None

    def columns(self) -> dict[str, Column]:
        stack = None if self.task.kind == "examples" else self.task.stacks[-1]
        ids = "uint16" if self.classes <= 1 << 16 else "int32"
        wide = "float64" if self.dtype == "float64" else "float32"
        if self.task.kind == "embeddings":
            columns = {"pooled": Column(None, self.hidden_size, self.dtype)}
        elif self.task.kind == "spans":
            columns = {"logits": Column(stack, 2, self.dtype)}
        elif self.top_k is not None:
            columns = {
                "top_ids": Column(stack, self.top_k, ids),
                "top_logits": Column(stack, self.top_k, self.dtype),
                "log_sum_exp": Column(stack, 1, wide),
            }
        elif self.sampled is not None:
            columns = {"drawn_ids": Column(stack, 1 + self.sampled, ids), "entropy": Column(stack, 1, wide)}
        else:
            columns = {"logits": Column(stack, self.classes, self.dtype)}
        for stack in self.task.stacks:
            columns |= {
                _hidden(stack, position): Column(stack, self.hidden_size, self.dtype)
                for position in self.hidden_states
            }
        return columns

    def pack(self, batch: Batch, answer: Answer, keys: Sequence[bytes]) -> dict[str, list[np.ndarray]]:
        """The answer to a batch, with the keys of its examples, as one flat array for each example and column."""
        tensors = {_hidden(*place): state for place, state in answer.states.items()}
        if answer.last is not None:
            tensors["pooled"] = pool(answer.last, batch.token_masks()["encoder"], self.pooling)
        elif self.task.kind == "spans":
            tensors["logits"] = _tensor(answer.logits).transpose(1, 2)
        elif self.top_k is not None:
            top = TopLogits.of(_tensor(answer.logits), self.top_k, self.temperature)
            tensors |= {"top_ids": top.ids, "top_logits": top.logits, "log_sum_exp": top.log_sum_exp[..., None]}
        elif self.sampled is not None:
            drawn = self._draw(_tensor(answer.logits), batch.token_masks()[self.task.stacks[-1]], keys)
            tensors |= {"drawn_ids": drawn.ids, "entropy": drawn.entropy[..., None]}
        else:
            tensors["logits"] = _tensor(answer.logits)
        masks = batch.token_masks()
        packed = {}
        for name, column in self.columns().items():
            values = tensors[name].cpu()
            mask = None if column.stack is None else masks[column.stack].cpu()
            by_token = mask is not None and mask.dim() == 2
            rows = [values[i][mask[i]] if by_token else values[i] for i in range(len(values))]
            packed[name] = [_numpy(row, column.dtype) for row in rows]
        return packed

    def _draw(self, logits: Tensor, mask: Tensor, keys: Sequence[bytes]) -> DrawnTokens:
        """Seeded by the example, so that neither its batch nor its padding matters."""
        assert self.sampled is not None
        ids = torch.zeros(*mask.shape, 1 + self.sampled, dtype=torch.long, device=logits.device)
        entropy = torch.zeros(mask.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for row, key in enumerate(keys):
            generator = torch.Generator(logits.device).manual_seed(int.from_bytes(key[:7], "little"))
            drawn = DrawnTokens.of(logits[row][mask[row]], self.sampled, self.temperature, generator)
            ids[row][mask[row]], entropy[row][mask[row]] = drawn.ids, drawn.entropy
        return DrawnTokens(ids, entropy, self.temperature)

    def unpack(self, batch: Batch, rows: Mapping[str, list[np.ndarray]]) -> dict[str, Tensor]:
        """The tensors of a batch, padded as it is; their names begin with `PREFIX`."""
        masks = batch.token_masks()
        tensors = {}
        for name, column in self.columns().items():
            dtype = "int64" if column.dtype in ("uint16", "int32") else column.dtype
            flat = torch.from_numpy(np.concatenate(rows[name]).astype(dtype, copy=False))
            values = flat.view(-1, column.width)
            mask = None if column.stack is None else masks[column.stack]
            if mask is None:
                padded = values
            elif mask.dim() == 1:  # images: all have the same positions
                padded = values.view(len(mask), -1, column.width)
            else:
                padded = values.new_zeros(*mask.shape, column.width)
                padded[mask] = values
            tensors[PREFIX + name] = padded
        return tensors

    def answer(self, batch: Batch) -> Answer:
        """What `unpack` put into the batch, as the teacher would have given it."""
        columns = {name: batch.inputs[PREFIX + name] for name in self.columns()}
        states = {
            (stack, position): columns[_hidden(stack, position)]
            for stack in self.task.stacks
            for position in self.hidden_states
        }
        if "pooled" in columns:
            return Answer(None, states, pooled=columns["pooled"])
        if self.top_k is not None:
            top = TopLogits(
                columns["top_ids"].long(), columns["top_logits"], columns["log_sum_exp"][..., 0], self.temperature
            )
            return Answer(top, states)
        if self.sampled is not None:
            drawn = DrawnTokens(columns["drawn_ids"].long(), columns["entropy"][..., 0], self.temperature)
            return Answer(drawn, states)
        logits = columns["logits"]
        if self.task.kind == "spans":
            logits = batch.span_logits(*logits.unbind(-1))
        return Answer(logits, states)


def row_keys(batch: Batch, names: Collection[str]) -> list[bytes]:
    """sha256 of what a model with the inputs `names` reads of each example: 32 bytes each."""
    masks = {stack: mask.cpu() for stack, mask in batch.token_masks().items()}
    encoder = masks["encoder"]
    inputs = {name: batch.inputs[name].cpu() for name in sorted(names) if torch.is_tensor(batch.inputs.get(name))}
    parts: list[tuple[str, Tensor, Tensor | None]] = [
        (name, value, encoder if value.shape[:2] == encoder.shape and name != "input_features" else None)
        for name, value in inputs.items()
        if not name.startswith("decoder_") and name != "attention_mask" and name not in LABELS
    ]
    if "decoder" in masks and masks["decoder"].dim() == 2 and batch.head.kind == "tokens":
        output = batch.inputs.get("decoder_input_ids")
        output = batch.labels if output is None else output
        if output is not None:
            parts.append(("output", output.cpu(), masks["decoder"]))
    keys = []
    for row in range(batch.size):
        digest = hashlib.sha256()
        if encoder.dim() == 2:  # from the first real token to the last one: holes in between matter, padding does not
            where = encoder[row].nonzero().flatten()
            span = encoder[row][where[0] : where[-1] + 1] if len(where) else encoder[row][:0]
            digest.update(span.numpy().tobytes())
        for name, value, mask in parts:
            real = value[row] if mask is None else value[row][mask[row]]
            real = real.double() if real.is_floating_point() else real.long()
            digest.update(f"{name}{tuple(real.shape)}".encode())
            digest.update(real.contiguous().numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _tensor(logits: Any) -> Tensor:
    assert isinstance(logits, Tensor)
    return logits


def _hidden(stack: str, position: int) -> str:
    return f"hidden_{stack}_{position}"


def _numpy(values: Tensor, dtype: str) -> np.ndarray:
    wide = values.float() if values.dtype == torch.bfloat16 else values
    array = wide.contiguous().numpy()
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False).reshape(-1)
    if dtype == "float16" and np.isinf(narrow).any() and not np.isinf(array).any():
        raise DataError("The teacher's numbers are too large for float16: keep them with dtype='float32'.")
    return narrow
