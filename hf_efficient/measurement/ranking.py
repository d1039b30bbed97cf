"""How well a model ranks the candidates of each query, and whether two models rank them alike.

    NDCG@10 = DCG of the ranking / DCG of the best one,  DCG = sum_{i <= 10} label_i / log2(1 + i)
    MRR@10  = 1 / place of the first relevant document, 0 behind the tenth        (Jarvelin & Kekalainen 2002; TREC)

    ndcg(scores, labels), reciprocal_rank(scores, labels)  # of one query, [candidates] both
    same_order(first, second, counts)                      # of any two candidates of a query, how often alike

Documents of equal scores share the gains of their places, as in scikit-learn's `ndcg_score`; for MRR the irrelevant
ones come first. Relevant is a label of 0.5 and more. Queries whose documents all have one label rank nothing: they are
left out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..reporting.schema import Quality, Score
from .estimates import mean_and_error

QUERY = "query"
FIRST = 10  # places that count
RELEVANT = 0.5


def ndcg(scores: Tensor, labels: Tensor, first: int = FIRST) -> float:
    """Of one query with a label above 0: `[candidates]` both."""
    discounts = torch.log2(torch.arange(len(scores), dtype=torch.double) + 2).reciprocal()
    discounts[first:] = 0
    _, tied = torch.unique(-scores, return_inverse=True)  # the highest score is the first
    sizes = tied.bincount()
    gains = torch.zeros(len(sizes), dtype=torch.double).scatter_add_(0, tied, labels.double()) / sizes
    dcg = gains.repeat_interleave(sizes) @ discounts
    return float(dcg / (labels.double().sort(descending=True).values @ discounts))


def reciprocal_rank(scores: Tensor, labels: Tensor, first: int = FIRST) -> float:
    """Of one query: `[candidates]` both."""
    relevant = labels >= RELEVANT
    if not relevant.any():
        return 0.0
    place = 1 + int((scores[~relevant] >= scores[relevant].max()).sum())
    return 1 / place if place <= first else 0.0


def same_order(first: Tensor, second: Tensor, counts: Tensor) -> float:
    """Of any two candidates of a query, how often both models put the same one first: the mean over the queries.

    `first`, `second`: scores `[total]`, query after query; `counts`: `[n]` candidates of each.
    """
    shares = []
    for ours, theirs in zip(first.split(counts.tolist()), second.split(counts.tolist()), strict=True):
        above = torch.ones(len(ours), len(ours)).triu(1).bool()  # each two once
        signs = [(each[:, None] - each).sign()[above] for each in (ours, theirs)]
        shares.append((signs[0] == signs[1]).double().mean())
    return float(torch.stack(shares).mean())


def score_pairs(model: Any, batch: Mapping[str, Any], inputs_of: Callable) -> list[tuple[Tensor, ...]]:
    """(score, label, query) of each row, on the CPU; DataError for rows or models that are of another task."""
    if missing := [name for name in ("labels", QUERY) if name not in batch]:
        raise DataError(
            f"The batch has no {missing[0]!r}, only {', '.join(sorted(batch))}. Rankings are scored by the candidates "
            "of each query, as prepare(..., 'reranking') makes them."
        )
    logits = model(**inputs_of(model, batch)).logits
    if logits.ndim != 2 or logits.shape[1] != 1:
        raise DataError(
            f"{type(model).__name__} gives {list(logits.shape)} numbers for {len(batch[QUERY])} pairs, where a "
            "reranker gives one for each. Load the model with num_labels=1 and fine-tune it."
        )
    scores = logits[:, 0].float().cpu()
    return list(zip(scores, batch["labels"].reshape(-1).float().cpu(), batch[QUERY].cpu(), strict=True))


def ranked(task: str, rows: Sequence[tuple[Tensor, ...]]) -> dict[str, Any]:
    """The fields of an `Evaluation` from rows of `score_pairs`: a sample is a query, its targets are its candidates.

    Raises:
        DataError: no query has documents of different labels.
    """
    scores, labels, queries = (torch.stack([row[i] for row in rows]) for i in range(3))
    order = queries.argsort(stable=True)
    sizes = queries.unique(return_counts=True)[1].tolist()
    pairs = zip(scores[order].split(sizes), labels[order].split(sizes), strict=True)
    kept = [pair for pair in pairs if pair[1].min() < pair[1].max()]
    if not kept:
        raise DataError("No query has documents of different labels, so there is nothing to rank.")
    gains = torch.tensor([ndcg(*pair) for pair in kept], dtype=torch.double)
    losses = torch.tensor([1 - reciprocal_rank(*pair) for pair in kept], dtype=torch.double)
    count = torch.tensor([len(each) for each, _ in kept]).double()
    mean, error = mean_and_error(gains, torch.ones_like(gains))
    mean_loss, loss_error = mean_and_error(losses, torch.ones_like(losses))
    numbers = (
        Score(f"ndcg@{FIRST}", mean, error, True),
        Score(f"mrr@{FIRST}", 1 - mean_loss, loss_error, True),
    )
    return {
        "quality": Quality(task, len(kept), int(count.sum()), numbers),
        "loss": losses,
        "correct": gains,
        "count": count,
        "predictions": torch.cat([each for each, _ in kept]),
        "targets": torch.cat([each for _, each in kept]),
    }
