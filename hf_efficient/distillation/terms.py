"""The table of losses: which outputs of both models each name compares, where, and what it is divided by.

LOSSES["kd"].masks(batch)                              # {"kd": where it counts}
LOSSES["kd"].sums(batch, student, teacher, settings)   # {"kd": the sum there}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .batch import Batch
from .hidden import HiddenPairs
from .layer_map import Pairs
from .losses import ce_loss, hidden_loss, kd_loss
from .recorded import Place, Projected
from .relations import attention_loss, relation_loss


@dataclass(frozen=True)
class Answer:
    """What one model makes of a batch: its outputs, and what its attentions compare, where that was asked for."""

    outputs: Any
    attentions: Mapping[Place, Projected] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSettings:
    """What the losses need beside the batch: the numbers of `DistillationArguments`, and the layers that are compared.

    attention_pairs: for the losses `attention` and `relation` by stack the (student, teacher) layers, from 1.
    """

    temperature: float
    temperature_squared: bool
    divergence: str
    beta: float
    hidden_loss: str
    pairs: HiddenPairs
    attention_loss: str = "kl"
    relation_heads: int | None = None
    attention_pairs: Mapping[str, Mapping[str, Pairs]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """One name of the table.

    parts: the names of what is summed apart, each with its own denominator; most losses have one.
    masks: what counts in a batch, by part.
    sums: the sum of each part, from (batch, student, teacher, settings).
    needs_teacher, needs_hidden_states, needs_attentions: what must be there for it.
    """

    parts: tuple[str, ...]
    masks: Callable[[Batch], dict[str, Tensor]]
    sums: Callable[[Batch, Answer, Any, LossSettings], dict[str, Tensor]]
    needs_teacher: bool = True
    needs_hidden_states: bool = False
    needs_attentions: bool = False


def _ce_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    labels, mask = batch.label_targets()
    return {"ce": ce_loss(student.outputs.logits, labels, mask, problem=batch.problem)[0]}


def _kd_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    total, _ = kd_loss(
        student.outputs.logits,
        teacher.outputs.logits,
        batch.soft_mask(),
        problem=batch.problem,
        temperature=settings.temperature,
        temperature_squared=settings.temperature_squared,
        divergence=settings.divergence,
        beta=settings.beta,
    )
    return {"kd": total}


def _masks_of_stacks(name: str, batch: Batch) -> dict[str, Tensor]:
    return {f"{name}_{stack}": mask for stack, mask in batch.token_masks().items()}


def _hidden_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    """The mean over all mapped layers of both stacks: each pair's sum is divided by the number of pairs."""
    sums = {}
    for stack, mask in batch.token_masks().items():
        states = settings.pairs(stack, student.outputs, teacher.outputs)
        values = [hidden_loss(s, t, mask, kind=settings.hidden_loss)[0] for s, t in states]
        sums[f"hidden_{stack}"] = torch.stack(values).sum() / len(settings.pairs)
    return sums


def _attention_sums(
    name: str, batch: Batch, student: Answer, teacher: Answer, settings: LossSettings
) -> dict[str, Tensor]:
    """The mean over the compared layers of both stacks."""
    compare = (
        partial(attention_loss, kind=settings.attention_loss)
        if name == "attention"
        else partial(relation_loss, heads=settings.relation_heads)
    )
    pairs = settings.attention_pairs[name]
    count = sum(map(len, pairs.values()))
    sums = {}
    for stack, mask in batch.token_masks().items():
        causal = stack == "decoder" or batch.task.kind == "causal_lm"
        values = [
            compare(_layer(student, stack, own), _layer(teacher, stack, other), mask, causal=causal)[0]
            for own, other in pairs[stack]
        ]
        sums[f"{name}_{stack}"] = torch.stack(values).sum() / count
    return sums


def _layer(answer: Answer, stack: str, position: int) -> Projected:
    found = answer.attentions.get((stack, position - 1))
    if found is None:
        raise UnsupportedModelError(
            f"Layer {position} of the {stack} called no attention that could be recorded, so the losses `attention` "
            "and `relation` cannot be had of this model. Leave them out of losses."
        )
    return found


def _of_attentions(name: str) -> Loss:
    return Loss(
        (f"{name}_encoder", f"{name}_decoder"),
        masks=partial(_masks_of_stacks, name),
        sums=partial(_attention_sums, name),
        needs_attentions=True,
    )


LOSSES: dict[str, Loss] = {
    "ce": Loss(("ce",), masks=lambda batch: {"ce": batch.label_targets()[1]}, sums=_ce_sums, needs_teacher=False),
    "kd": Loss(("kd",), masks=lambda batch: {"kd": batch.soft_mask()}, sums=_kd_sums),
    "hidden": Loss(
        ("hidden_encoder", "hidden_decoder"),
        masks=partial(_masks_of_stacks, "hidden"),
        sums=_hidden_sums,
        needs_hidden_states=True,
    ),
    "attention": _of_attentions("attention"),
    "relation": _of_attentions("relation"),
}
