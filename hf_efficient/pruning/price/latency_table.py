"""A table of measured times: plain numbers, how to read a price from them, how they look, and where they are kept.

    curve.price(0.5)        # half of the units: which fraction of the model's time
    print(table)            # a Markdown table in milliseconds
    save(make_key(model, 8, 128, threads), table)

Kept is one JSON file each, named by a hash of all that decides times. The folder is `hf_efficient/latency` in the
Hugging Face cache, or in `HF_EFFICIENT_CACHE` if that is set; it may be deleted at any time. A table of another
machine, another size or another version has another name; a file that cannot be read is measured anew.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils import logging

from ...io.disk import write_atomic
from ...io.environment import Environment
from ...io.json import read_json

CACHE_VERSION = 1  # of how a table is measured
NO_SIZES = ("_name_or_path", "architectures", "transformers_version", "auto_map", "id2label", "label2id")

FRACTIONS_SHOWN = (1.0, 0.75, 0.5, 0.25)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Curve:
    """What one kind of units costs in layers that compute alike.

    Fields:
        groups: for each group (`"encoder.3.heads"`) its part of all these units.
        units: how many one of them has.
        points: (fraction of the units that stay, fraction of the model's time that this saves), ascending; the last is
            (1, 0).
    """

    stack: str
    kind: str
    groups: dict[str, float]
    units: int
    points: tuple[tuple[float, float], ...]

    def saved(self, kept: float) -> float:
        """Linear between the measured points, and on to nothing beyond the last."""
        if len(self.points) == 1:
            return 0.0
        segment = next((pair for pair in pairwise(self.points) if kept <= pair[1][0]), self.points[-2:])
        (x, y), (next_x, next_y) = segment
        return y + (kept - x) * (next_y - y) / (next_x - x)

    def price(self, kept: float) -> float:
        """What that fraction of all units costs, as a fraction of the model's time: 0 of none, more of more."""
        return self.saved(0.0) - self.saved(kept)


@dataclass(frozen=True)
class LatencyTable:
    """Where the time of one forward goes.

    Fields:
        threads: CPU threads. device: such as `"cpu"`.
        total_ms: of the whole dense model: the median of several shortest times.
        curves: of heads, cross heads and neurons.
        layers: for each stack what fraction of the whole each of its layers takes.
    """

    batch_size: int
    sequence_length: int
    threads: int
    device: str
    total_ms: float
    curves: tuple[Curve, ...]
    layers: dict[str, tuple[float, ...]]

    @property
    def rest_ms(self) -> float:
        """What does not belong to any layer: embeddings, task head."""
        return self.total_ms * (1 - sum(sum(shares) for shares in self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back to an equal table."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LatencyTable":
        """Raises KeyError, TypeError or ValueError for what `to_dict` did not write."""
        curves = tuple(
            Curve(**{**curve, "points": tuple((float(x), float(y)) for x, y in curve["points"])})
            for curve in data["curves"]
        )
        layers = {stack: tuple(map(float, shares)) for stack, shares in data["layers"].items()}
        table = cls(**{**data, "curves": curves, "layers": layers})
        numbers = [table.total_ms, *(share for shares in layers.values() for share in shares)]
        numbers += [number for curve in curves for number in (*curve.groups.values(), *sum(curve.points, ()))]
        if not table.total_ms > 0 or not all(curve.points and curve.groups for curve in curves):
            raise ValueError("no times")
        if not all(isfinite(number) for number in numbers):
            raise ValueError("times that are not finite")
        return table

    def __str__(self) -> str:
        """Markdown: a layer's milliseconds by how much of it stays, and the microseconds of one unit."""
        head = ["part", "in layers", *(f"ms, {kept:.0%}" for kept in FRACTIONS_SHOWN), "µs each"]
        rows = [head, ["---"] * len(head)]
        for curve in self.curves:
            number = len(curve.groups)
            times = [self.total_ms * curve.price(kept) / number for kept in FRACTIONS_SHOWN]
            each = f"{1e3 * times[0] / curve.units:.2f}"
            name = f"{curve.stack}: {curve.units} {curve.kind.replace('_', ' ')}"
            rows.append([name, str(number), *(f"{time:.3f}" for time in times), each])
        blank = [""] * len(FRACTIONS_SHOWN)
        for stack, shares in self.layers.items():
            mean = self.total_ms * sum(shares) / len(shares)
            rows.append([f"{stack}: whole layer", str(len(shares)), f"{mean:.3f}", *blank])
        rows.append(["embeddings and head", "", f"{self.rest_ms:.3f}", *blank])
        title = (
            f"One forward of {self.batch_size} x {self.sequence_length}: {self.total_ms:.2f} ms "
            f"({self.device}, threads: {self.threads})"
        )
        return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in rows)])


def folder() -> Path:
    """Where tables are."""
    chosen = os.environ.get("HF_EFFICIENT_CACHE")
    return (Path(chosen) if chosen else Path(constants.HF_HOME) / "hf_efficient") / "latency"


def make_key(model: PreTrainedModel, batch_size: int, sequence_length: int, threads: int) -> str:
    """A hash of the model's sizes, its inputs, the device and its threads, the machine and the versions."""
    sizes = {name: value for name, value in model.config.to_dict().items() if name not in NO_SIZES}
    device = model.device
    facts = {
        "version": CACHE_VERSION,
        "class": type(model).__name__,
        "config": sizes,
        "labels": len(model.config.id2label or ()),
        "attention": model.config._attn_implementation,
        "inputs": [batch_size, sequence_length],
        "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "environment": asdict(Environment.collect()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def load(key: str) -> LatencyTable | None:
    """The table of that key; None if there is none, or none that can be read."""
    path = folder() / f"{key}.json"
    try:
        return LatencyTable.from_dict(read_json(path)) if path.exists() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        logger.warning(f"The latency table {path} cannot be read ({error}) and is measured again.")
        return None


def save(key: str, table: LatencyTable) -> None:
    """Write it by a temporary name. Where that is not allowed, it is measured again next time."""
    path = folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(table.to_dict(), indent=1) + "\n")
    except OSError as error:
        logger.warning(f"The latency table cannot be kept ({error}). Set HF_EFFICIENT_CACHE to a folder of your own.")
