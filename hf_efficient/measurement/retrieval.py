"""Does the vector of a text lie nearest to that of its own pair? How embeddings are scored without labels.

    vectors, pairs = embeddings(model, loader)             # [2n, width], [2n]: rows 2i and 2i + 1 are a pair
    loss, nearest = find_pairs(vectors, pairs)

Each text is a query among all n second texts, by cosine. `nearest` is the second text that it finds, the loss is
1 - 1 / rank of its own one, where second texts that are just as near come first.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import DataError
from ..models.pooling import pool
from ..models.token_masks import token_masks

PAIR = "pair"
CHUNK = 1024  # queries compared at once


def embeddings(model: Any, loader: Iterable[Mapping[str, Any]], pooling: str) -> tuple[Tensor, Tensor]:
    """`[rows, width]` pooled over real tokens, of length 1, and the number of the pair of each row.

    Raises:
        DataError: rows that are not pairs.
    """
    from .quality import inputs_of

    vectors, numbers = [], []
    for batch in tqdm(loader, desc="evaluate", disable=None, leave=False):
        if PAIR not in batch:
            raise DataError(
                f"The batch has no {PAIR!r}, only {', '.join(sorted(batch))}. Embeddings are scored by pairs of "
                "texts, as prepare(..., 'sentence-embeddings') makes them."
            )
        inputs = inputs_of(model, batch)
        states = model(**inputs).last_hidden_state  # [B, T, width]
        mask = token_masks(inputs, has_decoder=False)["encoder"]
        vectors.append(F.normalize(pool(states, mask, pooling), dim=-1).cpu())
        numbers.append(batch[PAIR].cpu())
    return torch.cat(vectors), torch.cat(numbers)


def find_pairs(vectors: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """1 - 1 / rank of the own second text, and the index of the nearest one: both `[n]`.

    Raises:
        DataError: rows 2i and 2i + 1 do not belong together.
    """
    if len(pairs) % 2 or not torch.equal(pairs[::2], pairs[1::2]) or len(pairs[::2].unique()) < len(pairs) // 2:
        raise DataError("The rows are not pairs: rows 2i and 2i + 1 need the same number `pair`, and no others.")
    queries, others = vectors[::2], vectors[1::2]
    losses, nearest = [], []
    for start in range(0, len(queries), CHUNK):
        likeness = queries[start : start + CHUNK] @ others.T
        own = likeness[torch.arange(len(likeness)), start + torch.arange(len(likeness))]
        losses.append(1 - 1 / (likeness >= own[:, None]).sum(1))
        nearest.append(likeness.argmax(1))
    return torch.cat(losses), torch.cat(nearest)
