"""How vectors of texts are scored: by pairs that belong together, or by how alike two texts were said to be.

    loss, nearest = find_pairs(vectors, pairs)             # [2n, width], [2n]: rows 2i and 2i + 1 are a pair

Without labels each text is a query among all n second texts, by cosine. `nearest` is the second text that it finds,
the loss is 1 - 1 / rank of its own one, where second texts that are just as near come first. With labels (STS) the
score is the correlation of labels and cosines, whose parts are the jackknife's (`correlation`).

Two models are alike as far as their cosines rise together: Spearman's correlation, of the labelled pairs or of each
text with its own and the next second texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..models.pooling import pool
from ..models.token_masks import token_masks
from ..reporting.schema import Quality, Score
from ..training.ranks import gather_rows
from .correlation import jackknife, pearson, spearman
from .estimates import mean_and_error

PAIR, SIMILARITY = "pair", "similarity"
CHUNK = 1024  # queries compared at once
OTHERS = 64  # second texts of a query whose cosines are compared between two models


def vectors_of(
    model: Any, batches: Iterable, numbers: Sequence[int], pooling: str, inputs_of: Callable
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`[rows, width]` pooled over real tokens, of length 1; each row's pair, and how alike that was said to be, if it
    was; in the order of the data set, whose rows `numbers` has. DataError if they are not pairs."""
    rows: list[tuple[Tensor, ...]] = []
    for batch in batches:
        if PAIR not in batch:
            raise DataError(
                f"The batch has no {PAIR!r}, only {', '.join(sorted(batch))}. Embeddings are scored by pairs of "
                "texts, as prepare(..., 'sentence-embeddings') makes them."
            )
        inputs = inputs_of(model, batch)
        states = model(**inputs).last_hidden_state  # [B, T, width]
        mask = token_masks(inputs, has_decoder=False)["encoder"]
        vectors = nn.functional.normalize(pool(states, mask, pooling), dim=-1).cpu()
        wanted = batch.get(SIMILARITY, torch.full(batch[PAIR].shape, torch.nan)).float().cpu()
        rows += zip(vectors, batch[PAIR].cpu(), wanted, strict=True)
    vectors, pairs, wanted = (torch.stack(column) for column in zip(*gather_rows(rows, numbers), strict=True))
    return vectors, pairs, None if wanted.isnan().all() else wanted


def scored(task: str, vectors: Tensor, pairs: Tensor, wanted: Tensor | None) -> dict[str, Any]:
    """The fields of an `Evaluation`, in which a sample is a pair."""
    losses, nearest = find_pairs(vectors, pairs)
    n = len(losses)
    if wanted is not None:
        return _alike(task, (vectors[::2] * vectors[1::2]).sum(-1), wanted[::2])
    targets = torch.arange(n)
    correct = (nearest == targets).double()
    (share, _), (loss, error) = (mean_and_error(each.double(), torch.ones(n).double()) for each in (correct, losses))
    scores = (
        Score("retrieval@1", share, (share * (1 - share) / n) ** 0.5, True),
        Score("reciprocal_rank", 1 - loss, error, True),
    )
    columns = (targets[:, None] + torch.arange(min(n, OTHERS))) % n
    near = torch.einsum("nw,nkw->nk", vectors[::2], vectors[1::2][columns])
    return _fields(task, scores, losses, correct, nearest, targets) | {"similarities": near.flatten()}


def _alike(task: str, cosines: Tensor, wanted: Tensor) -> dict[str, Any]:
    if len(wanted) < 3 or len(wanted.unique()) < 2:
        raise DataError(
            f"The {len(wanted)} test pairs have {len(wanted.unique())} different labels, which nothing can be "
            "correlated with. Give more pairs."
        )
    scores = []
    for name, score in (("spearman", spearman), ("pearson", pearson)):
        parts = jackknife(score, cosines, wanted).nan_to_num()  # vectors that are all one tell nothing
        value = float(score(cosines, wanted).nan_to_num())
        scores.append((Score(name, value, mean_and_error(parts, torch.ones_like(parts))[1], True), parts))
    n, parts = len(wanted), scores[0][1]
    fields = _fields(task, tuple(each for each, _ in scores), torch.zeros_like(parts), parts, cosines, wanted)
    quality = Quality(task, n, n, tuple(each for each, _ in scores))
    return fields | {"similarities": cosines, "quality": quality}


def _fields(
    task: str, scores: tuple, losses: Tensor, correct: Tensor, said: Tensor, targets: Tensor
) -> dict[str, Any]:
    return {
        "quality": Quality(task, len(targets), len(targets), scores),
        "loss": losses.double(),
        "correct": correct,
        "count": torch.ones(len(correct)).double(),
        "predictions": said,
        "targets": targets,
    }


def find_pairs(vectors: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """1 - 1 / rank of the own second text, and the index of the nearest: `[n]`; DataError if rows are not pairs."""
    if len(pairs) % 2 or not torch.equal(pairs[::2], pairs[1::2]) or len(pairs[::2].unique()) < len(pairs) // 2:
        raise DataError("The rows are not pairs: rows 2i and 2i + 1 need the same number `pair`, and no others.")
    queries, others = vectors[::2], vectors[1::2]
    losses, nearest = [], []
    for start in range(0, len(queries), CHUNK):
        likeness = queries[start : start + CHUNK] @ others.T
        target = likeness[torch.arange(len(likeness)), start + torch.arange(len(likeness))]
        losses.append(1 - 1 / (likeness >= target[:, None]).sum(1))
        nearest.append(likeness.argmax(1))
    return torch.cat(losses), torch.cat(nearest)


@contextmanager
def first_numbers(model: nn.Module, width: int) -> Iterator[None]:
    """Within it the model's vectors are their first `width` numbers (`truncate_dim` of sentence-transformers)."""

    def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[..., :width]
        return output

    hook = model.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()
