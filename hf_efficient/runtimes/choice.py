"""`quantize: auto`: every way to 8 bits is made and measured, and the fastest that loses little enough is taken.

    exported, tried = choose("onnx", make, folder, reader, work, allowed=0.5)
    exported.quantize, [(each.quantize, each.loss, each.milliseconds) for each in tried]

Which way is fastest depends on the processor and on the length of the texts, and which of them ruins a model on the
numbers in it, so neither is guessed. Nothing is measured on test rows: what is chosen by them would look better than
it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.tasks import TASKS
from ..errors import UnsupportedModelError
from ..io.disk import finish_folder, remove_own
from ..measurement.latency import compare_latency
from ..measurement.quality import compare_quality, inputs_of
from ..models.inputs import dummy_inputs
from ..models.modes import evaluating
from ..models.pooling import pool
from ..reporting.numbers import scale_of
from .export import Exported
from .formats import FORMATS
from .rounding import ACCURATE
from .runtime import Reader, Runtime, Work

ROUNDS = 10


@dataclass(frozen=True)
class Tried:
    """A way that was made.

    Parameters:
        quantize: None: in floats.
        loss: in the main score against the model in PyTorch: points of a percentage, else units of the score; of
            vectors 100 * (1 - mean cosine), of a reranker's scores 100 * (1 - correlation). None: it was not made.
        milliseconds: median of the timed forward; None where it was not timed, since it loses too much.
        reason: why it could not be made.
    """

    quantize: str | None
    loss: float | None
    milliseconds: float | None = None
    reason: str | None = None


def choose(
    format: str,
    make: Callable[[str | None, Path], Exported],
    folder: Path,
    reader: Reader,
    work: Work,
    allowed: float,
) -> tuple[Exported, list[Tried]]:
    """The chosen one in `folder`; all that were tried, in floats first.

    Parameters:
        make: writes the program of a way into a new folder.
        reader: the model, and rows that are neither calibrated on nor those of the test.
        allowed: more `Tried.loss` than that is too much. `int8_accurate` is made only where another way loses more.
    """
    made: dict[str | None, Exported] = {}
    tried: dict[str | None, Tried] = {}
    programs: dict[str | None, Any] = {}
    judge = _judge(reader, work)
    for way in (None, *sorted(FORMATS[format].quantizes, key=lambda name: name == ACCURATE)):
        if way == ACCURATE and programs.keys() == tried.keys():
            continue
        place = folder.with_name(f"{folder.name}-{way or 'floats'}")
        remove_own(place)  # of a run that was stopped
        try:
            made[way] = make(way, place)
        except UnsupportedModelError as error:
            if way is None:
                raise
            tried[way] = Tried(way, None, reason=str(error)[:300])
            continue
        program = Runtime(reader.model, format, place)
        loss = 0.0 if way is None else judge(program)
        tried[way] = Tried(way, loss)
        if loss <= allowed:
            programs[way] = program
    inputs = dummy_inputs(reader.model, work.batch_size, work.sequence_length)
    timing = compare_latency({str(way): each for way, each in programs.items()}, lambda _: inputs, rounds=work.repeats)
    for way in programs:
        tried[way] = replace(tried[way], milliseconds=timing.latencies[str(way)].median_ms)
    best = min(programs, key=lambda way: timing.latencies[str(way)].median_ms)
    programs.clear()  # a file that is open is not moved everywhere
    finish_folder(made[best].folder, folder)
    for way, each in made.items():
        if way != best:
            remove_own(each.folder)
    return replace(made[best], folder=folder), list(tried.values())


def _judge(reader: Reader, work: Work) -> Callable[[Any], float]:
    """Program -> what it loses to the model in PyTorch on the rows."""
    if TASKS[work.task].kind in ("embeddings", "scores"):  # rows that were trained on are no pairs and no rankings
        expected = _vectors(reader, reader.model, work)
        return lambda program: (
            100 * (1 - torch.cosine_similarity(expected, _vectors(reader, program, work)).mean().item())
        )
    first = reader.evaluated(work)

    def lost(program: Any) -> float:
        change = compare_quality(first, replace(reader, model=program, evaluation=None).evaluated(work))
        return -scale_of(change.name) * change.difference * (1 if first.quality.main.higher_is_better else -1)

    return lost


def _vectors(reader: Reader, model: Any, work: Work) -> torch.Tensor:
    """`[rows, width]`; of scores one vector of all, `[1, rows]`, around its mean."""
    outputs, embeds = [], TASKS[work.task].kind == "embeddings"
    with evaluating(reader.model):
        for row in reader.dataset:  # one at a time: ranges that are found as it runs see what stands beside it
            inputs = inputs_of(model, reader.collator([row]))
            output = torch.as_tensor(model(**inputs)[0]).float()
            outputs.append(pool(output, inputs["attention_mask"].bool(), work.pooling) if embeds else output[:, :1])
    vectors = torch.cat(outputs)
    return vectors if embeds else (vectors - vectors.mean()).T
