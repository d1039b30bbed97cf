"""Kernel attention: a learned kernel of the distance, times random features of the content; no softmax.

    out_i = sum_j c(j-i) phi(q_i).phi(k_j) v_j / sum_j c(j-i) phi(q_i).phi(k_j)
    c(d) = exp(-d^2 / 2 s^2), s learned for each head;    phi(x) = exp(t w_m . x/|x|), m = 1..M, t learned

(Luo et al. 2021, arXiv 2106.12566: kernelised attention with relative positions; normalised queries and keys keep it
stable, section 3.3; phi: the positive features of Performer, arXiv 2009.14794, whose mean phi(q).phi(k) over random w
is exp(t^2 q.k / |q||k|) up to a factor that cancels.) O(n) time and memory for every width; see `convolution.py`.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 4, 1000, 64)
    >>> width = torch.full((4,), 100.0)
    >>> kernel_attention(query, key, value, log_width=width.log(), causal=True).shape     # by position alone
    torch.Size([1, 4, 1000, 64])

`scaling` has no place here: it multiplies q, whose length is divided out; `t` is what takes its part.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ...errors import unknown_name
from ..config import KERNELS as NAMED
from ..config import AttentionConfig
from ..engines.convolution import Kernel, convolution_macs, convolve, make_tables
from ..engines.feature_maps import draw_projection
from ..engines.parts import check_positions, check_shapes, toeplitz, zero_padding
from ..engines.sums import drop_keys, without_autocast
from ..variant import AttentionVariant, HeadShape

FEATURES = 16
START_WIDTH = 512.0  # tokens: wide, and still with a slope to learn from in a text of a hundred
DENSE = 256  # up to so many queries, all pairs are cheaper
TINY = 1e-6  # added to |x|^2, for a vector of zeros


# c as a function of u = |j - i| / s: largest at 0, falling, and smooth but for u = 0.
def gaussian(u: Tensor) -> Tensor:
    return torch.exp(u.square() / -2)


def exponential(u: Tensor) -> Tensor:
    return torch.exp(-u)  # ALiBi's bias -|j - i| / s, arXiv 2108.12409


def cauchy(u: Tensor) -> Tensor:
    return 1 / (1 + u.square())


KERNELS: dict[str, Callable[[Tensor], Tensor]] = dict(NAMED)  # read once: torch.compile cannot import in a program


class KernelAttention(AttentionVariant):
    """`kernel_attention` with a width and a temperature for each head, and the projection drawn from the seed."""

    needs_training = True

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.features = FEATURES if config.feature_dim is None else config.feature_dim
        self.log_width = nn.Parameter(torch.empty(shape.heads))
        if self.features:
            self.log_temperature = nn.Parameter(torch.empty(shape.kv_heads))
            self.register_buffer("projection", torch.empty(self.features, shape.dim))
        KernelAttention.reset_parameters(self)

    def reset_parameters(self):
        init.constant_(self.log_width, math.log(START_WIDTH))
        if self.features:
            init.zeros_(self.log_temperature)
            init.copy_(self.projection, draw_projection(*self.projection.shape, seed=self.config.seed))

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        if self.features:
            kwargs |= {"log_temperature": self.log_temperature, "projection": self.projection}
        options = {"kernel": self.config.kernel, "log_width": self.log_width, **kwargs}
        return kernel_attention(query, key, value, key_mask, **options)

    def macs(self, length, causal):
        dim, features = self.shape.dim, self.features
        dense = length * (features + dim + 1)
        return 2 * features * dim + min(dense, convolution_macs(features, dim + 1, causal))


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    kernel: str = "gaussian",
    log_width: Tensor,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by distance and content; shapes as in `full_attention`.

    Parameters:
        kernel: a name in `KERNELS`.
        log_width: [H], log s, s in tokens.
        log_temperature: [K], log t. None, with `projection`: weights of the positions alone.
        projection: [M, D], the w_m.
        scaling: without effect, because queries and keys are normalised.
        dropout: probability of dropping a key's contribution for all queries, the others scaled by 1/(1-p), the
            normaliser left whole; the mean is the undropped output.

    Returns:
        [B, H, T, Dv] in the dtype of query; fp16 and bf16 are summed in fp32. Queries at padded positions, and those
        without any visible key, give zeros; every other query sees its own position.

    Raises:
        ConfigError: an unknown kernel.
        UnsupportedModelError: shapes that do not fit together, or queries and keys that do not share one sequence.
    """
    if kernel not in KERNELS:
        raise unknown_name("kernel", kernel, KERNELS)
    check_shapes(query, key, value, key_mask, None)
    length, seen = query.shape[2], key.shape[2]
    check_positions(length, seen, causal)
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    with without_autocast(query.device.type):
        dtype = torch.promote_types(query.dtype, torch.float32)
        key, value = zero_padding(key, value, key_mask)
        phi_query = phi_key = None
        if projection is not None and log_temperature is not None:
            rows = projection.to(dtype) * log_temperature.to(dtype).exp()[:, None, None]  # [K, M, D]
            phi_query, phi_key = _features(query, key, key_mask, rows)
        value = value.to(dtype)
        if dropout:
            value = drop_keys(value, dropout)
        ones = torch.ones_like(value[..., :1])  # [B, K, S, 1]: 1 at real keys, so that its sum is the normaliser
        if key_mask is not None:
            ones = key_mask[:, None, :, None].to(value.dtype).expand_as(ones)
        rate = (-log_width.to(dtype)).exp().unflatten(0, (kv_heads, groups))

        def weigh(distance: Tensor) -> Tensor:  # [...] -> [K, G, ...]
            return KERNELS[kernel](distance * rate.view(*rate.shape, *[1] * distance.dim()))

        sums = _weighted_sums(phi_query, phi_key, torch.cat([value, ones], -1), weigh, length, causal)
        is_query = None if key_mask is None else key_mask[:, seen - length :]
        return _divide(sums, is_query).flatten(1, 2).to(query.dtype)


def _features(query: Tensor, key: Tensor, key_mask: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) [B,K,G,T,M], each divided by its largest entry, which cancels; phi(k) [B,K,S,M], 0 at padded keys."""
    query, key = query.to(rows.dtype).unflatten(1, (key.shape[1], -1)), key.to(rows.dtype)
    of_query = _project(query, rows.unsqueeze(1))
    phi_query = (of_query - of_query.detach().amax(-1, keepdim=True)).exp()
    phi_key = _project(key, rows).exp()
    if key_mask is not None:
        phi_key = phi_key.masked_fill(~key_mask[:, None, :, None], 0)
    return phi_query, phi_key


def _project(x: Tensor, rows: Tensor) -> Tensor:
    """rows @ x/|x|: [.., D] -> [.., M]."""
    return (x @ rows.mT) * (x.square().sum(-1, keepdim=True) + TINY).rsqrt()


def _divide(sums: Tensor, is_query: Tensor | None) -> Tensor:
    """[B,K,G,T,Dv+1] -> [B,K,G,T,Dv], divided by the last column; 0 where that is 0, and at padded queries [B,T]."""
    total = sums[..., -1:]
    visible = total != 0
    if is_query is not None:
        visible = visible & is_query[:, None, None, :, None]
    inverse = torch.where(visible, torch.where(visible, total, 1).reciprocal(), 0)  # finite gradients everywhere
    return sums[..., :-1] * inverse


def _weighted_sums(
    query: Tensor | None, key: Tensor | None, x: Tensor, weigh: Kernel, length: int, causal: bool
) -> Tensor:
    """[B,K,G,T,E]: sum_j c(j-i) (phi(q_i).phi(k_j)) x_j for the queries at the last T of S positions."""
    seen = x.shape[2]
    if length == 1 or (not torch.compiler.is_compiling() and length <= DENSE):
        return _weighted_sums_dense(query, key, x, weigh, length, causal)
    if query is not None:
        query = F.pad(query, (0, 0, seen - length, 0))
    tables = make_tables(weigh, seen, causal, x.dtype, x.device)
    return convolve(query, key, x, tables)[:, :, :, seen - length :]


def _weighted_sums_dense(
    query: Tensor | None, key: Tensor | None, x: Tensor, weigh: Kernel, length: int, causal: bool
) -> Tensor:
    seen = x.shape[2]
    offset = torch.arange(1 - seen, length, device=x.device)  # key minus query; the last query is at the last key
    weights = weigh(offset.abs().to(x.dtype))
    if causal:
        weights = weights.masked_fill(offset > 0, 0)
    groups = weights.shape[1]
    weights = toeplitz(weights, length, seen).flatten(1, 2)  # [K, G T, S]
    if query is not None and key is not None:
        weights = weights * (query.flatten(2, 3) @ key.mT)
    return (weights @ x).unflatten(2, (groups, length))
