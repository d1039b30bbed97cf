"""The table of losses: which outputs of both models each name compares, where, and what it is divided by.

LOSSES["kd"].masks(batch)                              # {"kd": where it counts}
LOSSES["kd"].sums(batch, student, teacher, settings)   # {"kd": the sum there}
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..models.heads import SINGLE_LABEL
from ..models.pooling import pool
from ..training.batch import Batch
from .answers import Answer
from .layer_map import Pairs
from .losses.chunks import sum_together
from .losses.draws import DrawnTokens
from .losses.losses import ce_loss, ce_rows, hidden_loss, kd_loss, kd_rows
from .losses.projections import project
from .losses.relations import Projected, attention_loss, relation_loss
from .losses.top_k import TopLogits


@dataclass(frozen=True)
class LossSettings:
    """What the losses need beside the batch: the numbers of `DistillationArguments`, and the layers that are compared.

    pairs: by loss and stack the (student, teacher) layers that it compares; 0 is the embeddings.
    projections: by `place_name`, and `embedding`, where the widths differ.
    vocabulary: how many entries both vocabularies share, where one of them is padded.
    shares: by part, where that is known, the factor with which its mean will reach the loss, and what the sum is
        divided by.
    """

    temperature: float
    temperature_squared: bool = True
    divergence: str = "forward"
    beta: float = 0.5
    hidden_loss: str = "mse"
    attention_loss: str = "kl"
    relation_heads: int | None = None
    embedding_loss: str = "cosine"
    pooling: str = "mean"
    pairs: Mapping[str, Mapping[str, Pairs]] = field(default_factory=dict)
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    vocabulary: int | None = None
    shares: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)

    def of_kd(self) -> dict[str, Any]:
        names = ("temperature", "temperature_squared", "divergence", "beta")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Loss:
    """One name of the table.

    parts: the names of what is summed apart, each with its own denominator; most losses have one.
    masks: what counts in a batch, by part.
    sums: the sum of each part, from (batch, student, teacher, settings).
    needs_teacher, needs_head, needs_attentions, maps_layers: what must be there for it.
    """

    parts: tuple[str, ...]
    masks: Callable[[Batch], dict[str, Tensor]]
    sums: Callable[[Batch, Answer, Any, LossSettings], dict[str, Tensor]]
    needs_teacher: bool = True
    needs_head: bool = False
    needs_attentions: bool = False
    maps_layers: bool = False


def place_name(loss: str, stack: str, pair: tuple[int, int]) -> str:
    """The name of the projection of one compared pair of layers."""
    prefix = "" if loss == "hidden" else f"{loss}_"
    return f"{prefix}{stack}_{pair[0]}_{pair[1]}"


def check_losses(losses: Collection[str], *, headless: bool) -> None:
    """Whether a model with a head, or without one, has what the losses compare.

    Raises:
        ConfigError: a loss of logits without a head, or of embeddings with one.
    """
    wrong = [name for name in losses if (LOSSES[name].needs_head if headless else name == "embedding")]
    if not wrong:
        return
    reason = (
        "these models have no head, so there are no logits; use `embedding`, `hidden`, `attention`, `relation` or "
        "`attention_output`"
        if headless
        else "it is for models without a head: load both with AutoModel"
    )
    raise ConfigError(f"losses has {' and '.join(f'`{name}`' for name in wrong)}, but {reason}.")


def comparable(
    student: Tensor, teacher: Tensor | TopLogits | DrawnTokens, vocabulary: int | None
) -> tuple[Tensor, Tensor | TopLogits | DrawnTokens]:
    """The logits of the entries that both vocabularies have."""
    if vocabulary is None or not isinstance(teacher, Tensor):
        return student, teacher
    return student[..., :vocabulary], teacher[..., :vocabulary]


def _ce_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    labels, mask = batch.label_targets()
    assert isinstance(student.logits, Tensor)  # `check_losses`
    return {"ce": ce_loss(student.logits, labels, mask, problem=batch.problem)[0]}


def _kd_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    assert isinstance(student.logits, Tensor) and teacher.logits is not None
    total, _ = kd_loss(
        *comparable(student.logits, teacher.logits, settings.vocabulary),
        batch.soft_mask(),
        problem=batch.problem,
        **settings.of_kd(),
    )
    return {"kd": total}


def sums_of(
    losses: Mapping[str, Loss], batch: Batch, student: Answer, teacher: Answer | None, settings: LossSettings
) -> dict[str, dict[str, Tensor]]:
    """The sums of all parts, by loss. `ce` and `kd` write one gradient of the logits, where their shares are known."""
    together: dict[str, dict[str, Tensor]] = {}
    if {"ce", "kd"} <= settings.shares.keys() and batch.problem == SINGLE_LABEL and settings.vocabulary is None:
        assert teacher is not None and teacher.logits is not None and isinstance(student.logits, Tensor)
        sums = [ce_rows(*batch.label_targets()), kd_rows(teacher.logits, batch.soft_mask(), **settings.of_kd())]
        wide = torch.promote_types(student.logits.dtype, torch.float32)
        shares = [factor / count.to(wide) for factor, count in (settings.shares["ce"], settings.shares["kd"])]
        found = sum_together(sums, student.logits, shares)
        together = {"ce": {"ce": found[0]}, "kd": {"kd": found[1]}}
    return {
        name: together[name] if name in together else loss.sums(batch, student, teacher, settings)
        for name, loss in losses.items()
    }


def _embedding_sums(batch: Batch, student: Answer, teacher: Answer, settings: LossSettings) -> dict[str, Tensor]:
    mask = batch.token_masks()["encoder"]
    own, other = (_embedding(side, mask, settings.pooling)[:, None] for side in (student, teacher))
    own = project(settings.projections, "embedding", own)
    return {"embedding": hidden_loss(own, other, batch.example_mask(), kind=settings.embedding_loss)[0]}


def _embedding(answer: Answer, mask: Tensor, pooling: str) -> Tensor:
    if answer.pooled is not None:
        return answer.pooled
    assert answer.last is not None
    return pool(answer.last, mask, pooling)


def _masks_of_stacks(name: str, batch: Batch) -> dict[str, Tensor]:
    return {f"{name}_{stack}": mask for stack, mask in batch.token_masks().items()}


@dataclass(frozen=True)
class Compared:
    """One pair of layers, in one batch."""

    batch: Batch
    stack: str
    pair: tuple[int, int]
    mask: Tensor
    student: Answer
    teacher: Answer
    settings: LossSettings

    @property
    def is_causal(self) -> bool:
        return self.stack == "decoder" or self.batch.task.is_causal

    def attentions(self) -> tuple[Projected, Projected]:
        found = []
        for side, layer in zip((self.student, self.teacher), self.pair, strict=True):
            seen = side.attentions.get((self.stack, layer - 1))
            if seen is None:
                raise UnsupportedModelError(
                    f"Layer {layer} of the {self.stack} called no attention that could be recorded, so the losses "
                    "`attention`, `relation` and `attention_output` cannot be had of this model. Leave them out of "
                    "losses."
                )
            found.append(seen)
        return found[0], found[1]

    def project(self, loss: str, state: Tensor) -> Tensor:
        return project(self.settings.projections, place_name(loss, self.stack, self.pair), state)


def _hidden(at: Compared) -> Tensor:
    own, other = at.student.states[at.stack, at.pair[0]], at.teacher.states[at.stack, at.pair[1]]
    return hidden_loss(at.project("hidden", own), other, at.mask, kind=at.settings.hidden_loss)[0]


def _attention(at: Compared) -> Tensor:
    return attention_loss(*at.attentions(), at.mask, causal=at.is_causal, kind=at.settings.attention_loss)[0]


def _relation(at: Compared) -> Tensor:
    return relation_loss(*at.attentions(), at.mask, causal=at.is_causal, heads=at.settings.relation_heads)[0]


def _attention_output(at: Compared) -> Tensor:
    own, other = at.attentions()
    return hidden_loss(at.project("attention_output", own.output), other.output, at.mask)[0]


def _sums_of_layers(
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


def _of_layers(name: str, compare: Callable[[Compared], Tensor], **needs: bool) -> Loss:
    return Loss(
        (f"{name}_encoder", f"{name}_decoder"),
        masks=partial(_masks_of_stacks, name),
        sums=partial(_sums_of_layers, name, compare),
        maps_layers=True,
        **needs,
    )


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        ("ce",),
        masks=lambda batch: {"ce": batch.label_targets()[1]},
        sums=_ce_sums,
        needs_teacher=False,
        needs_head=True,
    ),
    "kd": Loss(("kd",), masks=lambda batch: {"kd": batch.soft_mask()}, sums=_kd_sums, needs_head=True),
    "hidden": _of_layers("hidden", _hidden),
    "attention": _of_layers("attention", _attention, needs_attentions=True),
    "relation": _of_layers("relation", _relation, needs_attentions=True),
    "attention_output": _of_layers("attention_output", _attention_output, needs_attentions=True),
    "embedding": Loss(("embedding",), masks=lambda batch: {"embedding": batch.example_mask()}, sums=_embedding_sums),
}
