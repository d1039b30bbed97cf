"""How much each unit matters: one score for each unit of each group, larger is more important.

All scores are sums over what a unit owns, so they can be added over units and compared with costs.

- `fisher`: sum over rows of (dL/dm)^2 for a mask m on the unit, L a random direction of the answer: the second-order
  change of the answer when the unit is removed (Kwon 2022, section 4.2). Needs no labels.
- `taylor`: sum over rows of |dL/dm|, the first-order change of the loss (Michel 2019, Molchanov 2019). Absolute values
  of large units are small for their cost, since what is in them cancels: `by_kind` makes heads and neurons comparable.
- `obs`: how far the answer still moves when the unit is gone and the others have made up for it; see `surgeon`.
- `activation`: sum over the columns that read the unit of ||W_j||^2 ||x_j||^2, what it adds to the output (Wanda, Sun
  2023, by columns).
- `magnitude`, `magnitude_l1`: squared L2 norm or L1 norm of the unit's weights (Han 2015), the weakest criterion.
- `random`: uniform noise times the unit's cost, a control.

`movement` is learned while training: see `removal`. A score of your own: `register_importance`.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...errors import ConfigError, DataError
from ...models.anatomy import Anatomy
from ...models.groups import Group, output_weight, unit_parameters
from ..config import PruningConfig
from ..methods import IMPORTANCES, TRAINED_IMPORTANCES, Importance
from ..price.costs import unit_cost
from .calibration import answer_loss, model_loss
from .handing import Batch, forward
from .statistics import OutputGradients, input_squares, mask_gradients

Scores = dict[Group, torch.Tensor]


def fisher(
    model: PreTrainedModel,
    groups: list[Group],
    *,
    batches: Sequence[Batch],
    seed: int,
    beside: OutputGradients | None = None,
    **unused,
) -> Scores:
    """`[units]` second-order scores for each group, in units of the squared change of the answer."""
    gradients = mask_gradients(model, groups, batches, answer_loss(seed), beside)
    return {group: gradient.square().sum(0) for group, gradient in gradients.items()}


def taylor(model: PreTrainedModel, groups: list[Group], *, batches: Sequence[Batch], length: int, **unused) -> Scores:
    """`[units]` first-order scores for each group; without labels the model's own predictions stand in."""
    gradients = mask_gradients(model, groups, batches, model_loss)
    return by_kind(Anatomy.of(model), {group: gradient.abs().sum(0) for group, gradient in gradients.items()}, length)


def by_kind(anatomy: Anatomy, scores: Scores, length: int) -> Scores:
    """The scores times one factor for each kind of unit, so that the units of a kind (but those that are gone, -inf)
    sum to the MACs they cost."""
    sums: dict[str, float] = {}
    costs: dict[str, float] = {}
    for group, values in scores.items():
        present = values[values.isfinite()]
        sums[group.kind] = sums.get(group.kind, 0) + float(present.sum())
        costs[group.kind] = costs.get(group.kind, 0) + len(present) * unit_cost(anatomy, group, "macs", length)
    return {group: values * (costs[group.kind] / (sums[group.kind] or 1)) for group, values in scores.items()}


def activation(
    model: PreTrainedModel, groups: list[Group], *, batches: Sequence[Batch], run: Callable = forward, **unused
) -> Scores:
    """`[units]`: how much of what the output linear gives comes from each unit; `run(model, batch)` calls it."""
    norms = input_squares(model, groups, batches, run)
    scores = {}
    for group in groups:
        scores[group] = torch.zeros(group.units)
        for member, squared in zip(group.members, norms[group], strict=True):
            weight = output_weight(model, member).detach().float().movedim(member.output.dim, 0)  # [in, out]
            by_column = weight.square().sum(1).cpu() * squared
            scores[group] += by_column.reshape(group.units, -1).sum(1)
    return scores


def magnitude(model: PreTrainedModel, groups: list[Group], *, power: int = 2, **unused) -> Scores:
    """`[units]` sums of |w|^power for each group."""
    scores = {group: torch.zeros(group.units) for group in groups}
    for group in groups:
        for member in group.members:
            for parameter, part in unit_parameters(model, member):
                scores[group] += part.by_unit(parameter.detach().float()).abs().pow(power).sum(1).cpu()
    return scores


def magnitude_l1(model: PreTrainedModel, groups: list[Group], **unused) -> Scores:
    """`[units]` L1 norms for each group."""
    return magnitude(model, groups, power=1)


def random(model: PreTrainedModel, groups: list[Group], *, length: int, seed: int, **unused) -> Scores:
    """`[units]` noise for each group."""
    generator, anatomy = torch.Generator().manual_seed(seed), Anatomy.of(model)
    return {
        group: torch.rand(group.units, generator=generator) * unit_cost(anatomy, group, "macs", length)
        for group in groups
    }


def score_units(
    model: PreTrainedModel,
    groups: list[Group],
    config: PruningConfig,
    batches: Sequence[Batch],
    length: int,
    beside: OutputGradients | None = None,
) -> Scores:
    """`[units]` float32 for each group by `config.importance`; `length` in tokens, for what costs are compared with.

    `beside`, of `"fisher"` alone, takes what it asks for from the same pass.

    Raises:
        DataError: scores that cannot be compared.
    """
    context = {"batches": batches, "length": length, "seed": config.seed}
    if beside is not None:  # which a criterion of your own does not know
        context["beside"] = beside
    scores = IMPORTANCES[config.importance](model, groups, **context)
    for group, values in scores.items():
        check_scores(group, values, config.importance)
    return {group: values.float() for group, values in scores.items()}


def check_scores(group: Group, values: torch.Tensor, importance: str) -> None:
    """DataError unless there is one finite number for each unit: others cannot be compared."""
    if values.shape != (group.units,) or not torch.isfinite(values).all():
        raise DataError(
            f"The {importance} scores of {group.name} must be {group.units} finite numbers, got "
            f"{tuple(values.shape)}, {int(values.isfinite().sum())} of them finite. Check the calibration data "
            "and the weights for NaN."
        )


_BUILT_IN = frozenset(IMPORTANCES) | set(TRAINED_IMPORTANCES)


def register_importance(
    name: str, score: Callable[..., Scores], *, needs_data: bool = True, overwrite: bool = False
) -> None:
    """Make `PruningConfig(importance=name)` mean your own score.

    Parameters:
        name: the name in `PruningConfig` and in recipes.
        score: `score(model, groups, *, batches, length, seed, **unused)` -> `{group: tensor [group.units]}`, larger
            is more important, on the CPU. It must leave the model as it is.
        needs_data: whether it looks at `batches`, the calibration data (a list of dicts of tensors).
        overwrite: replace a score of your own, as when a notebook cell runs again.

    Raises:
        ConfigError: a name that is taken or is no name, or a score that cannot be called.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise ConfigError(f"The name of an importance must be an identifier such as 'my_score', got {name!r}.")
    if name in _BUILT_IN or (name in IMPORTANCES and not overwrite):
        advice = "" if name in _BUILT_IN else ", or pass overwrite=True to replace it"
        raise ConfigError(f"There is an importance {name!r} already. Choose another name{advice}.")
    if not callable(score):
        raise ConfigError(f"The importance {name!r} needs a function score(model, groups, **context), got {score!r}.")
    IMPORTANCES[name] = Importance(score, needs_data)


def unit_effect(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """`[units]` sum of w * dL/dw over the columns that read the unit, which is dL/dm, from the gradients that the
    model holds; 0 without a gradient."""
    total = torch.zeros(group.units)
    for member in group.members:
        weight = output_weight(model, member)
        if weight.grad is not None:
            effect = weight.detach().float() * weight.grad.float()
            total += member.output.by_unit(effect).sum(1).cpu()
    return total
