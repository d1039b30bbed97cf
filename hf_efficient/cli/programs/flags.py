"""Flags or a YAML file in, dataclasses out; and the data that they name: what the scripts of this room share.

    data, settings = parse(["--config", "run.yaml", "--max_length", "128"], (DataArguments, CacheSettings))

A YAML file has the same names as the flags; a flag wins over it.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedModel
from transformers.hf_argparser import HfArg

from ...data.datasets import load_dataset_any
from ...data.preparation import PreparedData, prepare
from ...data.sentence_modules import SentenceModules
from ...data.tasks import ROLES, TASKS, column_name
from ...errors import ConfigError, unknown_name
from ...io.yaml import parse as parse_yaml
from ...models.loading import load_model, load_processor
from ...models.sentences import modules_of


@dataclass
class _Source:
    dataset: str = HfArg(
        help="bundled:NAME, Hub id (user/name or user/name:config), save_to_disk folder, or a .csv, .tsv, "
        ".json, .jsonl, .parquet or .txt file."
    )
    task: str = HfArg(help=f"One of {', '.join(TASKS)}.")
    teacher: str | None = HfArg(
        default=None, help="Hub id or folder of a trained teacher; the loss ce alone needs none."
    )


_Columns: Any = make_dataclass(  # a flag for each role that a column can have
    "_Columns",
    [(column_name(role), str | None, HfArg(default=None, help=ROLES[role].help)) for role in ROLES],
    bases=(_Source,),
)


@dataclass
class DataArguments(_Columns):
    """The teacher, and the data that it is asked about; the help of each field says what it means."""

    max_length: int | None = HfArg(default=None, help="In tokens; default: the tokenizer's, at most 512.")
    image_size: int | None = HfArg(default=None, help="In pixels, where the teacher has no image processor.")
    limit: int | None = HfArg(default=None, help="At most this many rows of each split of the data.")
    test_fraction: float = HfArg(default=0.2, help="Held out where the data has no test split.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the models.")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)

    @property
    def source(self) -> str:
        """The model whose tokenizer and labels count."""
        return str(self.teacher)

    def load_processor(self) -> Any:
        """The teacher's tokenizer or image processor; without one, the student's."""
        found = load_processor(
            self.source,
            images=TASKS[self.task].is_of_images,
            whole=bool(TASKS[self.task].reads),
            trust_remote_code=self.trust_remote_code,
        )
        modules = load_modules(self.task, self.source)
        return found if modules is None else modules.reading_as(found)

    def load_teacher(self) -> PreTrainedModel:
        return load_model(TASKS[self.task].auto_class, self.source, trust_remote_code=self.trust_remote_code)

    def load_data(self, processor: Any, seed: int) -> PreparedData:
        rows = load_dataset_any(
            self.dataset,
            seed=seed,
            limit=self.limit,
            test_fraction=self.test_fraction,
            **TASKS[self.task].reading(self.text_column, self.label_column),
        )
        names = [*map(column_name, ROLES), "max_length", "image_size"]
        return prepare(rows, self.task, processor, **{name: getattr(self, name) for name in names})


def load_modules(task: str, name: str) -> SentenceModules | None:
    """What sentence-transformers has beside a model, or would have; None where the task is not its own."""
    return modules_of(task, name)


def parse(words: Sequence[str], kinds: Sequence[type]) -> tuple[Any, ...]:
    """Read the flags, and below them the YAML file of `--config`, into one instance of each dataclass; ConfigError
    for an unknown key in the file, or a value that is not allowed."""
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path, help="YAML file with the names of these flags; a flag wins over it.")
    config, rest = first.parse_known_args(words)
    parser = HfArgumentParser(tuple(kinds), parents=[first])
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values: Any = {}
    if (path := config.config) is not None:
        if not path.is_file():
            raise ConfigError(f"No such config file: {path}.")
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must be a mapping of flag names to values, got {type(values).__name__}.")
    for name in values:
        if name not in actions:
            raise unknown_name(f"key in {path}", name, actions)
        actions[name].required = False
    usual = {name: value for name, value in _defaults(rest, values).items() if name in actions}
    parser.set_defaults(**usual | values)
    return parser.parse_args_into_dataclasses(rest)[: len(kinds)]


def _defaults(words: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """What the task and, of vectors, the teacher say where neither flags nor file do."""
    first = ArgumentParser(add_help=False)
    for name in ("task", "teacher"):
        first.add_argument(f"--{name}", default=values.get(name))
    given = first.parse_known_args(words)[0]
    task = TASKS.get(str(given.task))
    if task is None or task.losses is None:
        return {}
    modules = load_modules(given.task, str(given.teacher)) if given.teacher is not None else None
    return {"losses": dict(task.losses)} | ({} if modules is None else {"pooling": modules.pooling})
