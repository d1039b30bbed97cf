"""How much each whole layer matters.

- `loss`: layers leave one by one, each time the one without which the answer changes least (greedy, as in
  SLEB, Song 2024); the change is the KL divergence from the dense model's answer, so no labels are needed.
- `block_influence`: 1 - cos between the states before and after the layer, mean over real tokens (ShortGPT, Men 2024).
- any importance of units: the sum over the units of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isfinite

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ...models.modes import evaluating
from ...training.progress import told
from ...training.ranks import meet, share
from ..config import PruningConfig
from ..methods import IMPORTANCES, LAYER_IMPORTANCES
from .calibration import answer_of, is_distribution, real_entries, token_mask
from .finite import not_finite
from .handing import Batch, find_places, forward, hand_back, instead, states_in
from .units import check_scores

LayerScores = dict[tuple[str, int], float]
ROWS = 32  # on which `loss` compares models: for k of L layers k (2 L - k + 1) / 2 of them


def block_influence(anatomy: Anatomy, batches: Sequence[Batch]) -> LayerScores:
    """1 - cos for each (stack, layer)."""
    model = anatomy.model
    parts = list[tuple[int, str, int, float, float]]()  # batch, stack, layer, sum, count
    with evaluating(model), ExitStack() as hooks:
        caught: list[tuple[tuple[str, int], torch.Tensor]] = []

        def note(key: tuple[str, int], layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
            before, after = states_in(args, kwargs), output[0] if isinstance(output, tuple) else output
            caught.append((key, F.cosine_similarity(before.float(), after.float(), dim=-1)))  # [B, T]

        for key, layer in _layers(anatomy):
            hooks.callback(layer.register_forward_hook(partial(note, key), with_kwargs=True).remove)
        for place, batch in enumerate(told(share(batches), "score layers")):
            forward(model, batch)
            for key, cosine in caught:
                mask = token_mask(batch, model, key[0], cosine)
                change = float(torch.where(mask > 0, (1 - cosine) * mask, 0.0).sum())
                parts.append((getattr(batch, "number", place), *key, change, float(mask.sum())))
            caught.clear()
    sums: dict[tuple[str, int], list[float]] = {}
    for _, stack, layer, change, count in sorted(
        (each for own in meet(parts) for each in own), key=lambda part: part[0]
    ):
        summed = sums.setdefault((stack, layer), [0.0, 0.0])
        summed[0] += change
        summed[1] += count
    scores = {key: change / max(count, 1.0) for key, (change, count) in sums.items()}
    for key, score in scores.items():
        if not isfinite(score):
            raise not_finite(f"The block influence of {_named(key)}")
    return scores


def loss(anatomy: Anatomy, batches: Sequence[Batch]) -> LayerScores:
    """The place of each layer in `loss_order`: 0 for the first that leaves."""
    return {key: float(place) for place, key in enumerate(loss_order(anatomy, batches))}


def loss_order(anatomy: Anatomy, batches: Sequence[Batch]) -> Iterator[tuple[str, int]]:
    """The order in which layers leave, one by one: L forwards find the first of L, L - 1 more the second, and so on;
    DataError names the layer whose answer, or its change, is not finite."""
    batches, model = list(_first_rows(batches, ROWS)), anatomy.model
    present = dict(_layers(anatomy))
    handed: Handed = {}
    with evaluating(model), _watching(present, handed) as broken:
        expected = [answer_of(model, batch) for batch in batches]
        for number, (batch, answer) in enumerate(zip(batches, expected, strict=True)):
            if not isfinite(_distance(answer, answer, batch, model)):
                first = f"the output of {_named(broken[0])}" if broken else ""
                raise not_finite(f"The answer of the model to calibration batch {number}", first)
    gone: list[nn.Module] = []
    while present:
        changes: LayerScores = {}
        for key in (
            told(share(list(present)), "leave out layers") if len(present) > 1 else ()
        ):  # each process tries some of the layers
            layer = present[key]
            with evaluating(model), _skipping([*gone, layer], handed):
                changes[key] = sum(
                    _distance(answer_of(model, b), e, b, model) for b, e in zip(batches, expected, strict=True)
                )
            if not isfinite(changes[key]):
                raise not_finite(f"The answer of the model without {_named(key)}")
        everybody = meet([[*key, change] for key, change in changes.items()])
        changes = {(stack, layer): change for own in everybody for stack, layer, change in own}
        least = min(present, key=lambda key: changes.get(key, 0.0))
        gone.append(present.pop(least))
        yield least


def _distance(answer: torch.Tensor, expected: torch.Tensor, batch: Batch, model: PreTrainedModel) -> float:
    """KL(expected, answer) where the last dimension is one of classes or tokens, else the squared difference."""
    where = real_entries(model, batch, answer)
    if where.shape == answer.shape:  # classes, or places in a text: of these the real ones
        lowest = torch.finfo(answer.dtype).min
        answer, expected = answer.masked_fill(~where, lowest), expected.masked_fill(~where, lowest)
    if is_distribution(model, answer):
        apart = F.kl_div(answer.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    else:
        apart = (answer - expected).square().sum(-1)
    if apart.ndim == 1:
        return float(apart.sum())
    return float((torch.where(where, apart, 0.0).sum(1) / where.sum(1).clamp(min=1)).sum())


# What a layer gives beside its states: where among its arguments it gets that. None: it makes some of it itself.
Handed = dict[nn.Module, list[int | str] | None]


@contextmanager
def _watching(layers: Mapping[tuple[str, int], nn.Module], handed: Handed) -> Iterator[list[tuple[str, int]]]:
    """Fills `handed`, and yields a list of the layers whose output is not finite, in the order in which they run."""
    broken: list[tuple[str, int]] = []

    def hook(key: tuple[str, int], layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        states, *others = output if isinstance(output, tuple) else (output,)
        places = find_places(others, dict(enumerate(args)) | kwargs) if others else []
        known = isinstance(output, torch.Tensor) or bool(others)
        handed[layer] = places if known and handed.get(layer, places) == places else None
        if not states.isfinite().all():
            broken.append(key)

    with ExitStack() as hooks:
        for key, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(hook, key), with_kwargs=True).remove)
        yield broken


@contextmanager
def _skipping(layers: Sequence[nn.Module], handed: Handed) -> Iterator[None]:
    """The layers hand on what they get, and are not computed; but for those that make something for all others, as
    T5's first ones do with the position bias: their states alone are dropped."""

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output) -> tuple:
        return states_in(args, kwargs), *output[1:]

    alone = [layer for layer in layers if handed.get(layer, []) is not None]
    with ExitStack() as hooks:
        for layer in layers:
            if layer not in alone:
                hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        with instead(alone, lambda index, args, kwargs: hand_back(handed.get(alone[index]) or [], args, kwargs)):
            yield


def _layers(anatomy: Anatomy) -> Iterator[tuple[tuple[str, int], nn.Module]]:
    """Those that may leave."""
    for stack in anatomy.stacks:
        for index, layer in enumerate(stack.layers if stack.name in anatomy.droppable else ()):
            yield (stack.name, index), layer


def _named(key: tuple[str, int]) -> str:
    return f"layer {key[1]} of the {key[0]}"


def _first_rows(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            return
        yield {key: value[:rows] if value.ndim else value for key, value in batch.items()}
        rows -= max(len(value) for value in batch.values() if value.ndim)


def layer_scores(anatomy: Anatomy, config: PruningConfig, batches: Sequence[Batch], length: int) -> LayerScores:
    """By `config.layer_importance`, larger is more important."""
    if config.layer_importance in LAYER_IMPORTANCES:
        return LAYER_IMPORTANCES[config.layer_importance](anatomy, batches)
    importance = IMPORTANCES[config.layer_importance]
    scores = importance(anatomy.model, list(anatomy.groups), batches=batches, length=length, seed=config.seed)
    sums = {key: 0.0 for key, _ in _layers(anatomy)}
    for group, values in scores.items():
        check_scores(group, values, config.layer_importance)
        for layer in group.layers if group.stack in anatomy.droppable else ():
            sums[group.stack, layer] += float(values.sum()) / len(group.layers)
    return sums
