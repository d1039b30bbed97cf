"""The sections of a recipe as small dataclasses: each field carries the rule for its value, checked when made.

TrainingSettings(epochs=2, batch_size=32)
read(TrainingSettings, {"epohcs": 2}, "teacher")       # ConfigError: teacher.epohcs: unknown key. Did you ...
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..data.bundled import DATASETS, MODELS, PREFIX
from ..errors import ConfigError, unknown_name
from ..io.yaml import plain, shown
from ..pruning.gradual.schedule import Gradual

MAX_TOKENS = 1 << 20
MAX_BATCH = 1 << 16
MAX_STEPS = 10**9
MAX_INPUT = 1 << 24  # tokens in one batch that is made up to be timed
POSITION_METHODS = ("tile", "interpolate")
ROPE = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class Rule:
    """What a field accepts, in words for the message and as a test."""

    allowed: str
    accepts: Callable[[Any], bool]


def _field(default: Any, allowed: str, accepts: Callable[[Any], bool], optional: bool = False) -> Any:
    if optional:
        rule = Rule(f"{allowed}, or null", lambda value: value is None or accepts(value))
    else:
        rule = Rule(allowed, accepts)
    return field(default=default, metadata={"rule": rule})


def integer(default: int | None, low: int, high: int, optional: bool = False) -> Any:
    allowed = f"an integer from {low} to {high}"
    return _field(default, allowed, lambda value: type(value) is int and low <= value <= high, optional)


def number(default: float | None, low: float, high: float, above: bool = False, optional: bool = False) -> Any:
    """`above`: more than `low`, instead of at least."""
    return _field(
        default,
        f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}",
        lambda value: type(value) in (int, float) and (low < value if above else low <= value) and value <= high,
        optional,
    )


def text(default: str | None = None, optional: bool = True) -> Any:
    return _field(default, "text", lambda value: isinstance(value, str) and value.strip() != "", optional)


def one_of(default: str | None, names: tuple[str, ...], optional: bool = False) -> Any:
    return _field(default, f"one of {', '.join(names)}", lambda value: value in names, optional)


def flag(default: bool) -> Any:
    return _field(default, "true or false", lambda value: isinstance(value, bool))


# An argument of `DistillationArguments`, which says what it means and checks it; null: its default.
OPTION = {"rule": Rule("a value of DistillationArguments", lambda value: True)}


@dataclass(frozen=True)
class Settings:
    """Base of the sections: checks every field by its rule; whole numbers in float fields become floats."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, rule = getattr(self, entry.name), entry.metadata["rule"]
            if not rule.accepts(value):
                raise ConfigError(f"{entry.name} must be {rule.allowed}, got {shown(value)}.")
            if entry.type in (float, "float"):
                object.__setattr__(self, entry.name, float(value))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


S = TypeVar("S", bound=Settings)


def read(settings: type[S], given: Any, path: str) -> S:
    """The section made of a mapping; every message starts with the path of the faulty key."""
    check_keys(given, [entry.name for entry in dataclasses.fields(settings)], path)
    try:
        return settings(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


def check_keys(given: Any, known: list[str], path: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(known)}, got {shown(given)}.")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1) if isinstance(key, str) else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            name = key if isinstance(key, str) and len(key) <= 80 else shown(key)
            raise ConfigError(f"{path}.{name}: unknown key.{hint} Known: {', '.join(known)}.")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model to compress: an existing one by name, or a fresh one by its config."""

    name_or_path: str | None = text()  # Hub id, folder, or bundled:NAME
    config: dict[str, Any] | None = field(
        default=None,
        metadata={"rule": Rule("a mapping, or null", lambda value: value is None or isinstance(value, dict))},
    )
    trust_remote_code: bool = flag(False)
    tokenizer: str | None = text()  # of a fresh model that reads text: a Hub id, folder, or bundled:NAME
    tokenizer_size: int | None = integer(None, 300, 1 << 20, optional=True)  # or tokens to learn from the texts

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name_or_path is None) == (self.config is None):
            raise ConfigError(
                "name_or_path or config must be given, one of them: an existing model, or the config of a fresh one "
                "such as {model_type: vit, hidden_size: 64}."
            )
        fresh = [name for name in ("tokenizer", "tokenizer_size") if getattr(self, name) is not None]
        if fresh and (self.config is None or len(fresh) > 1):
            raise ConfigError(
                f"{' and '.join(fresh)}: an existing model has its own tokenizer, and a fresh one (config) needs one "
                "of tokenizer and tokenizer_size."
            )
        if self.tokenizer is not None:
            _check_bundled(self.tokenizer, "bundled model", MODELS)
        if self.config is not None:
            object.__setattr__(self, "config", plain(self.config, "config"))
            kind = self.config.get("model_type")
            if not isinstance(kind, str):
                raise ConfigError(f"config.model_type must be text such as 'vit', got {shown(kind)}.")
        if self.name_or_path is not None:
            _check_bundled(self.name_or_path, "bundled model", MODELS)
            path = os.path.expanduser(self.name_or_path)
            is_path = path.startswith((".", "/")) or path.count("/") > 1
            if is_path and not os.path.isdir(path):
                raise ConfigError(f"name_or_path: no such model folder {shown(path)}.")

    def to_dict(self) -> dict[str, Any]:
        """A tokenizer only where one is named."""
        optional = ("tokenizer", "tokenizer_size")
        return {name: value for name, value in super().to_dict().items() if name not in optional or value is not None}


@dataclass(frozen=True)
class DataSettings(Settings):
    """The data set, and how it is read: the arguments of `load_dataset_any` and `prepare`.

    A file is looked for when a run begins, not before: a recipe may be read where its data is not.
    """

    name_or_path: str = text(None, optional=False)
    text_column: str | None = text()
    text_pair_column: str | None = text()
    label_column: str | None = text()
    target_column: str | None = text()
    image_column: str | None = text()
    tokens_column: str | None = text()
    question_column: str | None = text()
    context_column: str | None = text()
    answers_column: str | None = text()
    max_length: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens
    image_size: int | None = integer(None, 1, 4096, optional=True)  # pixels
    test_fraction: float = number(0.2, 0.001, 0.999)
    limit: int | None = integer(None, 1, MAX_STEPS, optional=True)  # rows

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bundled(self.name_or_path, "bundled data set", DATASETS)

    def to_dict(self) -> dict[str, Any]:
        """The columns of words and of questions only where they are given."""
        rare = ("tokens_column", "question_column", "context_column", "answers_column")
        return {name: value for name, value in super().to_dict().items() if name not in rare or value is not None}


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """One fine-tuning: what a recipe may say of `TrainingArguments`. `max_steps` wins over `epochs`."""

    epochs: float = number(1.0, 0, 10_000, above=True)
    max_steps: int | None = integer(None, 1, MAX_STEPS, optional=True)
    batch_size: int = integer(16, 1, MAX_BATCH)
    learning_rate: float = number(5e-5, 0, 10, above=True)
    warmup_ratio: float = number(0.1, 0, 0.99)
    weight_decay: float = number(0.0, 0, 10)
    max_length: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens; null: as data.max_length


@dataclass(frozen=True)
class TransferSettings(TrainingSettings):
    """One attention transfer: only the learned parts of the new attention are trained, and take large steps."""

    learning_rate: float = number(1e-2, 0, 10, above=True)


@dataclass(frozen=True)
class LongerSettings(Settings):
    """Longer inputs than the model was made for: the arguments of `extend_positions`."""

    positions: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens
    position_method: str = one_of("tile", POSITION_METHODS)  # of a learned table
    rope: str | None = one_of(None, ROPE, optional=True)  # of rotary positions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions is None and (self.position_method != "tile" or self.rope is not None):
            raise ConfigError("positions must say how many tokens the model shall take, got null.")

    def to_dict(self) -> dict[str, Any]:
        """Nothing where nothing is asked for."""
        if self.positions is None:
            return {}
        return {name: value for name, value in super().to_dict().items() if value is not None}


@dataclass(frozen=True)
class DistillSettings(TrainingSettings):
    """Training against the teacher. `losses` gives the weight of each name in `distillation.terms.LOSSES`."""

    losses: dict[str, float] = field(
        default_factory=lambda: {"kd": 1.0},
        metadata={
            "rule": Rule(
                "a mapping of losses to weights from 0 to 1e6, one of them above 0, such as {kd: 1.0, ce: 0.5}",
                lambda value: (
                    isinstance(value, dict)
                    and all(type(weight) in (int, float) and 0 <= weight <= 1e6 for weight in value.values())
                    and any(value.values())
                ),
            )
        },
    )
    temperature: float = number(2.0, 0, 1000, above=True)
    prune: Gradual | None = field(  # while it is trained: a PruningCallback
        default=None,
        metadata={
            "rule": Rule(
                "a mapping of what to prune, such as {ratio: 0.5, importance: movement}, or null",
                lambda value: value is None or isinstance(value, Gradual),
            )
        },
    )

    temperature_final: float | None = field(default=None, metadata=OPTION)
    temperature_squared: bool | None = field(default=None, metadata=OPTION)
    divergence: str | None = field(default=None, metadata=OPTION)
    jsd_beta: float | None = field(default=None, metadata=OPTION)
    soft_positions: str | None = field(default=None, metadata=OPTION)
    hidden_loss: str | None = field(default=None, metadata=OPTION)
    attention_loss: str | None = field(default=None, metadata=OPTION)
    relation_heads: int | None = field(default=None, metadata=OPTION)
    relation_layers: Any = field(default=None, metadata=OPTION)
    embedding_loss: str | None = field(default=None, metadata=OPTION)
    pooling: str | None = field(default=None, metadata=OPTION)
    layer_map: Any = field(default=None, metadata=OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        from ..distillation.terms import LOSSES

        for name in self.losses:
            if name not in LOSSES:
                raise ConfigError(f"losses: {unknown_name('loss', name, LOSSES)}")
        object.__setattr__(self, "losses", {name: float(weight) for name, weight in self.losses.items()})
        for name, value in self.options.items():
            _check_option(name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `DistillationArguments` that were given, beside losses and temperature."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.metadata["rule"] is OPTION["rule"]]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Options and `prune` only where they are asked for."""
        written = {name: value for name, value in super().to_dict().items() if value is not None or name in _PLAIN}
        return written if self.prune is None else written | {"prune": self.prune.to_dict()}


_PLAIN = {entry.name for entry in dataclasses.fields(TrainingSettings)}


def _check_option(name: str, value: Any) -> None:
    """As `DistillationArguments` checks it."""
    from ..distillation.options import DistillationOptions

    try:
        DistillationOptions(**{name: value})
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from None


@dataclass(frozen=True)
class MeasureSettings(Settings):
    """How latency is measured; `sequence_length` null means `data.max_length`."""

    batch_size: int = integer(1, 1, MAX_BATCH)
    sequence_length: int | None = integer(None, 1, MAX_TOKENS, optional=True)  # tokens
    repeats: int = integer(20, 2, 100_000)
    lengths: Any = field(  # tokens, for latency against length; null: an eighth, a quarter, a half and all
        default=None,
        metadata={
            "rule": Rule(
                "a rising list of up to 20 lengths in tokens, such as [128, 512], or null",
                lambda value: (
                    value is None
                    or (
                        isinstance(value, list)
                        and len(value) <= 20
                        and all(type(each) is int and 1 <= each <= MAX_TOKENS for each in value)
                        and value == sorted(set(value))
                    )
                ),
            )
        },
    )

    energy: bool = flag(False)  # of every stage and of 1,000 inputs, by codecarbon
    country: str | None = field(  # where the power comes from, for CO2; null: only energy is told
        default=None,
        metadata={
            "rule": Rule(
                "an ISO code of three capital letters such as DEU, or null",
                lambda value: value is None or (isinstance(value, str) and bool(re.fullmatch("[A-Z]{3}", value))),
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.country is not None and not self.energy:
            raise ConfigError("country is for the CO2 of energy: set energy to true, or leave country out.")
        self.check_input(None)

    def check_input(self, usual: int | None) -> None:
        """The largest batch that is timed can be held; `usual`: tokens where `sequence_length` is null.

        Raises:
            ConfigError: it cannot.
        """
        length = max(self.sequence_length or usual or 1, *(self.lengths or [1]))
        if self.batch_size * length > MAX_INPUT:
            raise ConfigError(
                f"batch_size {self.batch_size} with {length} tokens is {self.batch_size * length:,} tokens in one "
                f"input; at most {MAX_INPUT:,} are timed. Lower one of them."
            )

    def to_dict(self) -> dict[str, Any]:
        """`lengths`, `energy` and `country` only where they are given."""
        plain = ("batch_size", "sequence_length", "repeats")
        return {name: value for name, value in super().to_dict().items() if name in plain or value}


def recipe_name(name: Any, path: str) -> None:
    """A name becomes a folder and a title, so it is one plain word."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"{path} must be up to 64 letters, digits, '.', '_' or '-', and start with a letter or digit, "
            f"got {shown(name)}."
        )


def _check_bundled(name: str, what: str, known: Mapping[str, Any]) -> None:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
        raise ConfigError(f"name_or_path: {unknown_name(what, name.removeprefix(PREFIX), known)}")
