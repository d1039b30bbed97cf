"""The scores of units and layers of a model on the disk: those of `score.units` and `score.layers`, layer by layer.

scores, gradients = unit_scores(dense, groups, config, length)
"""

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ...models.groups import Group
from ...training.progress import told
from ..config import PruningConfig
from ..methods import IMPORTANCES
from ..score.calibration import answer_loss, model_loss, token_mask
from ..score.layers import LayerScores
from ..score.statistics import MaskGradients
from ..score.units import Scores, by_kind, check_scores
from .dense import ANSWER, DenseModel

TASK = "task"  # the backward pass from the loss of the labels
GRADIENTS = {"fisher": ANSWER, "taylor": TASK}
BY_LAYER = ("activation", "magnitude", "magnitude_l1")
KNOWN = (*GRADIENTS, *BY_LAYER, "random")


def look_back(dense: DenseModel, importance: str | None, groups: Sequence[Group], seed: int, fits: bool) -> None:
    """The backward passes that an importance (None: none is wanted) and the fit need, each once."""
    passes = {GRADIENTS.get(str(importance))} | ({ANSWER} if fits else set())
    for name, loss in ((TASK, model_loss), (ANSWER, answer_loss(seed))):
        if name in passes:
            units = groups if GRADIENTS.get(str(importance)) == name else ()
            dense.backward(name, loss, units, blocks=fits and name == ANSWER)


def unit_scores(
    dense: DenseModel, groups: list[Group], importance: str, config: PruningConfig, length: int
) -> tuple[Scores, MaskGradients]:
    """`[units]` for each group, and the gradients behind them where they are wanted once more."""
    model, gradients = dense.stored.model, MaskGradients()
    context = {"batches": dense.batches, "length": length, "seed": config.seed}
    if importance in GRADIENTS:
        gradients = dense.gradients(GRADIENTS[importance], groups)
        power = torch.square if importance == "fisher" else torch.abs
        scores: Scores = {group: power(gradient).sum(0) for group, gradient in gradients.items()}
        scores = by_kind(dense.anatomy, scores, length) if importance == "taylor" else scores
    elif importance in BY_LAYER:
        scores = {}
        for index in told(range(dense.depth), "score layers"):
            own = [group for group in groups if index in group.layers]
            place = f"{importance}.{index}"
            if not dense.shelf.has(place):
                with dense.layer(index):
                    found = IMPORTANCES[importance](model, own, run=_run(dense, index), **context)
                dense.shelf.put(place, {group.name: values for group, values in found.items()})
            kept = dense.shelf.get(place)
            scores |= {group: kept[group.name] for group in own}
    else:
        scores = IMPORTANCES[importance](model, groups, **context)
    for group, values in scores.items():
        check_scores(group, values, importance)
    return {group: scores[group].float() for group in groups}, gradients if config.rearrange else {}


def _run(dense: DenseModel, index: int):
    """Called for one batch after the other, it runs this layer."""
    numbers = itertools.count()

    def run(model, batch) -> None:
        number = next(numbers)
        dense.layers.call(index, dense.states.at(index)[number], dense.calls.get(index, number))

    return run


def layer_scores(dense: DenseModel, config: PruningConfig, length: int) -> LayerScores:
    """By `config.layer_importance`, larger is more important."""
    name, importance = dense.stack.name, config.layer_importance
    if importance == "block_influence":
        return {(name, index): _influence(dense, index) for index in range(dense.depth)}
    sums = {(name, index): 0.0 for index in range(dense.depth)}
    groups = list(dense.anatomy.groups)
    for group, values in unit_scores(dense, groups, importance, config, length)[0].items():
        for layer in group.layers:
            sums[name, layer] += float(values.sum()) / len(group.layers)
    return sums


def _influence(dense: DenseModel, index: int) -> float:
    """1 - cos between the states before and after a layer, mean over real tokens."""
    change = count = 0.0
    for number, batch in enumerate(dense.batches):
        before, after = dense.states.at(index)[number], dense.states.at(index + 1)[number]
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
        mask = token_mask(batch, dense.stored.model, dense.stack.name, cosine)
        change += float(torch.where(mask > 0, (1 - cosine) * mask, 0.0).sum())
        count += float(mask.sum())
    return change / max(count, 1.0)
