"""What the stages of one run share: its recipe, rows, processor and config, and how checkpoints are read and written.

run = Run(recipe, folder)
run.data(128).train, run.load(folder / "0-teacher")
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.bundled import resolve_model
from ..data.datasets import load_dataset_any, rows_digest, with_texts
from ..data.preparation import PreparedData, need_column, prepare
from ..data.respelling import respelled
from ..data.sentence_modules import SentenceModules
from ..data.tasks import TASKS, Task
from ..data.tokenizer import train_tokenizer
from ..errors import CheckpointError
from ..models.loading import load_config, load_model, load_processor
from ..models.registry import token_limit
from ..models.sentences import modules_of, write_modules
from ..recipes.recipe import Recipe
from ..training.ranks import count, on_main
from .fresh import fresh_config
from .verify import output_digest
from .workspace import MANIFEST

TEACHER = "0-teacher"
TEXTS = ("text", "text_pair", "target", "tokens", "question", "context")  # the roles of columns that are read


class Run:
    """What the stages of one run share: the recipe, the rows and the processor.

    `teacher_folder`: the checkpoint that students are taught by, in the tokens of this run.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder, self.teacher_folder = recipe, folder, folder / TEACHER
        self._original: Run | None = None  # whose tokenizer counts, where a stage made this one another
        self._prepared: dict[int | None, PreparedData] = {}

    @cached_property
    def rows(self):
        data = self.recipe.data
        how = self.task.reading(data.text_column, data.label_column)
        rows = load_dataset_any(data.name_or_path, **how, **self._split)
        if data.mixed_with:
            others = [load_dataset_any(name, **self._split)["train"] for name in data.mixed_with]
            column = need_column(rows["train"], "text", data.text_column)
            rows["train"] = with_texts(rows["train"], column, others, self.recipe.seed)
        if fraction := self.recipe.held_out:
            options = how | {"seed": self.recipe.seed}
            parts = load_dataset_any({"train": rows["train"]}, test_fraction=fraction, **options)
            rows["train"], rows["validation"] = parts["train"], parts["test"]
        return rows

    @property
    def _split(self) -> dict[str, Any]:
        data = self.recipe.data
        return {"test_fraction": data.test_fraction, "seed": self.recipe.seed, "limit": data.limit}

    @cached_property
    def processor(self):
        """The tokenizer or image processor of the model; None for images that need none."""
        model, images = self.recipe.model, self.task.is_of_images
        name = model.name_or_path or model.tokenizer
        if name is not None:
            whole = bool(self.task.reads)
            found = load_processor(name, images=images, whole=whole, trust_remote_code=model.trust_remote_code)
            return found if self.modules is None else self.modules.reading_as(found)
        if images:
            return None
        if (self.teacher_folder / "tokenizer.json").is_file():  # of a run that goes on
            return load_processor(str(self.teacher_folder), images=False)
        return train_tokenizer(
            self.texts(*self.task.roles), model.tokenizer_size, close=self.recipe.task != "causal-lm"
        )

    @cached_property
    def modules(self) -> SentenceModules | None:
        """What sentence-transformers needs beside the model: that of the folder, else as the recipe pools; None for
        tasks that are not its own."""
        recipe, directions = self.recipe, self.recipe.teaches_directions
        return modules_of(recipe.task, recipe.model.name_or_path, recipe.pooling, normalize=directions)

    @property
    def pooling(self) -> str:
        """How the tokens of a text become its vector."""
        return (self.modules.pooling if self.modules is not None else None) or "mean"

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model that the recipe names, before any weight is loaded."""
        model = self.recipe.model
        if model.name_or_path is not None:
            return load_config(model.name_or_path, trust_remote_code=model.trust_remote_code)
        return self.fresh_config({})

    def fresh_config(self, labels: dict[str, Any]) -> PreTrainedConfig:
        """Of a model that is trained from nothing, with these fields for its head."""
        return fresh_config(self.recipe.model.config | labels, self.processor)

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of the config without memory for its weights."""
        with torch.device("meta"):
            trust = {"trust_remote_code": self.recipe.model.trust_remote_code}  # not given, transformers would ask
            return getattr(transformers, self.auto_class).from_config(config, **trust)

    @property
    def processor_class(self) -> str | None:
        """The Auto class that loads what `save` writes beside the model, if anything."""
        if self.processor is None:
            return None
        return self.task.processor_class

    @property
    def auto_class(self) -> str:
        return self.task.auto_class

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    def data(self, max_length: int | None = None, *, config: PreTrainedConfig | None = None) -> PreparedData:
        """Train and test inputs, cut at `max_length` tokens (default: as the recipe says); prepared once.

        `config`: of the model that reads them. It gets no more tokens than its table of positions has rows.
        """
        max_length = max_length or self.recipe.data.max_length
        limit = None if config is None else token_limit(config, rotary=False)
        if limit is not None and max_length is not None:
            max_length = min(max_length, limit)
        if max_length not in self._prepared:
            prepared = self._prepare(max_length)
            if self._original is not None:
                prepared = self._as_counted(prepared, self._original.data(max_length), limit)
            self._prepared[max_length] = prepared
        return self._prepared[max_length]

    def _as_counted(self, prepared: PreparedData, original: PreparedData, limit: int | None) -> PreparedData:
        """With the test texts of the original, where the score counts tokens."""
        if self._original is None or self.task.metric != "perplexity":
            return prepared
        return replace(prepared, test=respelled(original.test, self._original.processor, self.processor, limit))

    def other(self, name: str, config: PreTrainedConfig | None = None) -> PreparedData:
        """Another data set for the same task, read as the recipe's own; its columns by their usual names."""
        data = self.recipe.data
        limits = [data.max_length, None if config is None else token_limit(config, rotary=False)]
        length = min((each for each in limits if each is not None), default=None)
        rows = load_dataset_any(name, **self.task.reading(None, None), **self._split)
        prepared = prepare(rows, self.recipe.task, self.processor, max_length=length)
        if self._original is None:
            return prepared
        return self._as_counted(prepared, self._original.other(name, config), None)

    def beginnings(self, count: int = 4, words: int = 24) -> list[str]:
        """How some test texts begin."""
        texts = self.rows["test"][need_column(self.rows["test"], "text", self.recipe.data.text_column)][:count]
        return [" ".join(text.split()[:words]) for text in texts]

    def validation(self, *, config: PreTrainedConfig) -> PreparedData:
        """The rows that are held out of the training rows, as `test`, for a model of this config."""
        limit, length = token_limit(config, rotary=False), self.recipe.data.max_length
        length = length if limit is None or length is None else min(length, limit)
        rows = {"train": self.rows["train"], "test": self.rows["validation"]}
        prepared = self._prepare(length, rows)
        if self._original is None:
            return prepared
        return self._as_counted(prepared, self._original.validation(config=self._original.config), limit)

    def _prepare(self, max_length: int | None, rows: Any = None) -> PreparedData:
        data = self.recipe.data
        options = {"image_size": data.image_size} if self.task.is_of_images else {"max_length": max_length}
        names = {f"{role}_column": getattr(data, f"{role}_column") for role in self.task.roles}
        return prepare(rows or self.rows, self.recipe.task, self.processor, **names, **options)

    def texts(self, *roles: str) -> Iterator[str]:
        """The training texts in the columns of these roles; those that are optional only where they are named."""
        data, rows = self.recipe.data, self.rows["train"]
        named = {role: getattr(data, f"{role}_column") for role in roles if role in TEXTS}
        readable = [role for role in named if role in self.task.columns or named[role]]
        columns = [need_column(rows, role, named[role], self.task.usual) for role in readable]
        return (value if isinstance(value, str) else " ".join(value) for column in columns for value in rows[column])

    def read_texts(self, split: str) -> list[tuple[str, ...]]:
        """The text, or the pair of texts, of each row of a split."""
        data, rows = self.recipe.data, self.rows[split]
        roles = ["text", *(["text_pair"] if data.text_pair_column else [])]
        columns = [need_column(rows, role, getattr(data, f"{role}_column")) for role in roles]
        return list(zip(*(rows[column] for column in columns), strict=True))

    def load(self, folder: Path) -> PreTrainedModel:
        try:
            return load_model(self.auto_class, folder, trust_remote_code=self.recipe.model.trust_remote_code)
        except CheckpointError as error:
            if folder.parent != self.folder or not (folder / MANIFEST).is_file():
                raise
            raise CheckpointError(
                f"{error} This was a finished stage, and its files are damaged: delete the folder {folder} to run it "
                "again. The stages after it can stay: they would come out the same."
            ) from error

    def save(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Write a checkpoint and make sure that it holds what was made."""
        model = model.to("cpu")
        on_main(lambda: self._write(model, folder))
        return {"class": type(model).__name__} | ({"processes": count()} if count() > 1 else {})

    def _write(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        if self.processor is not None:
            self.processor_for(model).save_pretrained(folder)
        self.write_modules(model.config, folder)
        if output_digest(self.load(folder)) != output_digest(model):
            raise CheckpointError(f"The checkpoint in {folder} gives another output than the model that was saved.")

    def write_modules(self, config: PreTrainedConfig, folder: Path) -> None:
        """Beside a model of this config and its tokenizer: what makes the folder one of sentence-transformers."""
        if self.modules is not None:
            extended = token_limit(config) != token_limit(self.config)
            write_modules(self.modules, config, self.processor, folder, extended=extended)

    def processor_for(self, model: PreTrainedModel) -> Any:
        """The processor; a tokenizer goes along with a model that was extended to longer inputs."""
        limit = token_limit(model.config)
        if self.task.is_of_images or self.task.reads or limit == token_limit(self.config):
            return self.processor
        tokenizer = copy.deepcopy(self.processor)
        tokenizer.model_max_length = limit
        return tokenizer

    def reading(self, processor: Any) -> "Run":
        """The same run with another tokenizer."""
        other = Run(self.recipe, self.folder)
        other.rows, other.processor, other._original = self.rows, processor, self
        other.modules = self.modules
        return other

    def read_as(self, folder: Path) -> "Run":
        """The run with the tokenizer that lies beside a checkpoint, if a stage made it another one.

        Where that stage came first, what it made is the teacher with other tokens, and teaches those after it.
        """
        _, *made = self.recipe.folders.items()
        if not any(stage.new_tokenizer for _, stage in made):
            return self
        other = self.reading(load_processor(str(folder), images=False))
        if made[0][1].new_tokenizer:
            other.teacher_folder = self.folder / made[0][0]
        return other

    def inputs(self) -> dict[str, Any]:
        """What the recipe only names: a digest of the rows, and the files of a model folder with sizes and times."""
        name = self.recipe.model.name_or_path
        folder = Path(resolve_model(name)) if name else Path()
        files = sorted(folder.iterdir()) if name and folder.is_dir() else []
        return {
            "rows": {name: rows_digest(split) for name, split in self.rows.items()},
            "model": [
                [file.name.encode("utf-8", "backslashreplace").decode(), file.stat().st_size, file.stat().st_mtime_ns]
                for file in files
                if file.is_file()
            ],
        }
