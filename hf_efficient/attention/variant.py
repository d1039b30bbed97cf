"""What the attention of one converted layer is: a module with a config, and learned parts where the kind has any.

    class LocalAttention(AttentionVariant):
        takes_bias = True
        def attend(self, query, key, value, key_mask, **kwargs): ...

A new kind is one subclass of `AttentionVariant` and one call of `register_attention` (or one entry of `KINDS`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .config import AttentionConfig


class HeadShape(NamedTuple):
    """The heads of one attention module: query heads H, key/value heads K, and the dimension D of one head."""

    heads: int
    kv_heads: int
    dim: int


class Logits(NamedTuple):
    """What is done to the scores before they become weights: softmax(c tanh(s / c)) with the cap c (Gemma 2, arXiv
    2408.00118), and `sinks` [H], one more score for each head in the sum of the softmax, without a value (gpt-oss)."""

    softcap: float | None = None
    sinks: Tensor | None = None


State = tuple[Tensor, ...]
CAUSAL, BIASED = "efficient_is_causal", "efficient_is_biased"  # what is known of an attention module
OWN = "efficient_is_watched"  # its class has it: it computes its attention itself (`watched`)
MAX_WEIGHTS = 4096  # tokens: beyond it, attention weights [B,H,n,n] are refused


def hides_future(module: nn.Module, said: bool | None = None) -> bool:
    """Whether an attention module hides later tokens: what was seen of it (`CAUSAL`), or else what its model says, and
    that may be wrong where a mask of the model decides (NLLB-MoE, Splinter).

    Parameters:
        said: the argument `is_causal` of a call.
    """
    seen = vars(module).get(CAUSAL)
    if seen is not None:
        return seen
    return getattr(module, "is_causal", True) if said is None else said


class AttentionVariant(nn.Module):
    """The attention of one converted layer.

    Learned parts are parameters whose first dimension is the query heads H or the key/value heads K (pruning slices
    them so); what is drawn once, such as a random projection, is a buffer shared by the heads. `__init__` and
    `reset_parameters` give all of them their starting values. What is not saved (`persistent=False`, tensors that are
    mere attributes) is made again by them for the heads that there are, whenever a model is built.

    Attributes:
        takes_bias: the kind has a place for T5's relative position bias.
        takes_logits: it is softmax over the scores of some keys, which may be capped and share it with a sink.
        takes_pairs: it can obey a mask of all pairs, beside what it leaves out itself.
        takes_uneven: values may be wider or narrower than queries (as in latent attention, MLA).
        takes_cross: queries and keys may come from different sequences, so it can serve cross attention.
        has_weights: the output is a matrix of weights, one for each pair, times the values.
        has_state: `decode` carries a state from call to call, so that no key is kept that is not needed.
        keeps_keys: the state begins with keys [B,K,m,D] and values [B,K,m,Dv], which others may read from the cache.
        needs_training: as converted, without training, the outputs are not close to softmax attention.
    """

    takes_bias = False
    takes_logits = False
    takes_pairs = False
    takes_uneven = True
    takes_cross = False
    has_weights = True
    has_state = False
    keeps_keys = False
    needs_training = False

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__()
        self.config, self.shape = config.resolve(causal=False), shape

    def reset_parameters(self) -> None:
        """Starting values of learned parts and buffers, written in any way: it is called on a new variant only, whose
        values then go to what a checkpoint does not hold. Random numbers come from the seed of the config."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        *,
        causal: bool,
        scaling: float | None,
        dropout: float,
        bias: Tensor | None,
    ) -> Tensor:
        """Attention of query `[B,H,T,D]` over key `[B,K,S,D]` and value `[B,K,S,Dv]`; gives `[B,H,T,Dv]`.

        `key_mask` [B,S] is True at real tokens. `bias` is the Toeplitz carrier `[1, H, S+T-1]`; only a kind that
        `takes_bias` is given one, `logits` only to one that `takes_logits` and `pairs` [B or 1, H or 1, T or 1, S], a
        bool mask or added scores, to one that `takes_pairs`, where there are any. Query i stands at key position
        S-T+i.
        """
        raise NotImplementedError

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        state: State | None,
        *,
        scaling: float | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Causal attention of T new tokens after those that `state` sums up; None: there are none before them.

        All inputs hold the new tokens alone (`bias` spans all). The new state is tensors with the batch first. Equal
        to `attend` over the whole sequence. Only for kinds that have a state.
        """
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        *,
        window: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What the layer calls: `attend`. `window` is that of the attention in whose place it stands."""
        return self.attend(query, key, value, key_mask, **kwargs)

    def weights(self, query: Tensor, key: Tensor, key_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The weights `[B, H, T, S]` that `attend` really uses: its output for an identity matrix as the values.

        Raises:
            UnsupportedModelError: the kind has none, or there are too many keys for a full matrix.
        """
        if not self.has_weights:
            raise UnsupportedModelError(
                f"{self.config.kind!r} attention has no weight for each pair of tokens to return: call the model "
                "without output_attentions=True."
            )
        return self.attend(query, key, identity_values(key), key_mask, **kwargs)

    def macs(self, length: int, causal: bool) -> int:
        """Multiply-accumulates of one query head for one token of a sequence of `length`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `macs`. Pruning counts with it: say how many multiply-accumulates one head "
            "takes for one token."
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.to_dict().items())


def identity_values(key: Tensor) -> Tensor:
    """[B,K,S,S]: values with which attention gives its own weights; UnsupportedModelError for too many keys."""
    batch, kv_heads, seen = key.shape[:3]
    if seen > MAX_WEIGHTS:
        raise UnsupportedModelError(
            f"Attention weights of {seen} tokens would take {seen} x {seen} numbers for each head. Ask for "
            f"output_attentions with at most {MAX_WEIGHTS} tokens."
        )
    return torch.eye(seen, dtype=key.dtype, device=key.device).expand(batch, kv_heads, -1, -1)
