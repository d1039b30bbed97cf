"""What the losses of the table add up: the sum of each over its positions, for one batch and both answers.

    sums = sums_of(losses, batch, student, teacher, settings)   # {"kd": {"kd": []}, "hidden": {"hidden_encoder": []}}

Nothing is divided here but by the number of compared pairs: the denominators are the counts of a whole optimizer step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..models.pooling import pool
from ..training.batch import Batch, FramesHead
from .answers import Answer, comparable
from .layer_map import Pairs
from .losses.chunks import sum_together
from .losses.losses import ce_loss, ce_rows, hidden_loss, kd_loss, kd_rows
from .losses.projections import project
from .losses.relations import Projected, attention_loss, relation_loss
from .options import DistillationOptions
from .terms import Loss


@dataclass(frozen=True)
class LossSettings:
    """What the losses need beside the batch: the options of the run, and the layers that are compared.

    temperature: at this step.
    pairs: by loss and stack the (student, teacher) layers that it compares; 0 is the embeddings.
    projections: by `place_name`, and `embedding`, where the widths differ.
    vocabulary: how many entries both vocabularies share, where one of them is padded.
    shares: by part, where that is known, the factor with which its mean will reach the loss, and what the sum is
        divided by.
    """

    options: DistillationOptions
    temperature: float
    pairs: Mapping[str, Mapping[str, Pairs]]
    projections: nn.ModuleDict
    vocabulary: int | None = None
    shares: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)

    def of_kd(self) -> dict[str, Any]:
        options = self.options
        return {
            "temperature": self.temperature,
            "temperature_squared": options.temperature_squared,
            "divergence": options.divergence,
            "beta": options.jsd_beta,
        }


def place_name(loss: str, stack: str, pair: tuple[int, int]) -> str:
    """The name of the projection of one compared pair of layers."""
    prefix = "" if loss == "hidden" else f"{loss}_"  # checkpoints have these names
    return f"{prefix}{stack}_{pair[0]}_{pair[1]}"


def sums_of(
    losses: Mapping[str, Loss], batch: Batch, student: Answer, teacher: Answer | None, settings: LossSettings
) -> dict[str, dict[str, Tensor]]:
    """The sums of all parts, by loss."""
    together: dict[str, dict[str, Tensor]] = {}
    # `ce` and `kd` read the same logits [rows, V]. Where it is known how much of each will reach the loss, both
    # gradients are written into one tensor of that size while its rows are in the cache: half the memory of a step.
    is_plain = batch.problem == SINGLE_LABEL and settings.vocabulary is None and batch.head.kind != "ctc"
    if {"ce", "kd"} <= settings.shares.keys() and is_plain:
        assert teacher is not None and teacher.logits is not None and isinstance(student.logits, Tensor)
        rows = [ce_rows(*batch.label_targets()), kd_rows(teacher.logits, batch.soft_mask(), **settings.of_kd())]
        wide = torch.promote_types(student.logits.dtype, torch.float32)
        shares = [factor / count.to(wide) for factor, count in (settings.shares["ce"], settings.shares["kd"])]
        totals = sum_together(rows, student.logits, shares)
        together = {"ce": {"ce": totals[0]}, "kd": {"kd": totals[1]}}
    return {
        name: together[name] if name in together else loss.sums(batch, student, teacher, settings)
        for name, loss in losses.items()
    }


def ce(batch: Batch, student: Answer, teacher: Answer | None, settings: LossSettings) -> Tensor:
    labels, mask = batch.label_targets()
    assert isinstance(student.logits, Tensor)  # `check_losses`
    if isinstance(batch.head, FramesHead):  # over all ways to spell the labels in the frames (CTC)
        losses = batch.head.frames.losses(student.logits, labels, batch.soft_mask().sum(1))
        return torch.where(batch.example_mask(), losses, 0).sum()
    return ce_loss(student.logits, labels, mask, problem=batch.problem)[0]


def kd(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> Tensor:
    assert isinstance(student.logits, Tensor) and teacher.logits is not None
    logits = comparable(student.logits, teacher.logits, settings.vocabulary)
    problem = batch.problem
    if batch.head.num_labels == 1 and problem in (REGRESSION, MULTI_LABEL):
        problem = REGRESSION if settings.options.score_loss == "mse" else MULTI_LABEL
    return kd_loss(*logits, batch.soft_mask(), problem=problem, **settings.of_kd())[0]


def embedding(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> Tensor:
    mask = batch.token_masks()["encoder"]
    vectors = []
    for side in (student, teacher):
        if side.pooled is not None:  # a cache keeps the vectors alone
            vectors.append(side.pooled[:, None])
        else:
            assert side.last is not None
            vectors.append(pool(side.last, mask, settings.options.pooling)[:, None])
    own, other = project(settings.projections, "embedding", vectors[0]), vectors[1]  # [B, 1, width] both
    ends = [own.shape[-1], *(settings.options.matryoshka_dims or ())]
    sums = [
        hidden_loss(own[..., :end], other[..., :end], batch.example_mask(), kind=settings.options.embedding_loss)[0]
        for end in ends
    ]
    return torch.stack(sums).mean()


@dataclass(frozen=True)
class Compared:
    """One pair of layers, in one batch: `mask` says where the tokens of the stack are real, [B, T] or [B]."""

    batch: Batch
    stack: str
    pair: tuple[int, int]
    mask: Tensor
    student: Answer
    teacher: Answer
    settings: LossSettings

    @property
    def is_causal(self) -> bool:
        return self.stack == "decoder" or self.batch.head.is_causal

    def states(self) -> tuple[Tensor, Tensor]:
        """The hidden states of both, [B, T, width]."""
        return self.student.states[self.stack, self.pair[0]], self.teacher.states[self.stack, self.pair[1]]

    def attentions(self) -> tuple[Projected, Projected]:
        sides = []
        for side, layer in zip((self.student, self.teacher), self.pair, strict=True):
            attention = side.attentions.get((self.stack, layer - 1))
            if attention is None:
                raise UnsupportedModelError(
                    f"Layer {layer} of the {self.stack} called no attention that could be recorded, so the losses "
                    "`attention`, `relation` and `attention_output` cannot be computed for this model. Leave them "
                    "out of losses."
                )
            sides.append(attention)
        return sides[0], sides[1]

    def project(self, loss: str, state: Tensor) -> Tensor:
        """The student's state in the teacher's width."""
        return project(self.settings.projections, place_name(loss, self.stack, self.pair), state)


def sums_of_layers(
    name: str,
    compare: Callable[[Compared], Tensor],
    batch: Batch,
    student: Answer,
    teacher: Answer,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """The mean over all compared layers of both stacks: each pair's sum is divided by the number of pairs."""
    pairs = settings.pairs[name]
    count = sum(map(len, pairs.values()))
    sums = {}
    for stack, mask in batch.token_masks().items():
        values = [compare(Compared(batch, stack, pair, mask, student, teacher, settings)) for pair in pairs[stack]]
        sums[f"{name}_{stack}"] = torch.stack(values).sum() / count
    return sums


def hidden(at: Compared) -> Tensor:
    own, other = at.states()
    return hidden_loss(at.project("hidden", own), other, at.mask, kind=at.settings.options.hidden_loss)[0]


def attention(at: Compared) -> Tensor:
    return attention_loss(*at.attentions(), at.mask, causal=at.is_causal, kind=at.settings.options.attention_loss)[0]


def relation(at: Compared) -> Tensor:
    return relation_loss(*at.attentions(), at.mask, causal=at.is_causal, heads=at.settings.options.relation_heads)[0]


def attention_output(at: Compared) -> Tensor:
    own, other = at.attentions()
    return hidden_loss(at.project("attention_output", own.output), other.output, at.mask)[0]
