"""What one model makes of a batch: the tensors that the losses compare, whatever its class calls its outputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.heads import MULTI_LABEL, REGRESSION
from ..training.batch import Batch
from .losses.draws import DrawnTokens
from .losses.relations import Projected
from .losses.top_k import TopLogits
from .recorded import Place


@dataclass(frozen=True)
class Answer:
    """
    Fields:
        logits: as `Batch.logits` gives them, or what a cache keeps of a vocabulary; `None` for models without a head.
        states: the hidden states asked for, by stack and position (0 is the embeddings, l the output of layer l).
        last: the last hidden state of a model without a head.
        pooled: the embedding, where a cached teacher gives it in place of `last`.
        encoded: what the encoder of an encoder-decoder gives.
        attentions: what the attentions asked for were given, by stack and layer from 0.
    """

    logits: Tensor | TopLogits | DrawnTokens | None
    states: Mapping[Place, Tensor] = field(default_factory=dict)
    last: Tensor | None = None
    pooled: Tensor | None = None
    encoded: Tensor | None = None
    attentions: Mapping[Place, Projected] = field(default_factory=dict)


def comparable(
    student: Tensor, teacher: Tensor | TopLogits | DrawnTokens, vocabulary: int | None
) -> tuple[Tensor, Tensor | TopLogits | DrawnTokens]:
    """The logits of the entries that both vocabularies have."""
    if vocabulary is None or not isinstance(teacher, Tensor):
        return student, teacher
    return student[..., :vocabulary], teacher[..., :vocabulary]


def agreement(
    batch: Batch, student: Tensor | None, answer: Answer | None, vocabulary: int | None
) -> tuple[Tensor | float, Tensor | float]:
    """(positions with the same prediction, positions). Regression and embeddings have no predictions to agree on."""
    teacher: Any = None if answer is None else answer.logits
    if student is None or teacher is None or batch.problem == REGRESSION:
        return 0.0, 0.0
    mask = batch.soft_mask()
    if not isinstance(teacher, Tensor):  # what a cache keeps of a vocabulary: the most likely token is its first
        same = student.argmax(dim=-1) == teacher.ids[..., 0]
    elif batch.problem == MULTI_LABEL:
        same = (student > 0) == (teacher > 0)
    else:
        own, other = comparable(student, teacher, vocabulary)
        same = own.argmax(dim=-1) == other.argmax(dim=-1)
    return (same & mask).sum(), mask.sum()


def read_answer(batch: Batch, outputs: Any, attentions: Mapping[Place, Projected]) -> Answer:
    """From the outputs of a transformers model."""
    stacks = batch.head.stacks
    states = {}
    for stack in stacks:
        layers = outputs.get(f"{stack}_hidden_states" if len(stacks) > 1 else "hidden_states") or ()
        states |= {(stack, position): state for position, state in enumerate(layers) if state is not None}
    last = outputs.last_hidden_state if batch.head.kind == "embeddings" else None
    encoded = outputs.get("encoder_last_hidden_state")
    return Answer(batch.logits(outputs), states, last, encoded=encoded, attentions=attentions)
