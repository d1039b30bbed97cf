"""Softmax attention in a window and linear attention over all other keys, with one normaliser. O(n * window).

    weight_ij = exp(scaling q_i . k_j)         j in the window W(i), as in `local`
    weight_ij = mix_h phi(q_i) . phi(k_j)      every other key, causal: every earlier one
    out_i     = sum_j weight_ij v_j / sum_j weight_ij

(LoLCATs 2024, arXiv 2410.10254, section 3.2.) The mix is a learned positive number of each head. There, the softmax
weights alone are divided by the largest in the window; here all weights are, so that their ratios are those of the
formula whatever the scores.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 12, 4096, 64)
    >>> local_linear_attention(query, key, value, window=64).shape
    torch.Size([1, 12, 4096, 64])
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ...errors import ConfigError
from ..config import AttentionConfig
from ..engines.feature_maps import FEATURE_MAPS, FeatureMapAttention, MapWeights, check_map
from ..engines.near_far import NearAndFar, common_scale, cut_queries, lay_out, make_masks
from ..engines.parts import (
    check_positions,
    check_shapes,
    check_window,
    full_attention,
    real_keys,
    section,
    zero_padding,
)
from ..engines.sums import add_to_sums, drop_keys, fill_up, group_heads, inverse_of, to_sum, without_autocast
from ..variant import HeadShape, State
from .linear import features


class LocalLinearAttention(FeatureMapAttention):
    """`local_linear_attention` with the window and the feature map of the config, and a learned mix for each head.

    The mix starts where the mean linear weight of standard normal queries and keys is that of softmax.
    """

    has_state = True

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.log_mix = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.constant_(self.log_mix, 0.5 - math.log(FEATURE_MAPS[self.config.feature_map].mean(self.shape.dim)))

    def attend(self, query, key, value, key_mask, *, bias=None, **kwargs):
        options = {"window": self.config.window, "log_mix": self.log_mix, **self.map_options}
        return local_linear_attention(query, key, value, key_mask, **options, **kwargs)

    def decode(self, query, key, value, key_mask, state, *, scaling, bias):
        options = {"window": self.config.window, "log_mix": self.log_mix, **self.map_options}
        return local_linear_decode(query, key, value, key_mask, state, **options, scaling=scaling)

    def macs(self, length, causal):
        features, making = self.feature_macs()
        reach = self.config.window if causal else 2 * self.config.window + 1
        return making + 2 * min(length, reach) * self.shape.dim + 2 * features * (self.shape.dim + 1)


class _Far(NamedTuple):
    """What the weights beyond the window are made of, and the scaling of all; see `local_linear_attention`."""

    feature_map: str
    map_weights: MapWeights | None
    log_mix: Tensor | None
    scaling: float | None


class _Inputs(NamedTuple):
    """query [B,H,T,D], key, value, phi of queries and of (the first) keys, in the dtype of the sums and zero at padded
    keys; `mix` [H]; `real` [B or 1, S]; `scaling` of the scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_query: Tensor
    phi_key: Tensor
    mix: Tensor
    real: Tensor
    scaling: float


def local_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    window: int,
    log_mix: Tensor | None = None,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax weights in a window and linear weights beyond; shapes as in `full_attention`.

    Parameters:
        window: bidirectional: keys with |i - j| <= window; causal: the last `window` keys including the token itself.
        log_mix: [H], logarithm of the factor on the linear weights of each head; None means 0.
        feature_map, map_weights: as in `linear_attention`.
        scaling: factor on the scores in the window, and what the feature map takes for it; None means D**-0.5.
        dropout: probability of dropping a key's contribution for all queries, as in `linear_attention`; in a window
            over everything without gradients, of dropping a weight.

    Returns:
        [B, H, T, Dv] in the dtype of query, computed in fp32 at least. Where the window covers everything, the same as
        `full_attention`. A query that may see no key gives zeros.

    Raises:
        ConfigError: an unknown feature map, weights or a mix that do not fit, or a window below 1.
        UnsupportedModelError: bidirectional with T != S (cross attention), or shapes that do not fit together.
    """
    far = _Far(feature_map, map_weights, log_mix, scaling)
    _check(query, key, value, key_mask, window, far)
    length, seen = query.shape[2], key.shape[2]
    check_positions(length, seen, causal)
    # With gradients, learned parts must take part, be it with gradients of 0.
    if not torch.compiler.is_exporting() and window >= seen and not torch.is_grad_enabled():
        return full_attention(query, key, value, key_mask, causal=causal, scaling=scaling, dropout=dropout)
    key, value = zero_padding(key, value, key_mask)
    with without_autocast(query.device.type):
        inputs = _prepare(query, key, value, key_mask, far, seen)
        if dropout:
            inputs = inputs._replace(value=drop_keys(inputs.value, dropout))
        if not torch.compiler.is_exporting():  # an exported program keeps one window for all lengths
            window = min(window, seen)
        return _near_and_far(inputs, window, causal, None).to(query.dtype)


def local_linear_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    state: State | None = None,
    *,
    window: int,
    log_mix: Tensor | None = None,
    feature_map: str = "elu",
    map_weights: MapWeights | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, State]:
    """Causal `local_linear_attention` of T new tokens after those that the state sums up.

    The state is the sums [B, K, M, Dv + 1] over the keys that left the window, as in `linear_decode`, and of those
    that the next token's window holds, keys, values and mask.

    Returns:
        [B, H, T, Dv] in the dtype of query, and the state after the new tokens.
    """
    far = _Far(feature_map, map_weights, log_mix, scaling)
    _check(query, key, value, key_mask, window, far)
    mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    key, value = zero_padding(key, value, key_mask)
    sums = None
    if state is not None:
        sums, old_key, old_value, old_mask = state
        key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        mask = torch.cat([old_mask, mask], 1)
    leaving = max(key.shape[2] - (window - 1), 0)  # keys that the next token does not see
    with without_autocast(query.device.type):
        if sums is not None and query.shape[2] == 1:
            inputs = _prepare(query, key, value, mask, far, leaving)
            out = _one_token(inputs, sums)
        else:
            inputs = _prepare(query, key, value, mask, far, key.shape[2])
            out = _near_and_far(inputs, min(window, key.shape[2]), True, sums)
        if leaving or sums is None:
            sums = add_to_sums(sums, inputs.phi_key[:, :, :leaving], inputs.value[:, :, :leaving])
    return out.to(query.dtype), (sums, key[:, :, leaving:], value[:, :, leaving:], mask[:, leaving:])


def _one_token(inputs: _Inputs, sums: Tensor) -> Tensor:
    """[B,H,1,Dv]: a query that has all given keys in its window, after those that `sums` holds."""
    query, phi_query = (group_heads(x, inputs.key)[..., 0, :] for x in (inputs.query, inputs.phi_query))
    near = query.mul(inputs.scaling / math.log(2)) @ inputs.key.mT  # [B, K, G, keys]
    near.masked_fill_(~inputs.real[:, None, None, :], float("-inf"))
    outside = phi_query @ sums
    top, factor = common_scale(near, outside[..., -1:], inputs.mix.view(*query.shape[1:3], 1))
    near = near.sub_(top).exp2_()
    outside = outside * factor
    total = outside[..., -1:] + near.sum(-1, keepdim=True)
    out = (near @ inputs.value).add_(outside[..., :-1]).mul_(inverse_of(total))
    return out.flatten(1, 2).unsqueeze(2)


def _check(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, window: int, far: _Far) -> None:
    check_window(window)
    check_map(far.feature_map, far.map_weights, query, key)
    check_shapes(query, key, value, key_mask, None)
    if far.log_mix is not None and tuple(far.log_mix.shape) != (query.shape[1],):
        raise ConfigError(f"log_mix must be [heads = {query.shape[1]}], got {tuple(far.log_mix.shape)}.")


def _prepare(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, far: _Far, mapped: int) -> _Inputs:
    """phi is made of the first `mapped` keys alone."""
    query, key, value = to_sum(query, key, value)
    phi = FEATURE_MAPS[far.feature_map]
    absolute = phi._replace(of_query=phi.phi)  # beside exp(q . k) it is not only ratios that count
    mapped_mask = None if key_mask is None else key_mask[:, :mapped]
    phi_query, phi_key = features(query, key[:, :, :mapped], mapped_mask, absolute, far.map_weights, far.scaling)
    mix = query.new_ones(query.shape[1]) if far.log_mix is None else far.log_mix.to(query.dtype).exp()
    real = real_keys(key, key_mask)
    scaling = query.shape[-1] ** -0.5 if far.scaling is None else far.scaling
    return _Inputs(query, key, value, phi_query, phi_key, mix, real, scaling)


def _near_and_far(inputs: _Inputs, window: int, causal: bool, sums: Tensor | None) -> Tensor:
    """[B,H,T,Dv]: softmax over the window, linear over the other keys and what `sums` holds of keys before."""
    length, seen = inputs.query.shape[2], inputs.key.shape[2]
    kv_heads, groups = inputs.key.shape[1], inputs.query.shape[1] // inputs.key.shape[1]
    layout = lay_out(length, seen, window, causal, inputs.scaling)
    first = seen - length - layout.before  # the keys before it are out of every window
    if first:
        sums = add_to_sums(sums, inputs.phi_key[:, :, :first], inputs.value[:, :, :first])
    values = F.pad(inputs.value, (0, 1), value=1.0)
    if sums is None:
        sums = values.new_zeros(*values.shape[:2], inputs.phi_key.shape[-1], values.shape[-1])
    lead, fill = layout.left * layout.size - layout.before, layout.blocks * layout.size - length
    trail = fill + layout.right * layout.size
    query, phi_query = (cut_queries(x, fill, layout, kv_heads) for x in (inputs.query, inputs.phi_query))
    key, value, phi_key = (fill_up(x[:, :, first:], lead, trail) for x in (inputs.key, values, inputs.phi_key))
    mix = inputs.mix.view(kv_heads, 1, groups, 1).expand(-1, -1, -1, layout.size).flatten(2).unsqueeze(-1)
    masks = make_masks(F.pad(inputs.real[:, first:], (lead, trail)), layout, window, causal, query.dtype)
    out = NearAndFar.apply(layout, *masks, query, phi_query, mix, key, value, phi_key, sums)  # [B, K, N, G * size, Dv]
    out = out.unflatten(3, (groups, layout.size)).transpose(2, 3)
    return section(out.flatten(3, 4).flatten(1, 2), 2, 0, length)
