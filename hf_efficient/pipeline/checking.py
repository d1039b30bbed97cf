"""Whether a recipe can be carried out: all that can be known of data and model before any long work.

check(Run(recipe, folder))
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ConfigError, UnsupportedModelError
from ..recipes.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..pruning.config import PruningConfig
    from ..recipes.stages import AttentionStage
    from .run import Run


def check(run: "Run") -> None:
    """Everything that can be wrong with data and model, before any long work.

    Raises:
        ConfigError, DataError, UnsupportedModelError, CheckpointError: as the part that is wrong says.
    """
    from ..data.preparation import check_labels
    from ..measurement.energy import check_energy
    from ..models.families import family_of
    from ..pruning.cut.tokenizer import check_tokenizer
    from ..recipes.stages import AttentionStage, ExportStage, PruneStage, QuantizeStage, VocabularyStage
    from ..runtimes.export import check_runtime
    from ..runtimes.quantization import check_pruned_groups, check_torchao
    from .fresh import check_fresh

    if run.recipe.measure.energy:
        check_energy(run.recipe.measure.country)
    prepared, config = run.data(), run.config
    if run.recipe.model.config is not None:
        check_fresh(partial(run.skeleton, config))
    family_of(config)
    if config.is_encoder_decoder and not run.task.trains:
        raise UnsupportedModelError(
            f"task {run.recipe.task!r} needs a model with one stack; {config.model_type} has an encoder and a "
            "decoder. Distil its encoder with DistillationTrainer (T5EncoderModel)."
        )
    _check_lengths(run.recipe, config)
    if run.recipe.teacher is None and run.recipe.model.config is None:
        check_labels(config, prepared)
    prunings: list[PruningConfig] = []
    for number, stage in enumerate(run.recipe.stages):
        if isinstance(stage.settings, AttentionStage):
            try:
                config = check_attention(run, config, stage.settings)
            except (ConfigError, UnsupportedModelError) as error:
                raise type(error)(f"stages[{number}].attention: {error}") from error
        elif isinstance(stage.settings, VocabularyStage):
            check_tokenizer(run.processor)
        elif isinstance(stage.settings, QuantizeStage):
            check_torchao()
            if stage.settings.method == "int4":
                check_pruned_groups(run.skeleton(config), prunings, stage.settings.group_size)
        elif isinstance(stage.settings, ExportStage):
            check_runtime(stage.settings.format)
        else:
            asked = stage.settings if isinstance(stage.settings, PruneStage) else stage.settings.prune
            if asked is not None and not prunings:  # a second one starts from what is not known yet
                _check_pruning(run, config, asked.config)
            prunings += [asked.config] if asked is not None else []


def _check_pruning(run: "Run", config: "PreTrainedConfig", pruning: "PruningConfig") -> None:
    from ..models.anatomy import Anatomy
    from ..models.families import token_limit
    from ..pruning.choose.reach import check_reachable
    from ..pruning.price.costs import make_costs
    from ..pruning.score.calibration import DEFAULT_LENGTH

    length = run.recipe.data.max_length or DEFAULT_LENGTH
    length = pruning.sequence_length or min(length, token_limit(config, rotary=False) or length)
    anatomy = Anatomy.of(run.skeleton(config))
    # What can be reached in measured time is not known before it is measured: MACs stand in for it.
    metric = "macs" if pruning.metric == "latency" else pruning.metric
    check_reachable(anatomy, pruning, make_costs(anatomy, metric, length))


def check_attention(run: "Run", config: "PreTrainedConfig", stage: "AttentionStage") -> "PreTrainedConfig":
    """The config after the stage."""
    from ..conversion.convert import efficient_config
    from ..conversion.positions import longer_config
    from ..distillation.transfer import check_learned, find_attentions
    from ..models.classes import block_of, with_block

    longer = stage.longer
    if longer.positions is not None:
        changes = longer_config(config, longer.positions, longer.position_method, longer.rope)
        config = with_block(config, block_of(config), **changes)
    config = efficient_config(config, stage.config, stage.layers)
    if stage.transfer is not None:
        check_learned(find_attentions(run.skeleton(config)))
    return config


def _check_lengths(recipe: Recipe, config: "PreTrainedConfig") -> None:
    """No text may be longer than the model has positions, when it reads it.

    `data.max_length` is that of the final model: the teacher, and stages before the model was extended, read the
    beginning.
    """
    from ..models.families import token_limit
    from ..recipes.settings import DistillSettings
    from ..recipes.stages import AttentionStage
    from .fit import teacher_cut

    limit = token_limit(config, rotary=False)
    if limit is None:
        return
    _check_length("teacher.max_length", recipe.teacher.max_length if recipe.teacher else None, limit)
    for number, stage in enumerate(recipe.stages):
        path, settings = f"stages[{number}].{stage.name}", stage.settings
        if isinstance(settings, AttentionStage):
            limit = max(limit, settings.longer.positions or 0)
            if settings.transfer is not None:
                _check_length(f"{path}.transfer.max_length", settings.transfer.max_length, limit)
        elif isinstance(settings, DistillSettings):
            _check_length(f"{path}.max_length", settings.max_length, limit)
            _check_cut(path, recipe.task, settings.losses, teacher_cut(recipe, settings, config))
    _check_length("data.max_length", recipe.data.max_length, limit)
    _check_length("measure.sequence_length", recipe.measure.sequence_length, limit)
    _check_length("measure.lengths", max(recipe.measure.lengths or [0]), limit)


def _check_length(key: str, length: int | None, limit: int) -> None:
    if length is not None and length > limit:
        raise ConfigError(
            f"{key} is {length}, but the model has {limit} positions there. Lower it, or extend the model: an "
            "attention stage with positions."
        )


def _check_cut(path: str, task: str, losses: Mapping[str, float], cut: int | None) -> None:
    """A teacher that reads only the beginning can answer for a whole text, and for nothing else."""
    from ..data.tasks import TASKS

    by_token = any(losses.get(name) for name in ("hidden", "attention", "relation"))
    if cut is None or (task == "text-classification" and not by_token):
        return
    raise ConfigError(
        f"{path}: the teacher takes {cut} tokens and the student gets more, so it can answer for a whole text (task "
        f"text-classification, loss kd), but nothing else. Set {path}.max_length to {cut}"
        + (", or losses to {ce: 1.0}." if TASKS[task].trains else ".")
    )
