"""How much each whole layer matters.

- `loss`: layers leave one by one, each time the one without which the answer changes least (greedy, as in
  SLEB, Song 2024); the change is the KL divergence from the dense model's answer, so no labels are needed.
- `block_influence`: 1 - cos between the states before and after the layer, mean over real tokens (ShortGPT, Men 2024).
- any importance of units: the sum over the units of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..families import find_stacks
from ..measure.context import evaluating
from .calibration import answer_of, is_distribution, real_entries, token_mask
from .config import PruningConfig
from .groups import find_groups
from .importance import IMPORTANCES, check_scores
from .stream import Batch, forward

LayerScores = dict[tuple[str, int], float]
ROWS = 32  # on which `loss` compares models: L (L + 1) / 2 of them


def block_influence(model: PreTrainedModel, batches: Sequence[Batch]) -> LayerScores:
    """1 - cos for each (stack, layer)."""
    sums: dict[tuple[str, int], list[float]] = {}
    with evaluating(model), ExitStack() as hooks:
        caught: list[tuple[tuple[str, int], torch.Tensor]] = []
        for key, layer in _layers(model):
            hooks.callback(layer.register_forward_hook(_watch(key, caught), with_kwargs=True).remove)
        for batch in batches:
            forward(model, batch)
            for key, cosine in caught:
                mask = token_mask(batch, model, key[0], cosine)
                total = sums.setdefault(key, [0.0, 0.0])
                total[0] += float(((1 - cosine) * mask).sum())
                total[1] += float(mask.sum())
            caught.clear()
    return {key: change / count for key, (change, count) in sums.items()}


def _watch(key: tuple[str, int], caught: list) -> Callable:
    def hook(layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        before, after = _states(args, kwargs), output[0] if isinstance(output, tuple) else output
        caught.append((key, F.cosine_similarity(before.float(), after.float(), dim=-1)))  # [B, T]

    return hook


def loss(model: PreTrainedModel, batches: Sequence[Batch]) -> LayerScores:
    """The order in which layers leave: 0 for the first that does; those that never can come last."""
    batches = list(_first_rows(batches, ROWS))
    left = dict(_layers(model))
    order: LayerScores = {}
    with evaluating(model):
        expected = [answer_of(model, batch) for batch in batches]
        gone: list[nn.Module] = []
        while left:
            changes = {
                key: _change(model, batches, expected, [*gone, layer]) if len(left) > 1 else 0.0
                for key, layer in left.items()
            }
            least = min(changes, key=changes.__getitem__)
            order[least] = float(len(order))
            gone.append(left.pop(least))
    return order


def _change(model: PreTrainedModel, batches: Sequence[Batch], expected: list, without: list[nn.Module]) -> float:
    with _skipping(without):
        return sum(_distance(answer_of(model, b), e, b, model) for b, e in zip(batches, expected, strict=True))


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
    return float(((apart * where).sum(1) / where.sum(1).clamp(min=1)).sum())


@contextmanager
def _skipping(layers: list[nn.Module]) -> Iterator[None]:
    """The layers hand on what they get. (They are computed: T5's first one also makes the bias of the others.)"""

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output):
        states = _states(args, kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _states(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _layers(model: PreTrainedModel) -> Iterator[tuple[tuple[str, int], nn.Module]]:
    for stack, layers in find_stacks(model):
        for index, layer in enumerate(layers):
            yield (stack.name, index), layer


def _first_rows(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            return
        yield {key: value[:rows] for key, value in batch.items()}
        rows -= len(next(iter(batch.values())))


LAYER_IMPORTANCES: dict[str, Callable[[PreTrainedModel, Sequence[Batch]], LayerScores]] = {
    "block_influence": block_influence,
    "loss": loss,
}


def layer_scores(model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], length: int) -> LayerScores:
    """By `config.layer_importance`, larger is more important."""
    if config.layer_importance in LAYER_IMPORTANCES:
        return LAYER_IMPORTANCES[config.layer_importance](model, batches)
    score = IMPORTANCES[config.layer_importance]
    found = score(model, find_groups(model), batches=batches, length=length, seed=config.seed)
    sums = {key: 0.0 for key, _ in _layers(model)}
    for group, values in found.items():
        check_scores(group, values, config.layer_importance)
        for layer in group.layers:
            sums[group.stack, layer] += float(values.sum()) / len(group.layers)
    return sums
