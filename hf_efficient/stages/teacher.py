"""The zeroth stage: the model that the recipe names, fine-tuned if the recipe says how.

teacher: {epochs: 3, batch_size: 32}
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tasks import TASKS
from ..errors import ConfigError
from .base import Run, Stage, check_length
from .settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.preparation import PreparedData


@dataclass(frozen=True)
class TeacherStage(Stage):
    """`training` None: the model is taken as it is."""

    training: TrainingSettings | None = None  # a field, where others have a property

    def to_dict(self) -> dict[str, Any]:
        return {} if self.training is None else self.training.to_dict()

    def check_task(self, path: str, task: str) -> None:
        if self.training is not None and not TASKS[task].trains:
            raise ConfigError(
                f"{path}: task {task!r} has no labels to fine-tune a teacher on; the model is taken as it is. "
                "Leave teacher out."
            )

    def check_lengths(self, path: str, run: Run, limit: int) -> int:
        check_length(f"{path}.max_length", self.training.max_length if self.training else None, limit)
        return limit

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        from ..data.preparation import check_labels

        if self.training is None and run.recipe.model.config is None:
            check_labels(config, run.data())
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from ..data.preparation import check_labels
        from .fit import fit, make_tuner, trained

        settings, smaller = self.training, dict[str, Any]()
        prepared = run.data(settings.max_length if settings else None, config=run.config)
        if settings is None:
            model = original(run, prepared)
            check_labels(model.config, prepared)
        else:

            def fine_tuned(batch_size: int) -> "PreTrainedModel":
                trainer = make_tuner(run, original(run, prepared), settings, prepared, target, batch_size)
                fit(trainer)
                return trainer.model

            model, smaller = trained(run, settings, fine_tuned)
        facts = {"train": len(prepared.train), "parameters": model.num_parameters()}
        return facts | smaller | run.save(model, target)


def original(run: Run, prepared: "PreparedData") -> "PreTrainedModel":
    """The model that the recipe names, with a head for the labels of the data."""
    import transformers

    from ..models.classes import block_of
    from ..models.heads import REGRESSION, state_problem
    from ..models.loading import load_model

    source, labels = run.recipe.model, {}
    if prepared.num_labels is not None:
        labels = {"id2label": dict(enumerate(prepared.label_names)), "num_labels": prepared.num_labels}
        labels["label2id"] = {name: index for index, name in enumerate(prepared.label_names)}
    if run.task.kind == "scores":  # a head of before was perhaps one of classes
        labels["problem_type"] = prepared.problem or REGRESSION
    if source.config is not None:
        return getattr(transformers, run.auto_class).from_config(run.fresh_config(labels))
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if run.recipe.teacher is not None:  # a model that is taken as it is keeps its own head
        options |= labels | {"new_head": True}
    model = load_model(run.auto_class, source.name_or_path, **options)
    state_problem(model, prepared.problem)
    if model.config.pad_token_id is None and not run.task.is_of_images:
        model.config.pad_token_id = getattr(run.processor, "tokenizer", run.processor).pad_token_id
    if block_of(model.config).kept_layers:  # it is the original now, and has all of its layers
        model.config.efficient = replace(block_of(model.config), kept_layers={}).to_dict()
    return model
