"""What a stage is: a dataclass of settings that can be checked, carried out and told of. For whoever adds one:

    @dataclass(frozen=True)
    class NoiseStage(Stage):
        scale: float = number(0.01, 0, 1)                      # `stages.settings` has the rules for fields

        def run(self, run, source, target):
            model = run.load(source)                           # the checkpoint that the stage before it wrote
            ...
            return {"scale": self.scale} | run.save(model, target)

    STAGES["noise"] = NoiseStage                               # - noise: {scale: 0.1}

Everything else has a default. Reading a recipe must stay light, so torch is imported within `check`, `plan` and `run`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import ConfigError
from .settings import Settings, TrainingSettings, read

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..data.preparation import PreparedData
    from ..pruning.config import PruningConfig
    from ..pruning.plan import PruningPlan
    from ..reporting.schema import Report, StageRecord


class Run(Protocol):
    """What the stages of one run share, as they are given it (`pipeline.run.Run`)."""

    @property
    def recipe(self) -> Any:
        """The whole recipe: `recipe.seed`, `recipe.task`, `recipe.data.max_length`, ..."""

    @property
    def task(self) -> Any:
        """The entry of the table of tasks."""

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads the model with the head of the task."""

    @property
    def config(self) -> "PreTrainedConfig":
        """Of the model that the recipe names, before any stage."""

    @property
    def processor(self) -> Any:
        """Its tokenizer or image processor; None for images that need none."""

    @property
    def teacher_folder(self) -> Path:
        """The checkpoint that teaches students, which reads the ids of `data`."""

    @property
    def modules(self) -> Any:
        """What sentence-transformers has beside the model (`data.sentence_modules`); None for a model with a head."""

    @property
    def pooling(self) -> str:
        """How the tokens of a text become its vector."""

    def data(self, max_length: int | None = None, *, config: Any = None) -> "PreparedData":
        """Train and test inputs, cut at `max_length` tokens and at what a model of `config` takes."""

    def texts(self, *roles: str) -> Iterator[str]:
        """The training texts in the columns of these roles."""

    def read_texts(self, split: str) -> "list[tuple[str, ...]]":
        """The text, or the pair of texts, of each row of a split."""

    def fresh_config(self, labels: dict[str, Any]) -> "PreTrainedConfig":
        """Of a model that is trained from nothing."""

    def skeleton(self, config: Any) -> "PreTrainedModel":
        """A model of a config, without memory for its weights."""

    def load(self, folder: Path) -> "PreTrainedModel":
        """The model of a checkpoint folder."""

    def save(self, model: "PreTrainedModel", folder: Path) -> dict[str, Any]:
        """Write a checkpoint with its processor, and prove that it holds what was made; facts for the report."""

    def write_modules(self, config: "PreTrainedConfig", folder: Path) -> None:
        """What `save` writes beside model and processor, for a model that is not saved by it."""

    def processor_for(self, model: "PreTrainedModel") -> Any:
        """The processor for a model that may take longer inputs than the original."""

    def reading(self, processor: Any) -> "Run":
        """The same run with another tokenizer."""


@dataclass(frozen=True)
class Stage(Settings):
    """One step of a recipe. Checks are called from cheap to dear, all of them before any long work."""

    followers: ClassVar[tuple[str, ...] | None] = None  # the stages that may come after it; None: all
    reason: ClassVar[str] = ""  # why no other may
    may_begin: ClassVar[bool] = False  # as the first stage it may be followed by all
    new_tokenizer: ClassVar[bool] = False  # what it makes reads other ids than what it was given

    @property
    def beside(self) -> str | None:
        """The folder in its target that goes along with the result; None: what it makes is the model from there on."""
        return None

    @property
    def training(self) -> TrainingSettings | None:
        """How it trains, if it does."""
        return None

    @property
    def is_shared(self) -> bool:
        """Whether several processes run it together, each of which calls `run`; else one does it while they wait."""
        return self.training is not None

    @property
    def pruning(self) -> "PruningConfig | None":
        """What it prunes, if it does."""
        return None

    @property
    def pooling(self) -> str | None:
        """How the tokens of a text become its vector in the model that it makes, where it says so."""
        return None

    @property
    def teaches_directions(self) -> bool:
        """Whether it teaches where the vectors of texts point, and not how long they are."""
        return False

    @classmethod
    def read(cls, section: Any, path: str, task: str | None = None) -> "Stage":
        """The stage that YAML means, in a recipe for `task`; `to_dict` gives what is read back."""
        return read(cls, section, path)

    def check_task(self, path: str, task: str) -> None:
        """Raises ConfigError if it cannot be done for this task; `path` starts the message, as `stages[1].prune`."""

    def check_lengths(self, path: str, run: Run, limit: int) -> int:
        """Raises ConfigError if it needs more than `limit` tokens; what the model takes after it."""
        return limit

    def check(self, path: str, run: Run, config: Any, before: Sequence["Stage"]) -> Any:
        """Raises if it cannot be done with a model of this config after the stages `before`; the config after it."""
        return config

    def plan(self, run: Run, config: Any) -> tuple[Any, "PruningPlan | None"]:
        """The config after it, as far as sizes are known without weights, and the plan of a stage that prunes."""
        return config, None

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        """Read the checkpoint in `source`, write one into `target`, and return facts for the report, plain values."""
        raise NotImplementedError(f"{type(self).__name__}.run")

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        """What a reader of the report must know of it: warnings."""
        facts = record.facts
        if "batch_size_used" not in facts:
            return ()
        return (
            f"Memory did not hold the batches of stage {record.name}: it was trained with "
            f"{facts['gradient_accumulation_steps']} accumulated batches of {facts['batch_size_used']} for each step, "
            "which gives the same gradient.",
        )

    def check_report(self, report: "Report", after: Sequence["Stage"] = ()) -> None:
        """Raises UnsupportedModelError if what it made is not what it was asked for; the result stays.

        `after`: the stages that come after it.
        """


def check_length(key: str, length: int | None, limit: int) -> None:
    """Raises ConfigError if a text is longer than the model has positions, when it reads it."""
    if length is not None and length > limit:
        raise ConfigError(
            f"{key} is {length}, but the model has {limit} positions there. Lower it, or extend the model: an "
            "attention stage with positions."
        )
