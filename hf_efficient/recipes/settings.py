"""The sections of a recipe that are not stages: which model, which data, how it is measured.

read(DataSettings, {"name_or_path": "bundled:digits", "limti": 100}, "data")    # ConfigError: data.limti: unknown ...
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

from ..data.bundled import DATASETS, MODELS, PREFIX
from ..data.tasks import ROLES, TASKS, column_name
from ..errors import ConfigError, shown, unknown_name
from ..io.yaml import plain
from ..reporting.timing import LOADS
from ..stages.settings import MAX_BATCH, MAX_STEPS, MAX_TOKENS, Settings, flag, integer, keys_of, number, ruled, text

MAX_INPUT = 1 << 24  # tokens in one batch that is made up to be timed


def is_names(value: Any) -> bool:
    """A few different names."""
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value) <= 8
    )


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model to compress: an existing one by name, or a fresh one by its config."""

    name_or_path: str | None = text()  # Hub id, folder, GGUF file, or bundled:NAME
    config: dict[str, Any] | None = ruled(
        None, "a mapping", lambda value: isinstance(value, dict), optional=True
    )  # of a model that is trained from nothing
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
            if is_path and not os.path.isdir(path) and not (path.endswith(".gguf") and os.path.isfile(path)):
                raise ConfigError(f"name_or_path: no such model folder or GGUF file {shown(path)}.")

    def check_task(self, task: str) -> None:
        """Raises ConfigError unless a fresh model that reads text is told how, and no other is."""
        named = self.tokenizer is not None or self.tokenizer_size is not None
        if named and TASKS[task].is_of_images:
            raise ConfigError(f"model.tokenizer and model.tokenizer_size have no meaning for task {task!r}.")
        if TASKS[task].reads and self.config is not None:
            raise ConfigError(
                f"model.config: task {task!r} needs an existing model with its processor: give name_or_path instead."
            )
        if self.config is not None and not named and not TASKS[task].is_of_images:
            raise ConfigError(
                "model.tokenizer or model.tokenizer_size must be given, as a fresh model has no tokenizer: a Hub id, "
                "a folder or bundled:NAME; or how many tokens shall be learned from the training texts, such as 4096."
            )

    def to_dict(self) -> dict[str, Any]:
        """A tokenizer only where one is named."""
        optional = ("tokenizer", "tokenizer_size")
        return {name: value for name, value in super().to_dict().items() if name not in optional or value is not None}


@dataclass(frozen=True)
class _Source(Settings):
    name_or_path: str = text(None, optional=False)


_Columns: Any = make_dataclass(  # a field for each role that a column can have
    "_Columns", [(column_name(role), str | None, text()) for role in ROLES], bases=(_Source,), frozen=True
)


@dataclass(frozen=True)
class DataSettings(_Columns):
    """The data set, and how it is read: the arguments of `load_dataset_any` and `prepare`.

    A file is looked for when a run begins, not before: a recipe may be read where its data is not.
    """

    max_length: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens
    image_size: int | None = integer(None, 1, 4096, optional=True)  # pixels
    test_fraction: float = number(0.2, 0.001, 0.999)
    limit: int | None = integer(None, 1, MAX_STEPS, optional=True)  # rows
    validation_fraction: float = number(0.0, 0, 0.9)  # of the training rows, kept aside for what a search decides
    mixed_with: list[str] | None = ruled(  # further data sets whose texts are trained and calibrated on too
        None,
        "a list of up to 8 different data sets, each as data.name_or_path",
        is_names,
        optional=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.name_or_path, *(self.mixed_with or ())):
            _check_bundled(name, "bundled data set", DATASETS)

    def check_task(self, task: str) -> None:
        """Raises ConfigError for a column or size that the task does not use."""
        if self.mixed_with and task not in ("causal-lm", "masked-lm"):
            raise ConfigError(f"data.mixed_with is for tasks of plain texts (causal-lm, masked-lm), not for {task!r}.")
        used = {column_name(role) for role in TASKS[task].roles}
        used |= {"image_size"} if TASKS[task].is_of_images else {"max_length"}
        columns = [name for name in keys_of(self) if name.endswith("_column")]
        for name in [*columns, "image_size"]:
            if getattr(self, name) is not None and name not in used:
                uses = ", ".join(sorted(used))
                raise ConfigError(f"data.{name} has no meaning for task {task!r}, which uses {uses}.")

    def to_dict(self) -> dict[str, Any]:
        """The columns of words and of questions only where they are given."""
        rare = [column_name(name) for name, role in ROLES.items() if role.is_rare] + ["mixed_with"]
        written = super().to_dict()
        if not self.validation_fraction:
            del written["validation_fraction"]
        return {name: value for name, value in written.items() if name not in rare or value is not None}


@dataclass(frozen=True)
class MeasureSettings(Settings):
    """How latency is measured; `sequence_length` null means `data.max_length`."""

    batch_size: int = integer(1, 1, MAX_BATCH)
    sequence_length: int | None = integer(None, 1, MAX_TOKENS, optional=True)  # tokens
    repeats: int = integer(20, 2, 100_000)
    lengths: Any = ruled(  # tokens, for latency against length; null: an eighth, a quarter, a half and all
        None,
        "a rising list of up to 20 lengths in tokens, such as [128, 512]",
        lambda value: (
            isinstance(value, list)
            and len(value) <= 20
            and all(type(each) is int and 1 <= each <= MAX_TOKENS for each in value)
            and value == sorted(set(value))
        ),
        optional=True,
    )
    metrics: list[str] | None = ruled(  # further scores of classes: names of `measurement.scores.METRICS`
        None,
        "a list of up to 20 different names such as [f1, matthews_correlation]",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(name, str) for name in value)
            and len(set(value)) == len(value) <= 20
        ),
        optional=True,
    )
    other_data: list[str] | None = ruled(  # further data sets, for the main score on texts of another kind
        None,
        "a list of up to 8 different data sets, each as data.name_or_path",
        is_names,
        optional=True,
    )
    truncate_dims: Any = ruled(  # of sentence embeddings: scored too with so many numbers of each vector
        None,
        "a list of up to 8 different lengths such as [128, 64]",
        lambda value: (
            isinstance(value, list)
            and all(type(each) is int and each > 0 for each in value)
            and len(set(value)) == len(value) <= 8
        ),
        optional=True,
    )
    new_tokens: int | None = integer(None, 1, 4096, optional=True)  # written by a language model, and timed
    prompts: list[str] | None = ruled(  # what it goes on with; null: how some test texts begin
        None,
        "a list of up to 20 texts",
        lambda value: (
            isinstance(value, list) and all(isinstance(text, str) and text for text in value) and len(value) <= 20
        ),
        optional=True,
    )
    serving: list[str] | None = ruled(  # how texts of the test set come in, timed for every runtime
        None,
        f"a list of different names out of {', '.join(LOADS)}",
        lambda value: is_names(value) and set(value) <= set(LOADS),
        optional=True,
    )
    teacher_exports: bool = flag(True)  # the teacher in the runtime of every export too, to compare with
    energy: bool = flag(False)  # of every stage and of 1,000 inputs, by codecarbon
    country: str | None = ruled(  # where the power comes from, for CO2; null: only energy is told
        None,
        "an ISO code of three capital letters such as DEU",
        lambda value: isinstance(value, str) and bool(re.fullmatch("[A-Z]{3}", value)),
        optional=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.country is not None and not self.energy:
            raise ConfigError("country is for the CO2 of energy: set energy to true, or leave country out.")
        if self.prompts is not None and self.new_tokens is None:
            raise ConfigError("prompts are written on by new_tokens: say how many, such as 32, or leave prompts out.")
        for name in self.other_data or ():
            _check_bundled(name, "bundled data set", DATASETS)
        self.check_input(None)

    def check_task(self, task: str) -> None:
        """Raises ConfigError for what the models of a task cannot do."""
        if self.new_tokens is not None and task != "causal-lm":
            raise ConfigError(f"measure.new_tokens is for task 'causal-lm', not for {task!r}. Leave it out.")
        if self.serving and (TASKS[task].is_of_images or TASKS[task].reads or task == "seq2seq"):
            raise ConfigError(
                f"measure.serving is for models that read one text, not for task {task!r}. Leave it out."
            )
        if self.truncate_dims and TASKS[task].kind != "embeddings":
            raise ConfigError(f"measure.truncate_dims is for sentence-embeddings, not for {task!r}. Leave it out.")
        if self.other_data and TASKS[task].is_of_images:
            raise ConfigError(f"measure.other_data is for tasks of texts, not for {task!r}. Leave it out.")

    def check_input(self, usual: int | None) -> None:
        """ConfigError if the largest timed batch cannot be held; `usual`: tokens where `sequence_length` is null."""
        length = max(self.sequence_length or usual or 1, *(self.lengths or [1]))
        if self.batch_size * length > MAX_INPUT:
            raise ConfigError(
                f"batch_size {self.batch_size} with {length} tokens is {self.batch_size * length:,} tokens in one "
                f"input; at most {MAX_INPUT:,} are timed. Lower one of them."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is rare only where it is given, and what is on only where it is turned off."""
        plain, values = ("batch_size", "sequence_length", "repeats"), super().to_dict()
        off = {} if values.pop("teacher_exports") else {"teacher_exports": False}
        return {name: value for name, value in values.items() if name in plain or value} | off


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
