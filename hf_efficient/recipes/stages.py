"""What each stage of a recipe may say: a name, its settings, and the function that reads and checks them.

    STAGES["prune"]({"ratio": 0.75, "importance": "taylor"}, "stages[1].prune")

A new stage is one function and one entry of `STAGES`. Attention and pruning are checked by their own config classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attention.config import AttentionConfig
from ..conversion.mixing import MAX_LAYERS, STACK_NAMES, ByLayer, Mixing, read_layers, spread_layers, unknown_stack
from ..errors import ConfigError
from ..io.yaml import shown
from ..pruning.config import PruningConfig
from ..pruning.gradual.schedule import WHILE_TRAINING, Gradual
from ..runtimes.export import FORMATS, QUANTIZE, check_format, folder_name
from ..runtimes.quantization import METHODS
from .settings import (
    MAX_BATCH,
    MAX_STEPS,
    DistillSettings,
    LongerSettings,
    Settings,
    TransferSettings,
    check_keys,
    integer,
    number,
    one_of,
    read,
)

ATTENTION_KEYS = [entry.name for entry in dataclasses.fields(AttentionConfig)]


@dataclass(frozen=True)
class AttentionStage:
    """`convert_attention(model, stage.config, layers=stage.layers)`, of a model for longer inputs, with transfer.

    In YAML one variant, in all layers or in some, or a variant for each layer, range, slice or stack (the keys of
    `conversion.mixing`):

        - attention: {kind: local, window: 64}
        - attention: {kind: local, window: 64, layers: [0, 1, 2]}       # or a pattern: layers: "3::4"
        - attention: {layers: {all: {kind: local, window: 64}, "3::4": {kind: full}}}
        - attention: {layers: {encoder: {kind: local}, decoder: {all: {kind: local}, 0: {kind: full}}}}

    Beside it, where wanted:

        positions: 2048                # tokens that the model shall take; the tokenizer follows
        position_method: interpolate   # a learned table is tiled unless told so
        rope: yarn                     # rotary positions: linear, dynamic or yarn
        transfer: {max_steps: 100, batch_size: 8, learning_rate: 1e-2}    # fit the learned parts to softmax first
    """

    config: Mixing
    layers: tuple[int, ...] | str | None = None
    longer: LongerSettings = field(default_factory=LongerSettings)
    transfer: TransferSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.config, AttentionConfig):
            written = self.config.to_dict()
            if self.layers is not None:
                written["layers"] = self.layers if isinstance(self.layers, str) else list(self.layers)
        else:
            written = {"layers": _written(self.config)}
        return written | self.longer.to_dict() | ({"transfer": self.transfer.to_dict()} if self.transfer else {})


def _written(config: Any) -> Any:
    if isinstance(config, AttentionConfig):
        return config.to_dict()
    return {str(key): _written(value) for key, value in config.items()}


@dataclass(frozen=True)
class PruneStage:
    """`prune(model, stage.config, calibration)` with `calibration_samples` rows in batches of `batch_size`.

    Weights that a stage made zero stay zero in all that is trained after it:

        - prune: {granularity: [weight], mask_structure: "2:4", importance: obs}
        - distill: {epochs: 1}
    """

    config: PruningConfig
    calibration: "CalibrationSettings"

    def to_dict(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        if self.config.structure and self.config.without_weights() is None:
            del config["ratio"]  # mask_structure says it, also where that is overridden
        return config | {"granularity": list(config["granularity"])} | self.calibration.to_dict()


@dataclass(frozen=True)
class VocabularyStage(Settings):
    """`prune_vocabulary(model, tokenizer, texts)` with the training texts; the last stage, of a text classifier.

        - vocabulary: {}
        - vocabulary: {max_tokens: 8000}                 # the most frequent, exact for texts that have no others

    Last, since teacher and student read the same ids while distilling; a classifier, since the scores of other tasks
    count tokens, and there would be others.
    """

    max_tokens: int | None = integer(None, 1, 1 << 24, optional=True)

    def to_dict(self) -> dict[str, Any]:
        """`max_tokens` only where it is given."""
        return {} if self.max_tokens is None else super().to_dict()


@dataclass(frozen=True)
class QuantizeStage(Settings):
    """`quantize(model, method, group_size)`: weights of 8 or 4 bits; only exports may follow it.

    - quantize: {method: int8_dynamic}
    """

    method: str = one_of("int8_dynamic", METHODS)
    group_size: int = integer(32, 1, 1 << 16)


@dataclass(frozen=True)
class ExportStage(Settings):
    """`export(model, format, quantize=...)` of what the stages before it made; the model itself stays as it is.

    - export: {format: onnx}
    - export: {format: onnx, quantize: int8}
    - export: {format: onnx, quantize: int8, min_agreement: 0.98}     # else the stage fails
    - export: {format: onnx, quantize: int8, max_loss: 0.5}           # else the run fails, and keeps what it made

    `max_loss` is what the export may lose to the teacher in the main score of the task: points of a percentage, else
    in units of the score.
    """

    format: str = one_of("onnx", tuple(FORMATS))
    quantize: str | None = one_of(None, QUANTIZE, optional=True)
    min_agreement: float | None = number(None, 0, 1, optional=True)
    max_loss: float | None = number(None, 0, 1e6, optional=True)

    def to_dict(self) -> dict[str, Any]:
        """The thresholds only where they are given, so that runs of older versions go on."""
        later = ("min_agreement", "max_loss")
        return {name: value for name, value in super().to_dict().items() if value is not None or name not in later}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format, self.quantize)

    @property
    def folder(self) -> str:
        """Where it lies beside the result."""
        return folder_name(self.format, self.quantize)


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """The rows that pruning looks at."""

    calibration_samples: int = integer(256, 1, MAX_STEPS)
    batch_size: int = integer(16, 1, MAX_BATCH)


def read_attention(given: Any, path: str) -> AttentionStage:
    extending = [entry.name for entry in dataclasses.fields(LongerSettings)]
    if isinstance(given, dict) and (stacks := sorted(STACK_NAMES & given.keys())):
        raise ConfigError(f"{path}: {', '.join(stacks)} must stand under `layers`.")
    check_keys(given, [*ATTENTION_KEYS, "layers", *extending, "transfer"], path)
    if not given:
        raise ConfigError(f"{path} is empty: give a kind, as in `attention: {{kind: local, window: 64}}`.")
    longer = read(LongerSettings, {key: given[key] for key in extending if key in given}, path)
    asked, transfer = given.get("transfer"), None
    if asked is not None:
        transfer = read(TransferSettings, asked, f"{path}.transfer")
    settings = {key: value for key, value in given.items() if key in ATTENTION_KEYS}
    layers = given.get("layers")
    if not isinstance(layers, dict):
        chosen = None if layers is None else _some_layers(layers, f"{path}.layers")
        return AttentionStage(_made(AttentionConfig, settings, path), chosen, longer, transfer)
    if settings:
        raise ConfigError(f"{path}: {', '.join(settings)} beside a mapping of layers; say it inside each layer.")
    if not layers:
        raise ConfigError(f"{path}.layers is empty: leave it out to convert all layers.")
    return AttentionStage(_read_mixing(layers, f"{path}.layers"), None, longer, transfer)


def _read_mixing(given: dict[str, Any], path: str) -> Mixing:
    """Stack by stack if a key is the name of one, else layer by layer."""
    if not any(key in STACK_NAMES for key in given):
        return _read_layers(given, path)
    for key in given:
        if key not in STACK_NAMES:
            raise ConfigError(f"{path}: {unknown_stack(key, STACK_NAMES)}")
    return {key: _read_by_layer(value, f"{path}.{key}") for key, value in given.items()}


def _read_by_layer(given: Any, path: str) -> ByLayer:
    """One attention for a whole stack, or a mapping of its layers."""
    if isinstance(given, dict) and any(isinstance(value, dict) and key != "options" for key, value in given.items()):
        return _read_layers(given, path)
    return _read_config(given, path)


def _read_layers(given: dict[str, Any], path: str) -> dict[int | str, AttentionConfig]:
    configs: dict[int | str, AttentionConfig] = {
        key: _read_config(value, f"{path}.{key}") for key, value in given.items()
    }
    try:
        spread_layers(configs, MAX_LAYERS)  # how many layers there are is not known yet; the form of the keys is
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return configs


def _read_config(given: Any, path: str) -> AttentionConfig:
    check_keys(given, ATTENTION_KEYS, path)
    return _made(AttentionConfig, given, path)


def read_prune(given: Any, path: str) -> PruneStage:
    own = [entry.name for entry in dataclasses.fields(CalibrationSettings)]
    names = [entry.name for entry in dataclasses.fields(PruningConfig)]
    check_keys(given, [*names, *own], path)
    calibration = read(CalibrationSettings, {key: given[key] for key in own if key in given}, path)
    config = _made(PruningConfig, {key: given[key] for key in names if key in given}, path)
    if config.importance == "movement":
        raise ConfigError(
            f"{path}.importance: 'movement' is learned while training. Put it in a distill stage: "
            "distill: {prune: {importance: movement}}."
        )
    return PruneStage(config, calibration)


def read_vocabulary(given: Any, path: str) -> VocabularyStage:
    return read(VocabularyStage, given, path)


def read_quantize(given: Any, path: str) -> QuantizeStage:
    return read(QuantizeStage, given, path)


def read_export(given: Any, path: str) -> ExportStage:
    return read(ExportStage, given, path)


# What may follow these stages, and why nothing else may.
LAST = {
    "vocabulary": (("quantize", "export"), "teacher and student read the same token ids until then"),
    "quantize": ((), "what follows would have to change weights of 8 bits; an export quantises by itself"),
    "export": (("export",), "it is made of the finished model"),
}


def check_order(stages: Sequence[tuple[str, Any]], task: str) -> None:
    """Refuse a stage that is not the last where it must be: (name, settings) of each.

    Raises:
        ConfigError: something follows that may not; a vocabulary stage for another task than text classification;
            the same export twice.
    """
    names = [name for name, _ in stages]
    for place, name in enumerate(names):
        path = f"stages[{place}].{name}"
        allowed, why = LAST.get(name, (names, ""))
        if wrong := [other for other in names[place + 1 :] if other not in allowed]:
            raise ConfigError(f"{path} must come after {', '.join(wrong)}, not before: {why}.")
        if name == "vocabulary" and task != "text-classification":
            raise ConfigError(
                f"{path} needs task text-classification, got {task!r}, whose score does not allow for other tokens. "
                "Call prune_vocabulary(model, tokenizer, texts) on the result."
            )
        if name == "export" and stages[place][1] in [settings for _, settings in stages[:place]]:
            raise ConfigError(f"{path} is asked for twice: {shown(stages[place][1].to_dict())}.")


def read_distill(given: Any, path: str) -> DistillSettings:
    """`prune` beside the rest prunes while it is trained:

    - distill: {epochs: 3, prune: {ratio: 0.5, importance: movement, start: 0.1, end: 0.6, every: 10}}
    """
    if isinstance(given, dict) and given.get("prune") is not None:
        given = given | {"prune": _read_gradual(given["prune"], f"{path}.prune")}
    return read(DistillSettings, given, path)


def _read_gradual(given: Any, path: str) -> Gradual:
    timing = [entry.name for entry in dataclasses.fields(Gradual) if entry.name != "config"]
    check_keys(given, [*WHILE_TRAINING, *timing], path)
    config = _made(PruningConfig, {key: given[key] for key in WHILE_TRAINING if key in given}, path)
    return _made(Gradual, {"config": config} | {key: given[key] for key in timing if key in given}, path)


AnyStage = AttentionStage | PruneStage | DistillSettings | VocabularyStage | QuantizeStage | ExportStage
STAGES: dict[str, Callable[[Any, str], AnyStage]] = {
    "attention": read_attention,
    "prune": read_prune,
    "distill": read_distill,
    "vocabulary": read_vocabulary,
    "quantize": read_quantize,
    "export": read_export,
}


def _made(config: type, settings: dict[str, Any], path: str) -> Any:
    try:
        return config(**settings)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError; TypeError: a list where text is needed
        raise ConfigError(f"{path}: {error}") from error


def _some_layers(layers: Any, path: str) -> tuple[int, ...] | str:
    """A list of layer numbers, or a pattern."""
    if isinstance(layers, str):
        try:
            read_layers(layers, MAX_LAYERS)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return layers
    if not isinstance(layers, list) or not layers or not all(type(n) is int and 0 <= n < MAX_LAYERS for n in layers):
        raise ConfigError(
            f"{path} must be a list of layer numbers from 0 to {MAX_LAYERS - 1}, a pattern such as '3::4', or a "
            f'mapping such as {{"0": {{kind: full}}, "1-4": {{kind: local}}}}, got {shown(layers)}.'
        )
    if len(set(layers)) < len(layers):
        raise ConfigError(f"{path} names a layer twice: {shown(layers)}.")
    return tuple(sorted(layers))
