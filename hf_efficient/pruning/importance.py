"""How much each unit matters: one score for each unit of each group, larger is more important.

All scores are sums over what a unit owns, so they can be added over units and compared with costs.

- `magnitude`: squared L2 norm of the unit's weights (Han 2015; the weakest criterion, kept as a reference).
- `taylor`: sum over batches of |sum of w * dL/dw| over the columns that read the unit: the first-order change of the
  loss when the unit is removed (Michel 2019, Molchanov 2019; pruning masks as in Kwon 2022).
- `random`: uniform noise times the unit's cost, a control.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import DataError
from .groups import Group, Member, output_weight, unit_cost, unit_parameters

Scores = dict[Group, torch.Tensor]
Batch = Mapping[str, torch.Tensor]


def magnitude(model: PreTrainedModel, groups: list[Group], **unused) -> Scores:
    """`[units]` squared norms for each group."""
    return {group: sum(_squares(model, group, member) for member in group.members) for group in groups}


def _squares(model: PreTrainedModel, group: Group, member: Member) -> torch.Tensor:
    total = torch.zeros(group.units)
    for parameter, part in unit_parameters(model, member):
        total += part.by_unit(parameter.detach().float()).square().sum(1).cpu()
    return total


def random(model: PreTrainedModel, groups: list[Group], *, metric: str, length: int, seed: int, **unused) -> Scores:
    """`[units]` noise for each group."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group: torch.rand(group.units, generator=generator) * unit_cost(model, group, metric, length)
        for group in groups
    }


def taylor(model: PreTrainedModel, groups: list[Group], *, batches: Iterable[Batch], **unused) -> Scores:
    """`[units]` first-order scores for each group; without labels the model's own predictions stand in."""
    scores = {group: torch.zeros(group.units) for group in groups}
    weights = [output_weight(model, member) for group in groups for member in group.members]
    frozen = [weight for weight in weights if not weight.requires_grad]
    training = model.training
    model.eval()
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for batch in tqdm(batches, desc="calibrate", disable=None, leave=False):
            with torch.enable_grad():
                found = torch.autograd.grad(calibration_loss(model, batch), weights, allow_unused=True)
            gradients = dict(zip(weights, found, strict=True))
            for group in groups:
                scores[group] += gradient_scores(model, group, gradients)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        model.train(training)
    return scores


def gradient_scores(
    model: PreTrainedModel, group: Group, gradients: Mapping[nn.Parameter, torch.Tensor | None]
) -> torch.Tensor:
    """`[units]` |sum of w * dL/dw|; a weight that got no gradient has no effect."""
    total = torch.zeros(group.units)
    for member in group.members:
        weight = output_weight(model, member)
        gradient = gradients.get(weight)
        if gradient is not None:
            effect = (weight.detach() * gradient).float()
            total += member.output.by_unit(effect).sum(1).cpu()
    return total.abs()


def calibration_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's own loss if the batch has labels, else the cross-entropy of its own hard predictions.

    Two towers (CLIP) have to tell the pairs of the batch from all other combinations, as when they were trained.

    Raises:
        DataError: the model returns no logits, so there is no loss to measure importance with.
    """
    outputs = model(**{key: value.to(model.device) for key, value in batch.items()}, return_dict=True)
    if outputs.get("loss") is not None:
        return outputs.loss
    if "logits_per_text" in outputs:  # CLIP: every text belongs to the image of its row
        pairs = outputs.logits_per_text.float()
        own = torch.arange(len(pairs), device=pairs.device)
        return (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
    if "logits" not in outputs:
        raise DataError(
            f"importance='taylor' needs a loss, but {type(model).__name__} returned neither loss nor logits. "
            "Use a model with a task head, batches with labels, or importance='magnitude'."
        )
    logits = outputs.logits.float()  # [B, C] or [B, T, C]
    mask = batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    if mask is not None and logits.ndim == 3:
        logits = logits[mask.to(logits.device).bool()]
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[-1] == 1:
        return logits.square().mean()
    return F.cross_entropy(logits, logits.argmax(-1))


IMPORTANCES: dict[str, Callable[..., Scores]] = {"magnitude": magnitude, "taylor": taylor, "random": random}
NEEDS_DATA = ("taylor",)
