"""A pruning plan: which layers of each stack and which units of each group stay. Plain JSON that can be edited.

    plan = PruningPlan(layers={"encoder": (0, 2, 5)}, units={"encoder.0.neurons": (1, 3, 4)})
    plan.save("plan.json")
    small = prune(model, plan=PruningPlan.load("plan.json"), calibration=batches)

Numbers are those of the dense model. What is not named stays whole. `hf_efficient.plan` makes one with its
`forecast`: what the small model will be, before any weight is touched.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, shown, unknown_name
from ..io.codec import decode
from ..io.disk import write_atomic
from ..io.json import read_json
from ..models.block import MAX_LAYERS, MAX_NEURONS
from .config import PruningConfig

FORMAT = "hf_efficient pruning plan"
VERSION = 1
MAX_BYTES = 1 << 28
MAX_ENTRIES = 4 * 2 * MAX_LAYERS  # four groups in each layer of two stacks
LARGEST = 1 << 62  # of a number in a forecast
LOADS_WITH = ("portable", "plugin")
KEYS = ("format", "version", "model", "config", "chosen", "layers", "units", "forecast")


@dataclass(frozen=True)
class LayerForecast:
    """One layer of the dense model and what will be left of it."""

    stack: str
    layer: int
    heads: int
    heads_before: int
    neurons: int
    neurons_before: int
    parameters: int
    parameters_before: int
    macs: int
    macs_before: int
    experts: int = 0
    experts_before: int = 0


@dataclass(frozen=True)
class Serving:
    """What other software asks of the sizes of a small decoder.

    Parameters:
        int4_group: the largest of 128, 64 and 32 whose groups divide the inputs of every linear; 0: none of them.
        rounded_group: the same, if every layer kept a multiple of so many neurons.
        devices: how many can share out every layer evenly (tensor parallelism); none of converted attention.
    """

    int4_group: int
    rounded_group: int
    devices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What the small model will be, from shapes alone.

    Parameters:
        parameters, macs, weight_bytes, cache_bytes: of the whole model, with `_before` those of the dense one. MACs
            are those of one sequence of `length` tokens (of the layers alone, where the code of a model does not run
            without weights), cache bytes those of keys and values for one such sequence (0 for models that do not
            generate).
        removed_macs, removed_parameters: the fraction that goes of what all layers cost: what `ratio` means.
        layers: the same layer by layer.
        loads_with: `"portable"` (the stock class) or `"plugin"` (after `import hf_efficient`).
        latency_ms: measured, where the metric is latency.
        active_experts: how many experts of a mixture work for one token; fewer than before only where fewer are left.
        serving: of decoders.
    """

    length: int
    dtype: str
    loads_with: str
    parameters: int
    parameters_before: int
    macs: int
    macs_before: int
    weight_bytes: int
    weight_bytes_before: int
    cache_bytes: int
    cache_bytes_before: int
    removed_macs: float
    removed_parameters: float
    layers: tuple[LayerForecast, ...] = ()
    latency_ms: float | None = None
    latency_ms_before: float | None = None
    active_experts: int | None = None
    active_experts_before: int | None = None
    serving: Serving | None = None


@dataclass(frozen=True)
class PruningPlan:
    """What is kept.

    Parameters:
        layers: for each stack the layers that stay.
        units: for each group (`"encoder.3.heads"`, `"decoder.0.neurons"`) the units that stay. Under grouped-query
            attention a unit of `heads` is a key/value head with its query heads; `"decoder.0.experts"` are those of a
            mixture.
        chosen: False if only the sizes are known, since there were no weights to choose by.
        model: the type of the model it was made for.
        config: how it was made; decides how it is carried out (`reconstruct`).
        forecast: what it will give.
    """

    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    units: dict[str, tuple[int, ...]] = field(default_factory=dict)
    chosen: bool = True
    model: str | None = None
    config: PruningConfig | None = None
    forecast: Forecast | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back to an equal plan."""
        forecast = None if self.forecast is None else asdict(self.forecast)
        if forecast is not None:
            forecast["layers"] = list(forecast["layers"])  # JSON has no tuples
            if forecast["serving"] is None:
                del forecast["serving"]
            else:
                forecast["serving"]["devices"] = list(forecast["serving"]["devices"])
            if not any(layer["experts_before"] for layer in forecast["layers"]):  # most models have no experts
                for part in (forecast, *forecast["layers"]):
                    for name in [name for name in part if "experts" in name]:
                        del part[name]
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "config": None if self.config is None else self.config.to_dict(),
            "chosen": self.chosen,
            "layers": {name: list(kept) for name, kept in self.layers.items()},
            "units": {name: list(kept) for name, kept in self.units.items()},
            "forecast": forecast,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "PruningPlan":
        """Read what `to_dict` wrote, perhaps edited; ConfigError for no plan, unknown keys or lists not of numbers."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ConfigError(f'This is not a pruning plan: it needs "format": "{FORMAT}".')
        if data.get("version") != VERSION:
            raise ConfigError(f"The plan has version {shown(data.get('version'))}; this hf_efficient reads {VERSION}.")
        for key in data:
            if key not in KEYS:
                raise unknown_name("key of a pruning plan", key, KEYS)
        forecast, config = data.get("forecast"), data.get("config")
        chosen, model = data.get("chosen", True), data.get("model")
        if type(chosen) is not bool:
            raise ConfigError(f"`chosen` of a plan must be true or false, got {shown(chosen)}.")
        if model is not None and not isinstance(model, str):
            raise ConfigError(f"`model` of a plan must be a model type such as 'bert', or null, got {shown(model)}.")
        try:
            return cls(
                layers=_numbers("layers", data.get("layers", {})),
                units=_numbers("units", data.get("units", {})),
                chosen=chosen,
                model=model,
                config=None if config is None else PruningConfig(**config),
                forecast=None if forecast is None else _forecast(forecast),
            )
        except TypeError as error:
            raise ConfigError(f"The plan cannot be read: {error}.") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, one line for each list; complete or not at all."""
        lines = []
        for key, value in self.to_dict().items():
            if key in ("layers", "units") and value:
                inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kept)}" for name, kept in value.items())
                lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningPlan":
        """Read a JSON file.

        Raises:
            CheckpointError: no such file.
            ConfigError: not a plan.
        """
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(
                f"{file} is not a file. `plan.save(path)` or `hf-efficient plan --output` writes one."
            )
        try:
            return cls.from_dict(read_json(file, max_bytes=MAX_BYTES))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error


def _numbers(what: str, data: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"`{what}` of a plan must be a mapping of names to lists, got {type(data).__name__}.")
    if len(data) > MAX_ENTRIES:
        raise ConfigError(f"`{what}` of a plan has {len(data):,} entries, at most {MAX_ENTRIES:,} are read.")
    for name, values in data.items():
        is_list = isinstance(values, list | tuple) and len(values) <= MAX_NEURONS
        if not is_list or not all(type(value) is int and abs(value) <= MAX_NEURONS for value in values):
            raise ConfigError(
                f"`{what}.{shown(name)[1:-1]}` of a plan must be a list of at most {MAX_NEURONS:,} integers below "
                f"that, got {shown(values)}."
            )
    return {str(name): tuple(values) for name, values in data.items()}


def _forecast(data: Any) -> Forecast:
    try:
        forecast = decode(Forecast, data, "the plan's forecast")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if len(forecast.layers) > MAX_ENTRIES:
        raise ConfigError(
            f"The plan's forecast has {len(forecast.layers):,} layers, at most {MAX_ENTRIES:,} are read."
        )
    for part in (forecast, *forecast.layers, *([forecast.serving] if forecast.serving else [])):
        for name, value in vars(part).items():
            if isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
                raise ConfigError(f"`{name}` of the plan's forecast is {shown(value)}, which cannot be.")
    if forecast.loads_with not in LOADS_WITH:
        raise unknown_name("loads_with of the plan's forecast", forecast.loads_with, LOADS_WITH)
    return forecast
