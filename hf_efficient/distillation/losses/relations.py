"""Losses between attentions, from queries, keys and values: pure functions that return `(sum, count)` as in `losses`.

    attention   the weights of each head, or the scores before the softmax     MiniLM, Wang et al. 2020; TinyBERT
    relation    softmax(X X' / sqrt(d)) of X = Q, K and V, cut into `heads`     MiniLM v2, Wang et al. 2021

A position counts once, as a query, where `mask` is true; keys are the true positions of the same example, up to the
query itself where `causal`. Weights are those of the bare scores: no dropout, windows or relative position biases.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError, unknown_name
from .divergences import LOG_ZERO, kl, log_probabilities
from .tables import ATTENTION_LOSSES


@dataclass(frozen=True)
class Projected:
    """What one attention compares: query `[B, H, T, D]`, key `[B, K, T, D]`, value `[B, K, T, Dv]`.

    output: what its module gives, `[B, T, width]`; empty until it has.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    output: Tensor = field(default_factory=lambda: torch.empty(0))


def attention_loss(
    student: Projected, teacher: Projected, mask: Tensor, *, causal: bool = False, kind: str = "kl"
) -> tuple[Tensor, Tensor]:
    """`kl`: KL(teacher's weights || student's), `mse`: squared error of the scores, mean over keys; mean over heads.

    Shapes: query [B, H, T, D], key [B, K, T, D] (D may differ between the models), mask [B, T], or [B] for images.

    Raises:
        ConfigError: the models have other numbers of heads.
    """
    if kind not in ATTENTION_LOSSES:
        raise unknown_name("attention_loss", kind, ATTENTION_LOSSES)
    heads = student.query.shape[1], teacher.query.shape[1]
    if heads[0] != heads[1]:
        raise ConfigError(
            f"The `attention` loss compares head with head; this student layer has {heads[0]}, its teacher layer "
            f"{heads[1]}. Use the `relation` loss, which works with any numbers of heads."
        )
    where = _positions(mask, student.query)
    # The scaling is each model's own, so that heads of other widths give the weights that their model gives.
    scores = [_scores(side.query, side.key, where) * side.scaling for side in (student, teacher)]
    return _compare(*scores, where, mask, causal=causal, kind=kind)


def relation_loss(
    student: Projected, teacher: Projected, mask: Tensor, *, causal: bool = False, heads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over X = Q, K, V of KL(teacher's relations of X || student's), mean over the relation heads.

    The heads of each model are laid side by side and cut anew into `heads` pieces, so that neither the numbers of
    heads nor the widths need agree (Wang et al. 2021, section 3.1). `None`: as many as the teacher's heads, or the
    next smaller number that divides all widths. A key or value that several queries share lies beside each of them:
    so pieces are whole heads wherever those of the queries are.

    Raises:
        ConfigError: `heads` does not divide a width.
    """
    sides = [
        [_for_queries(state, side.query) for state in (side.query, side.key, side.value)]
        for side in (student, teacher)
    ]
    widths = [state.shape[1] * state.shape[3] for side in sides for state in side]
    common = math.gcd(*widths)  # what divides it cuts every one of the six into equal pieces
    if heads is None:
        heads = max(n for n in range(1, teacher.query.shape[1] + 1) if common % n == 0)
    elif common % heads:
        raise ConfigError(
            f"relation_heads={heads} does not divide the widths of queries, keys and values, {sorted(set(widths))}. "
            f"Divisors of all: {', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}."
        )
    where = _positions(mask, student.query)
    total = student.query.new_zeros(())
    for own, other in zip(*sides, strict=True):  # queries, keys, values: [B, H, T, D] with H and D of each model
        # [B, H, T, D] -> [B, heads, T, H D / heads]
        flat = [state.transpose(1, 2).flatten(2) for state in (own, other)]
        pieces = [state.unflatten(-1, (heads, -1)).transpose(1, 2) for state in flat]
        scores = [_scores(piece, piece, where) * piece.shape[-1] ** -0.5 for piece in pieces]
        total = total + _compare(*scores, where, mask, causal=causal, kind="kl")[0]
    return total, mask.sum()


def _positions(mask: Tensor, query: Tensor) -> Tensor:
    """[B, T] from a mask [B, T], or [B]."""
    return mask if mask.dim() == 2 else mask[:, None].expand(-1, query.shape[2])


def _for_queries(state: Tensor, query: Tensor) -> Tensor:
    """[B, K, T, D] -> [B, H, T, D]: grouped heads once for each query head."""
    return state.repeat_interleave(query.shape[1] // state.shape[1], dim=1)


def _scores(query: Tensor, key: Tensor, where: Tensor) -> Tensor:
    """[B, H, T, T] in float32 or wider. What lies under padding is not read, be it NaN."""
    wide = torch.promote_types(query.dtype, torch.float32)
    nowhere = ~where[:, None, :, None]
    query, key = (state.to(wide).masked_fill(nowhere, 0) for state in (query, key))
    return query @ _for_queries(key, query).transpose(-1, -2)


def _compare(
    student: Tensor, teacher: Tensor, where: Tensor, mask: Tensor, *, causal: bool, kind: str
) -> tuple[Tensor, Tensor]:
    """Two score matrices [B, H, T, T], query by query."""
    seen = where[:, None, None, :]
    if causal:
        seen = seen & torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device).tril()
    # LOG_ZERO is finite: a row of padding sees nothing, and -inf all along it would give NaN, in the gradient too.
    if kind == "mse":
        values = ((student - teacher).square() * seen).sum(-1) / seen.sum(-1).clamp_min(1)
    else:
        values = kl(*(log_probabilities(scores.masked_fill(~seen, LOG_ZERO)) for scores in (teacher, student)))
    values = values.mean(dim=1)  # [B, T]
    values = values[mask] if mask.dim() == 2 else values.mean(dim=1)[mask]
    return values.sum(), mask.sum()
