"""What a baseline is, and how any model answers texts, so that all are scored and timed by the same code.

reader = BASELINES["tfidf"].reader(run, folder)                    # of what `make` wrote there, once
reader([("A fine film.",), ("Two hours lost.",)]).logits           # [2, classes]
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..measurement.latency import compare_latency
from ..measurement.quality import Evaluation, evaluate_quality, inputs_of
from ..models.registry import token_limit
from ..stages.base import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Texts = Sequence[tuple[str, ...]]  # a text, or a pair of texts, of each row


class Reader(nn.Module):
    """From texts to scores of the classes; `weight_bytes` is what must be kept to run it."""

    weight_bytes: int

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device answers are

    def scores(self, texts: Texts) -> torch.Tensor:
        """`[rows, classes]`, unnormalised."""
        raise NotImplementedError

    def forward(self, texts: Texts) -> Any:
        return SimpleNamespace(logits=self.scores(texts))


class TokenReader(Reader):
    """A model of transformers, or a program in its place, behind its tokenizer.

    Parameters:
        max_length: where texts are cut, in tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, weight_bytes: int):
        super().__init__()
        self.model, self.tokenizer, self.max_length, self.weight_bytes = model, tokenizer, max_length, weight_bytes

    def scores(self, texts: Texts) -> torch.Tensor:
        columns = [list(column) for column in zip(*texts, strict=True)]
        batch = self.tokenizer(
            *columns, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return torch.as_tensor(self.model(**inputs_of(self.model, batch)).logits)


class _Rows(nn.Module):
    """The reader behind numbers of rows: what `evaluate_quality` can call."""

    main_input_name = "rows"

    def __init__(self, reader: Reader, texts: Texts):
        super().__init__()
        self.reader, self.texts, self.config = reader, texts, None

    def forward(self, rows: torch.Tensor) -> Any:
        return self.reader([self.texts[row] for row in rows.tolist()])


def evaluate_reader(reader: Reader, texts: Texts, labels: Sequence[int], batch_size: int = 32) -> Evaluation:
    """Score its answers as those of any classifier, row by row."""
    rows = [{"rows": row, "labels": label} for row, label in enumerate(labels)]

    def collate(some: list[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in some]) for name in some[0]}

    return evaluate_quality(_Rows(reader, texts), rows, collate, "text-classification", batch_size)


class _Batches(nn.Module):
    """A reader that answers one batch after the other."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def forward(self, batches: Sequence[Texts]) -> None:
        for texts in batches:
            self.reader(texts)


def time_readers(readers: Mapping[str, Reader], batches: Sequence[Texts], rounds: int) -> tuple[dict[str, float], int]:
    """Milliseconds from the texts of one batch to their scores, the median of so many rounds in turn; CPU threads."""
    models = {name: _Batches(reader) for name, reader in readers.items()}
    timing = compare_latency(
        models, lambda _: {"batches": batches}, rounds=rounds, warmup=1, threads=torch.get_num_threads()
    )
    seconds = {name: statistics.median(times) / len(batches) for name, times in timing.seconds.items()}
    return {name: 1e3 * each for name, each in seconds.items()}, timing.threads


class Baseline:
    """One cheap way. `make` writes what it needs into a folder, so that a run that was stopped goes on after it."""

    name: ClassVar[str]
    is_shared: ClassVar[bool] = False  # whether several processes make it together, each of which calls `make`
    of_teacher: ClassVar[bool] = True  # whether it is the same whatever the stages made

    def check(self, run: Run) -> None:
        """Raises before any long work where it cannot be made."""

    def make(self, run: Run, student: Path, target: Path) -> dict[str, Any]:
        """Make it in `target`; what is told of it, plain values, `about` among them.

        `student`: the checkpoint of the result.
        """
        raise NotImplementedError(f"{type(self).__name__}.make")

    def reader(self, run: Run, folder: Path) -> Reader:
        """What `make` wrote, ready to answer."""
        raise NotImplementedError(f"{type(self).__name__}.reader")


def timed_length(recipe: Any, config: Any) -> int:
    """Tokens of the timed forward of a result with this config."""
    return recipe.measure.sequence_length or recipe.data.max_length or min(512, token_limit(config) or 512)


def reader_of(run: Run, model: "PreTrainedModel", weight_bytes: int, program: Any = None) -> TokenReader:
    """Of a checkpoint, or of `program` that was made of it, as this run cuts and tokenises texts."""
    tokenizer, limit = run.processor, token_limit(model.config, rotary=False)
    known = tokenizer.model_max_length
    length = run.recipe.data.max_length or (known if known < 512 else 512)
    return TokenReader(
        model if program is None else program, tokenizer, length if limit is None else min(length, limit), weight_bytes
    )
