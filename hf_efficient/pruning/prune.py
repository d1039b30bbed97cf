"""Prune a model: scores, allocation, plan, surgery.

    small = prune(model, PruningConfig(ratio=0.5), calibration=batches)

The given model stays as it is: it is usually the teacher of the next stage.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..errors import DataError
from ..families import family_of
from ..models.building import check_model
from .allocation import allocate_global, allocate_uniform, choose_layers
from .config import PruningConfig
from .groups import Group, find_groups, layer_costs, total_cost, unit_cost
from .importance import IMPORTANCES, NEEDS_DATA, Batch, Scores
from .plan import PruningPlan
from .reach import check_reachable
from .surgery import apply_plan
from .weights import check_data, prune_weights

# The length at which MACs are counted when there are no calibration batches to take it from.
DEFAULT_LENGTH = 128


def prune(
    model: PreTrainedModel, config: PruningConfig, calibration: Iterable[Batch] | None = None
) -> PreTrainedModel:
    """A smaller copy of `model`.

    Parameters:
        model: a stock or efficient model of a family in the table.
        config: how much, what, and how to choose.
        calibration: batches of model inputs (dicts of tensors), with or without labels; a few hundred examples. Not
            needed for `importance="magnitude"` and `"random"`; MACs are counted at their average length.

    Returns:
        A stock model where the stock config can say the result, else an efficient one; on the same device. With
        granularity `"weight"` alone a model of the same class and size, with zeros.

    Raises:
        ConfigError: the ratio cannot be reached.
        DataError: calibration is missing or empty.
        UnsupportedModelError: the model cannot be pruned.
    """
    check_model(model)
    batches = _check_calibration(model, config, calibration)
    length = average_length(batches, model)
    check_reachable(model, config, length)
    if "weight" in config.granularity:
        check_data(config, batches)
        rest = config.without_weights()
        return prune_weights(prune(model, rest, batches) if rest else model, config, batches)
    total = total_cost(model, config.metric, length)
    goal = (1 - config.ratio) * total
    if "layer" in config.granularity:
        alone = not config.unit_kinds
        plan = plan_layers(model, config, batches, length, config.layer_share * total, exact=alone)
        model = apply_plan(model, plan)
        if alone:
            return model
    start = total_cost(model, config.metric, length)
    for step in range(1, config.steps + 1):
        target = start * (goal / start) ** (step / config.steps)  # the same factor in every step
        now = total_cost(model, config.metric, length)
        if now > target:
            model = apply_plan(model, plan_units(model, config, batches, length, now - target))
    return model


def plan_units(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], length: int, remove: float
) -> PruningPlan:
    """Which heads and neurons to keep so that `remove` of the metric goes."""
    groups = [group for group in find_groups(model) if group.kind in config.unit_kinds]
    scores = _scores(model, groups, config, batches, length)
    return PruningPlan(units=allocate(model, scores, config, length, remove))


def allocate(
    model: PreTrainedModel, scores: Scores, config: PruningConfig, length: int, remove: float
) -> dict[Group, tuple[int, ...]]:
    """Spend the budget over the scored groups, globally or uniformly."""
    costs = {group: unit_cost(model, group, config.metric, length) for group in scores}
    if config.allocation == "global":
        return allocate_global(scores, costs, remove, config.round_to)
    family = family_of(model.config)
    stack = family.stacks[0]
    divide = stack.width(model.config) // stack.group_size(model.config) if family.heads_divide_hidden else None
    return allocate_uniform(scores, costs, remove, config.round_to, heads_divide=divide)


def plan_layers(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], length: int, remove: float, exact: bool
) -> PruningPlan:
    """Which layers to keep so that about `remove` (with `exact`: at least) of the metric goes."""
    groups = find_groups(model)
    scores = _scores(model, groups, config, batches, length)
    layer_scores: dict[tuple[str, int], float] = {}
    for group, score in scores.items():
        for layer in group.layers:
            key = (group.stack, layer)
            layer_scores[key] = layer_scores.get(key, 0.0) + float(score.sum()) / len(group.layers)
    costs = layer_costs(model, groups, config.metric, length)
    deepest = family_of(model.config).deepest
    return PruningPlan(layers=choose_layers(layer_scores, costs, remove, exact, deepest))


def average_length(batches: Sequence[Batch], model: PreTrainedModel) -> int:
    """Tokens in a sequence of the calibration data, padding not counted; for images the number of patches, for
    sound that of frames."""
    if model.main_input_name == "pixel_values":
        size, patch = model.config.image_size, model.config.patch_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
        return (height // rows) * (width // columns) + 1
    if model.main_input_name == "input_features":
        return model.config.max_source_positions
    tokens = sequences = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        tokens += int(mask.sum()) if mask is not None else ids.numel()
        sequences += ids.shape[0]
    return max(1, tokens // sequences) if sequences else DEFAULT_LENGTH


def _scores(
    model: PreTrainedModel, groups: list[Group], config: PruningConfig, batches: Sequence[Batch], length: int
) -> Scores:
    score = IMPORTANCES[config.importance]
    scores = score(model, groups, batches=batches, metric=config.metric, length=length, seed=config.seed)
    for group, values in scores.items():
        if not torch.isfinite(values).all():
            raise DataError(
                f"The {config.importance} scores of {group.stack} {group.kind} {list(group.layers)} are not finite. "
                "Check the calibration data and the weights for NaN."
            )
    return scores


def _check_calibration(
    model: PreTrainedModel, config: PruningConfig, calibration: Iterable[Batch] | None
) -> list[Batch]:
    batches = list(calibration) if calibration is not None else []
    for batch in batches:
        fields = {key: type(value).__name__ for key, value in batch.items()} if isinstance(batch, Mapping) else {}
        if model.main_input_name not in fields or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            raise DataError(
                f"calibration must give dicts of tensors with {model.main_input_name!r}, got "
                f"{fields or type(batch).__name__}. A DataLoader with the collator of your Trainer does."
            )
    if config.importance in NEEDS_DATA and not batches:
        raise DataError(
            f"importance={config.importance!r} needs calibration batches: prune(model, config, calibration=batches). "
            "Without data use importance='magnitude'."
        )
    return batches
