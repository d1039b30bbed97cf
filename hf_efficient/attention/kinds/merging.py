"""Token merging: softmax attention of a layer that joins its most similar tokens before its FFN.

    kept token = sum_i s_i x_i / sum_i s_i,      softmax_j(scaling q . k_j + log s_j)        (Bolya 2023, ToMe)

    AttentionConfig("merging", merged_tokens=8)

Every second token is an *a*, the others are *b*s. Each a looks for the b whose key is most like its own, by the cosine
of the mean over heads; the `merged_tokens` best pairs become one token each, the mean of all the tokens that went into
it. s_j counts these, so that a token which stands for three weighs as three in every later layer. The first
`protected_tokens` (class, distillation, registers) are never merged. After the last layer each token of the input gets
the state of the one it went into, so that whatever follows sees as many as ever.

Bolya et al. 2023, Token Merging: Your ViT But Faster, arXiv:2210.09461, section 3. Tokens keep their order
here, which changes nothing where positions are added before the first layer, and that is proven
(`models.derive.merging`). The layer's part is in `models.merging`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ..engines.parts import match_heads, sdpa
from ..variant import AttentionVariant


@dataclass
class Tokens:
    """What a layer and its attention know of the tokens while the layer runs.

    Fields:
        owners: `[B, n]`, for each token of the input the one that it is part of now; None: nothing was merged.
        merges: the attention hands over what it gives, and the layer goes on with fewer tokens.
        keys: `[B, K, T, D]` of the attention.
        attended: what the attention gave.
    """

    owners: Tensor | None
    merges: bool
    keys: Tensor | None = None
    attended: Any = None

    def sizes(self, count: int) -> Tensor | None:
        """`[B, T]`, of how many tokens of the input each of `count` tokens is the mean; None: of one."""
        if self.owners is None:
            return None
        ones = torch.ones_like(self.owners)
        return ones.new_zeros(ones.shape[0], count).scatter_add(1, self.owners, ones)


_TOKENS: ContextVar[Tokens | None] = ContextVar("tokens", default=None)


def current_tokens() -> Tokens:
    """Those of the layer that runs.

    Raises:
        UnsupportedModelError: no layer that merges tokens runs.
    """
    tokens = _TOKENS.get()
    if tokens is None:
        raise UnsupportedModelError(
            "'merging' attention was called outside of a layer that merges tokens. Call the layer or the model."
        )
    return tokens


@contextmanager
def using(tokens: Tokens) -> Iterator[None]:
    """These are the tokens of the layer that runs."""
    before = _TOKENS.set(tokens)
    try:
        yield
    finally:
        _TOKENS.reset(before)


@torch.no_grad()
def match(keys: Tensor, merged: int, protected: int) -> Tensor:
    """Bipartite soft matching: where each token goes, `[B, T]` places among those that remain.

    Parameters:
        keys: `[B, K, T, D]`.
        merged: how many tokens disappear; at most half of those that may.
        protected: the first ones that stay as they are.
    """
    metric = torch.nn.functional.normalize(_wide(keys).mean(1)[:, protected:], dim=-1)  # [B, n, D]
    a, b = metric[:, ::2], metric[:, 1::2]
    best, partners = (a @ b.transpose(1, 2)).max(-1)  # [B, len(a)]
    chosen = best.topk(merged).indices  # [B, merged], numbers of a
    source = protected + 2 * chosen
    target = protected + 2 * partners.gather(1, chosen) + 1
    itself = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[0], -1)
    kept = torch.ones_like(itself).scatter(1, source, 0)
    return (kept.cumsum(1) - 1).gather(1, itself.scatter(1, source, target))


def mergeable(count: int, merged: int, protected: int) -> int:
    """How many of `count` tokens are merged where `merged` are wanted."""
    return max(0, min(merged, (count - protected) // 2))


def merge(x: Tensor, places: Tensor, count: int, sizes: Tensor | None) -> Tensor:
    """The mean of the tokens that go to each of `count` places, weighted by their sizes: `[B, T, C]` to
    `[B, count, C]`."""
    weights = _wide(x.new_ones(places.shape) if sizes is None else sizes.to(x.dtype))  # [B, T]
    totals = weights.new_zeros(weights.shape[0], count).scatter_add(1, places, weights)
    shares = (weights / totals.gather(1, places)).to(x.dtype)  # exactly 1 of a token that stays alone
    return x.new_zeros(x.shape[0], count, x.shape[2]).scatter_add(1, _of_states(places, x), x * shares[..., None])


def unmerge(x: Tensor, owners: Tensor) -> Tensor:
    """Each token of the input with the state of the one that it went into: `[B, T, C]` to `[B, n, C]`."""
    return x.gather(1, _of_states(owners, x))


def _of_states(places: Tensor, x: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, x.shape[2])


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MergingAttention(AttentionVariant):
    """Softmax attention that counts a merged token as many times as it has parts, and remembers its keys."""

    def attend(self, query, key, value, key_mask, *, causal, scaling, dropout, bias):
        if causal or key_mask is not None:
            what = "causal attention" if causal else "an attention_mask"
            raise UnsupportedModelError(
                f"Tokens cannot be merged under {what}: a merged token would stand at several positions. Use it in "
                "encoders of images, or of texts without padding, and pass no mask."
            )
        if query.shape[2] != key.shape[2]:
            raise UnsupportedModelError("Tokens cannot be merged in cross attention.")
        tokens = current_tokens()
        tokens.keys = key
        sizes = tokens.sizes(key.shape[2])
        mask = None if sizes is None else _wide(sizes.to(query.dtype)).log().to(query.dtype)[:, None, None, :]
        return sdpa(query, *match_heads(query, key, value), mask, scaling=scaling, dropout=dropout)

    def macs(self, length, causal):
        return 2 * length * self.shape.dim
