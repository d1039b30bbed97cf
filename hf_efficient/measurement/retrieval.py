"""Does the vector of a text lie nearest to that of its own pair? How embeddings are scored without labels.

    loss, nearest = find_pairs(vectors, pairs)             # [2n, width], [2n]: rows 2i and 2i + 1 are a pair

Each text is a query among all n second texts, by cosine. `nearest` is the second text that it finds, the loss is
1 - 1 / rank of its own one, where second texts that are just as near come first.
"""

import torch
from torch import Tensor

from ..errors import DataError

PAIR = "pair"
CHUNK = 1024  # queries compared at once


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
