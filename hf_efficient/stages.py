"""What each stage of a recipe may say: a name, its settings, and the function that reads and checks them.

    STAGES["prune"]({"ratio": 0.75, "importance": "taylor"}, "stages[1].prune")

A new stage is one function and one entry of `STAGES`. Attention and pruning are checked by their own config classes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .attention.config import AttentionConfig
from .errors import ConfigError
from .pruning.config import PruningConfig
from .safe_yaml import shown
from .settings import MAX_BATCH, MAX_STEPS, DistillSettings, Settings, check_keys, integer, read

MAX_LAYERS = 1024


@dataclass(frozen=True)
class AttentionStage:
    """`convert_attention(model, stage.config, layers=stage.layers)`.

    In YAML either one variant, in all layers or in some, or a variant for each layer or range of layers:

        - attention: {kind: local, window: 64, layers: [0, 1, 2]}
        - attention: {layers: {"0": {kind: full}, "1-4": {kind: local, window: 64}}}
    """

    config: AttentionConfig | dict[int, AttentionConfig]
    layers: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.config, dict):
            return {"layers": {str(layer): config.to_dict() for layer, config in sorted(self.config.items())}}
        return self.config.to_dict() | ({} if self.layers is None else {"layers": list(self.layers)})


@dataclass(frozen=True)
class PruneStage:
    """`prune(model, stage.config, calibration)` with `calibration_samples` rows in batches of `batch_size`."""

    config: PruningConfig
    calibration: "CalibrationSettings"

    def to_dict(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        return config | {"granularity": list(config["granularity"])} | self.calibration.to_dict()


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """The rows that pruning looks at."""

    calibration_samples: int = integer(256, 1, MAX_STEPS)
    batch_size: int = integer(16, 1, MAX_BATCH)


def read_attention(given: Any, path: str) -> AttentionStage:
    names = [entry.name for entry in dataclasses.fields(AttentionConfig)]
    check_keys(given, [*names, "layers"], path)
    settings = {key: value for key, value in given.items() if key != "layers"}
    layers = given.get("layers")
    if not isinstance(layers, dict):
        chosen = None if layers is None else _layer_list(layers, f"{path}.layers")
        return AttentionStage(_made(AttentionConfig, settings, path), chosen)
    if settings:
        raise ConfigError(f"{path}: {', '.join(settings)} beside a mapping of layers; say it inside each layer.")
    configs: dict[int, AttentionConfig] = {}
    for key, value in layers.items():
        at = f"{path}.layers.{key}"
        check_keys(value, names, at)
        config = _made(AttentionConfig, value, at)
        for layer in _layer_range(key, at):
            if layer in configs:
                raise ConfigError(f"{at}: layer {layer} is given twice.")
            configs[layer] = config
    if not configs:
        raise ConfigError(f"{path}.layers is empty: leave it out to convert all layers.")
    return AttentionStage(configs)


def read_prune(given: Any, path: str) -> PruneStage:
    own = [entry.name for entry in dataclasses.fields(CalibrationSettings)]
    names = [entry.name for entry in dataclasses.fields(PruningConfig)]
    check_keys(given, [*names, *own], path)
    calibration = read(CalibrationSettings, {key: given[key] for key in own if key in given}, path)
    return PruneStage(_made(PruningConfig, {key: given[key] for key in names if key in given}, path), calibration)


def read_distill(given: Any, path: str) -> DistillSettings:
    return read(DistillSettings, given, path)


STAGES: dict[str, Callable[[Any, str], AttentionStage | PruneStage | DistillSettings]] = {
    "attention": read_attention,
    "prune": read_prune,
    "distill": read_distill,
}


def _made(config: type, settings: dict[str, Any], path: str) -> Any:
    try:
        return config(**settings)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError; TypeError: a list where text is needed
        raise ConfigError(f"{path}: {error}") from error


def _layer_list(layers: Any, path: str) -> tuple[int, ...]:
    if not isinstance(layers, list) or not layers or not all(type(n) is int and 0 <= n < MAX_LAYERS for n in layers):
        raise ConfigError(
            f"{path} must be a list of layer numbers from 0 to {MAX_LAYERS - 1}, or a mapping such as "
            f'{{"0": {{kind: full}}, "1-4": {{kind: local}}}}, got {shown(layers)}.'
        )
    if len(set(layers)) < len(layers):
        raise ConfigError(f"{path} names a layer twice: {shown(layers)}.")
    return tuple(sorted(layers))


def _layer_range(key: str, path: str) -> range:
    first, dash, last = key.partition("-")
    last = last if dash else first
    valid = all(part.isascii() and part.isdigit() and len(part) < 6 for part in (first, last))
    if not valid or not int(first) <= int(last) < MAX_LAYERS:
        raise ConfigError(f"{path}: a layer is a number, or a range such as '1-4', from 0 to {MAX_LAYERS - 1}.")
    return range(int(first), int(last) + 1)
