"""A recipe: one YAML file that says which model, which data, and what is done to the model, stage by stage.

    recipe = Recipe.from_yaml("bbc-news")                              # a shipped name, or a path
    recipe = recipe.with_overrides({"prune.ratio": "0.5", "data.limit": 100})
    recipe.fingerprint()                                               # equal recipes, equal digest

Dataclass default < YAML < overrides. Everything that can be known without loading data or weights is checked when a
recipe is made; a fault is a ConfigError that starts with its path: `stages[1].prune.ratoi: unknown key. ...`.
Relative paths are relative to the working directory.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..baselines.table import check_baselines, read_baselines
from ..data.tables import files_in
from ..data.tasks import TASKS
from ..errors import ConfigError, did_you_mean, shown, unknown_name
from ..io.yaml import MAX_CHARACTERS, parse, plain
from ..measurement.scores import METRICS, check_metrics
from ..stages.base import Stage
from ..stages.settings import Settings, TrainingSettings, check_keys, read
from ..stages.table import STAGES
from ..stages.teacher import TeacherStage
from .requirements import Requirements
from .settings import DataSettings, MeasureSettings, ModelSettings, recipe_name
from .target import HELD_OUT, Target

__all__ = ["STAGES", "Recipe", "Step", "shipped_recipes"]

TRUST = "model.trust_remote_code"
MAX_STAGES = 100
MAX_COMBINATIONS = 200
KEYS = [
    "name",
    "task",
    "seed",
    "model",
    "data",
    "teacher",
    "stages",
    "measure",
    "baselines",
    "require",
    "target",
    "sweep",
]


@dataclass(frozen=True)
class Step:
    """One step: a name of `STAGES` and the stage itself, which is its checked settings."""

    name: str
    settings: Stage

    def to_dict(self) -> dict[str, Any]:
        return {self.name: self.settings.to_dict()}


@dataclass(frozen=True)
class Recipe:
    """A whole run. Made by `from_yaml` or `from_dict`, changed by `with_overrides`.

    Parameters:
        name: names the output folder and the card.
        task: one of `hf_efficient.data.tasks.TASKS`.
        model: the model to compress.
        data: the data set and its columns.
        teacher: how the model is fine-tuned first; None: it is already trained.
        stages: what is done, in this order; may be empty (the model is then only measured).
        measure: how latency is measured.
        seed: of everything that is drawn: split, initial weights, order of the batches.
        baselines: names of `baselines.table.BASELINES`: what a user would try first, made and measured beside it.
        require: what the result must reach, else the run ends with RequirementError, and keeps what it made.
        target: what a ratio is looked for that reaches it; None: the ratio is that of the prune stage.
        sweep: dotted key -> the values that it takes; `sweep` runs all combinations.
    """

    name: str
    task: str
    model: ModelSettings
    data: DataSettings
    teacher: TrainingSettings | None = None
    stages: tuple[Step, ...] = ()
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    seed: int = 0
    baselines: tuple[str, ...] = ()
    require: Requirements | None = None
    target: Target | None = None
    sweep: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe_name(self.name, "name")
        if self.task not in TASKS:
            raise ConfigError(f"task: {unknown_name('task', self.task, TASKS)}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed must be an integer from 0 to {(1 << 32) - 1}, got {shown(self.seed)}.")
        self.data.check_task(self.task)
        self.model.check_task(self.task)
        self.measure.check_task(self.task)
        check_baselines(self.baselines, self.task)
        for path, stage in self.paths.items():
            stage.check_task(path, self.task)
        try:
            self.measure.check_input(self.data.max_length)
            check_metrics(self.measure.metrics or [], self.task, trusted=self.model.trust_remote_code)
        except ConfigError as error:
            raise ConfigError(f"measure.{error}") from None
        _check_order(self.stages)
        if self.target is not None:
            self.target.check(self.stages)
        _check_sweep(self.sweep)
        self.combinations()  # each of them must be a recipe; they are made once

    @classmethod
    def from_yaml(cls, path_or_name: str | Path) -> "Recipe":
        """Read a file, or a recipe that comes with the package: `Recipe.from_yaml("bbc-news")`."""
        path = _find(path_or_name)
        try:
            if path.stat().st_size > 4 * MAX_CHARACTERS:
                raise ConfigError(f"{path} is too large to be a recipe.")
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error}") from error
        return cls._from_plain(parse(text, str(path)))

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> "Recipe":
        """Read the content of a YAML file; nothing but ConfigError comes out of a faulty one."""
        return cls._from_plain(plain(section, "recipe"))

    @classmethod
    def _from_plain(cls, data: Any) -> "Recipe":
        check_keys(data, KEYS, "recipe")
        missing = [key for key in ("name", "task", "model", "data") if key not in data]
        if missing:
            raise ConfigError(f"A recipe must say its {', '.join(missing)}. It may say: {', '.join(KEYS)}.")
        if not isinstance(data["task"], str):
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {shown(data['task'])}.")
        return cls(
            name=data["name"],
            task=data["task"],
            seed=data.get("seed", 0),
            model=read(ModelSettings, data["model"], "model"),
            data=read(DataSettings, data["data"], "data"),
            teacher=None if data.get("teacher") is None else read(TrainingSettings, data["teacher"], "teacher"),
            stages=_read_stages(data.get("stages", []), data["task"]),
            measure=read(MeasureSettings, data.get("measure", {}), "measure"),
            baselines=read_baselines(data.get("baselines")),
            require=None if data.get("require") is None else read(Requirements, data["require"], "require"),
            target=None if data.get("target") is None else read(Target, data["target"], "target"),
            sweep=data.get("sweep") or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out; `from_dict` reads it back to an equal recipe."""
        sections: dict[str, Settings | None] = {"model": self.model, "data": self.data, "teacher": self.teacher}
        return {
            "name": self.name,
            "task": self.task,
            "seed": self.seed,
            **{name: section and section.to_dict() for name, section in sections.items()},
            "stages": [stage.to_dict() for stage in self.stages],
            "measure": self.measure.to_dict(),
            **({"baselines": list(self.baselines)} if self.baselines else {}),
            **({"require": self.require.to_dict()} if self.require else {}),
            **({"target": self.target.to_dict()} if self.target else {}),
            **({"sweep": self.sweep} if self.sweep else {}),
        }

    def combinations(self) -> dict[str, "Recipe"]:
        """A recipe for each combination of the sweep, by a label such as `ratio=0.5,kind=local`, with which the
        message of one that is no recipe starts; none without one."""
        return dict(self._combinations)

    @cached_property
    def _combinations(self) -> dict[str, "Recipe"]:
        if not self.sweep:
            return {}
        fixed = replace(self, sweep={})
        ends = [key.rsplit(".", 1)[-1] for key in self.sweep]
        names = [end if ends.count(end) == 1 else key for end, key in zip(ends, self.sweep, strict=True)]
        recipes: dict[str, Recipe] = {}
        for values in itertools.product(*self.sweep.values()):
            texts = (each if isinstance(each, str) else json.dumps(each, separators=(",", ":")) for each in values)
            pairs = (f"{name}={text}" for name, text in zip(names, texts, strict=True))
            label = re.sub(r"[^\w.=,+-]+", "_", ",".join(pairs))[:100]
            if label in recipes:
                raise ConfigError(f"sweep: two combinations are called {label!r}: is a value there twice?")
            try:
                recipes[label] = fixed.with_overrides(dict(zip(self.sweep, values, strict=True)))
            except ConfigError as error:
                raise ConfigError(f"sweep, {label}: {error}") from None
        return recipes

    @property
    def held_out(self) -> float:
        """The part of the training rows that nothing is trained on, and a search decides by."""
        return self.data.validation_fraction or (HELD_OUT if self.target else 0.0)

    @property
    def pooling(self) -> str:
        """How the tokens of a text become its vector: as the last stage that says so distilled it."""
        return next((each.settings.pooling for each in self.stages[::-1] if each.settings.pooling), "mean")

    @property
    def teaches_directions(self) -> bool:
        """Whether vectors of texts are taught without their lengths, which then mean nothing."""
        return any(step.settings.teaches_directions for step in self.stages)

    @property
    def paths(self) -> dict[str, Stage]:
        """Every stage with the teacher, in order, by what messages call it: `teacher`, `stages[0].prune`, ..."""
        stages = {f"stages[{i}].{step.name}": step.settings for i, step in enumerate(self.stages)}
        return {"teacher": TeacherStage(self.teacher), **stages}

    @property
    def folders(self) -> dict[str, Stage]:
        """The same by its folder in a run: `0-teacher`, `1-prune`, ..."""
        names = ["teacher", *(step.name for step in self.stages)]
        return {f"{i}-{name}": stage for (i, name), stage in zip(enumerate(names), self.paths.values(), strict=True)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of `to_dict`: equal for equal recipes, however they were written.

        What is required, and what it is compared with, does not count: it changes nothing of the result.
        """
        canonical = json.dumps(
            replace(self, require=None, baselines=()).to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Recipe":
        """A changed copy: `{"prune.ratio": "0.5", "data.limit": 100, "teacher": None}`.

        A dotted key starts with a section or with a stage's name, or is `stages.1.ratio` where several stages share a
        name. Text is read as YAML, so it can come from a command line.
        """
        data = self.to_dict()
        for key, value in overrides.items():
            value = parse(value, f"override {key}") if isinstance(value, str) else value
            _set(data, str(key), value)
        return Recipe.from_dict(data)

    def allowed(self, trust_remote_code: bool, overrides: Mapping[str, Any] | None = None) -> "Recipe":
        """The recipe that is run, with its overrides. Code that comes with the model runs only on your own word.

        A recipe may come from a stranger, as the model that it names: so `model.trust_remote_code` in it is only a
        wish. An override is the word of whoever runs it, as `trust_remote_code=True` is.

        Raises:
            ConfigError: the recipe wants it, and you did not say so.
        """
        words = dict(overrides or {}) | ({TRUST: True} if trust_remote_code else {})
        recipe = self.with_overrides(words) if words else self
        if recipe.model.trust_remote_code and not {"model", TRUST} & words.keys():
            named = recipe.model.name_or_path or recipe.model.tokenizer
            foreign = [name for name in recipe.measure.metrics or [] if name not in METRICS]
            metrics = f" and of the metrics {', '.join(foreign)}" if foreign else ""
            raise ConfigError(
                f"The recipe {recipe.name!r} wants to run code of the model {shown(named)}{metrics} ({TRUST}: true). "
                "It may do anything on this machine. If you know that code and want it, say so yourself: "
                "--trust-remote-code, or trust_remote_code=True in Python. Else take that line out of the recipe."
            )
        return recipe


def _check_order(steps: tuple[Step, ...]) -> None:
    """Refuse a stage that is not the last where it must be, and the same export twice."""
    names = [step.name for step in steps]
    for number, step in enumerate(steps):
        path, stage = f"stages[{number}].{step.name}", step.settings
        begins = stage.may_begin and number == 0
        allowed = names if stage.followers is None or begins else stage.followers
        if wrong := [name for name in names[number + 1 :] if name not in allowed]:
            raise ConfigError(f"{path} must come after {', '.join(wrong)}, not before: {stage.reason}.")
        if stage.beside is not None and step in steps[:number]:
            raise ConfigError(f"{path} is asked for twice: {shown(stage.to_dict())}.")


def _check_sweep(sweep: Any) -> None:
    good = isinstance(sweep, dict) and all(isinstance(key, str) for key in sweep)
    if not good or not all(isinstance(values, list) and values for values in sweep.values()):
        raise ConfigError(
            "sweep must be a mapping of dotted keys to lists of values, such as {prune.ratio: [0.3, 0.5]}, got "
            f"{shown(sweep)}."
        )
    if any(key.split(".")[0] in ("sweep", "name") for key in sweep):
        raise ConfigError("sweep: name and sweep cannot be swept over.")
    if math.prod(map(len, sweep.values())) > MAX_COMBINATIONS:
        count = math.prod(map(len, sweep.values()))
        raise ConfigError(f"sweep has {count} combinations; at most {MAX_COMBINATIONS} are run in one go.")


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def is_recipe(name: str) -> bool:
    """True if this names a recipe, and not a model."""
    return name in shipped_recipes() or name.endswith((".yaml", ".yml"))


def _find(path_or_name: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    path = os.path.expanduser(str(path_or_name))
    if os.path.isfile(path):
        return Path(path)
    beside = [name for name in files_in(os.path.dirname(path) or ".") if name.endswith((".yaml", ".yml"))]
    hint = did_you_mean(os.path.basename(path), [*beside, *shipped])
    raise ConfigError(f"No such recipe {shown(str(path_or_name))}.{hint} Give a file, or one of {', '.join(shipped)}.")


def _read_stages(entries: Any, task: str) -> tuple[Step, ...]:
    if not isinstance(entries, list) or len(entries) > MAX_STAGES:
        raise ConfigError(f"stages must be a list of at most {MAX_STAGES} stages, got {shown(entries)}.")
    steps = []
    for index, entry in enumerate(entries):
        name = _stage_name(entry, f"stages[{index}]")
        settings = {} if entry[name] is None else entry[name]
        steps.append(Step(name, STAGES[name].read(settings, f"stages[{index}].{name}", task)))
    return tuple(steps)


def _stage_name(entry: Any, path: str) -> str:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(
            f"{path} must be one stage with its settings, such as {{prune: {{ratio: 0.5}}}}, got {shown(entry)}. "
            f"Stages: {', '.join(STAGES)}."
        )
    [name] = entry
    if name not in STAGES:
        raise ConfigError(f"{path}: {unknown_name('stage', name, STAGES)}")
    return name


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Put one overriding value where its dotted key says."""
    first, *rest = key.split(".")
    if first not in KEYS or (first == "stages" and rest):
        data, first, rest = _find_stage(data["stages"], first, rest, key)
    for name in rest:
        if data.get(first) is None:
            data[first] = {}
        if not isinstance(data[first], dict):
            raise ConfigError(f"override {key}: {first} is {shown(data[first])}, not a mapping.")
        data, first = data[first], name
    data[first] = value


def _find_stage(stages: Any, first: str, rest: list[str], key: str) -> tuple[dict[str, Any], str, list[str]]:
    """The stage that `prune.ratio` or `stages.1.ratio` or `stages.1.prune.ratio` means, and what follows its name."""
    if not isinstance(stages, list):
        raise ConfigError(f"override {key}: stages is {shown(stages)}, not a list.")
    names = [_stage_name(stage, f"stages[{index}]") for index, stage in enumerate(stages)]
    if first == "stages":
        index, *rest = rest
        if index not in map(str, range(len(stages))):
            raise ConfigError(f"override {key}: there are {len(stages)} stages, numbered from 0, got {index!r}.")
        name = names[int(index)]
        return stages[int(index)], name, rest[1:] if rest[:1] == [name] else rest
    if names.count(first) > 1:
        keys = [".".join(["stages", str(index), *rest]) for index, name in enumerate(names) if name == first]
        raise ConfigError(f"override {key}: {len(keys)} stages are called {first!r}; use {' or '.join(keys)}.")
    if first not in names:
        raise ConfigError(f"override {key}: {unknown_name('section or stage', first, [*KEYS, *names])}")
    return stages[names.index(first)], first, rest
