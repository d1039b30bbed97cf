"""The one attention function that transformers knows, and how it finds the variant of each layer.

    AttentionInterface.register("hf_efficient", efficient_attention_forward)

A converted layer carries an `AttentionVariant` as a child of its attention module; that is all the state there is. A
layer without one, and all cross attention, gets dense softmax attention, so layers can mix freely.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import UnsupportedModelError
from ..families import Family, Stack
from .config import AttentionConfig
from .full import full_attention
from .linear import linear_attention
from .local import local_attention
from .masks import key_mask
from .relative_bias import use_toeplitz_bias

NAME = "hf_efficient"
ATTACHED = "efficient_attention"


class AttentionVariant(nn.Module):
    """The attention of one converted layer: its config, and later its learned parameters.

    Call: `(query [B,H,T,D], key [B,K,S,D], value [B,K,S,D], key_mask [B,S] or None, causal=, scaling=, dropout=,
    bias=)` with the Toeplitz carrier `[1, H, S+T-1]` as `bias`; returns `[B, H, T, D]`.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.to_dict().items())


class LocalAttention(AttentionVariant):
    def forward(self, query, key, value, key_mask, **kwargs):
        window, global_tokens = self.config.window, self.config.global_tokens
        return local_attention(query, key, value, key_mask, window=window, global_tokens=global_tokens, **kwargs)


class LinearAttention(AttentionVariant):
    def forward(self, query, key, value, key_mask, bias=None, **kwargs):
        return linear_attention(query, key, value, key_mask, feature_map=self.config.feature_map, **kwargs)


ATTENTIONS: dict[str, type[AttentionVariant]] = {"local": LocalAttention, "linear": LinearAttention}

# Kinds that have no place for T5's relative position bias.
WITHOUT_BIAS = ("linear",)


def check_bias(config: AttentionConfig, family: Family) -> None:
    """Refuse a kind that would drop the relative position bias of the family."""
    if family.relative_bias and config.kind in WITHOUT_BIAS:
        raise UnsupportedModelError(
            f"{config.kind!r} attention cannot express the relative position bias of {family.model_type} models. "
            'Use kind="local", which keeps the part of the bias inside the window.'
        )


def attach(layers: nn.ModuleList, stack: Stack, attention: tuple[AttentionConfig, ...], family: Family) -> None:
    """Give the layers of a stack their variants. `attention` may be empty: then all stay dense."""
    for layer, config in zip(layers, attention, strict=False):
        if config.kind == "full":
            continue
        check_bias(config, family)
        layer.get_submodule(stack.attention.module).add_module(ATTACHED, ATTENTIONS[config.kind](config))
    if family.relative_bias:
        use_toeplitz_bias(layers[0].get_submodule(stack.attention.module))


def efficient_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query `[B,H,T,D]`, key and value `[B,K,S,D]` -> `([B,T,H,D], None)`.

    Raises:
        UnsupportedModelError: a 4D mask on a converted layer, or `softcap`, attention sinks, `output_attentions`.
    """
    _refuse(kwargs)
    variant = module._modules.get(ATTACHED)
    causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.ndim == 4:
        out = _with_given_mask(variant, query, key, value, attention_mask, dropout, scaling, position_bias)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:  # the keys of a static cache are longer than the text
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    common = {"causal": causal, "scaling": scaling, "dropout": dropout}
    bias = None if position_bias is None else _carrier(position_bias, query, key)
    if variant is not None:
        out = variant(query, key, value, attention_mask, bias=bias, **common)
    elif position_bias is not None and bias is None:  # the zeros that T5 passes to cross attention
        out = full_attention(query, key, value, attention_mask, **common)
    else:
        window = kwargs.get("sliding_window")
        out = full_attention(query, key, value, attention_mask, window=window, bias=bias, **common)
    return out.transpose(1, 2).contiguous(), None


def _carrier(position_bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The Toeplitz carrier `[1, H, S+T-1]`, or None for the full-size zeros of a module without a bias table."""
    length = key.shape[2] + query.shape[2] - 1
    is_carrier = position_bias.shape[2] == 1 and position_bias.shape[3] == length
    return position_bias[:, :, 0] if is_carrier else None


def _with_given_mask(variant, query, key, value, mask, dropout, scaling, position_bias) -> torch.Tensor:
    if variant is not None or position_bias is not None:
        raise UnsupportedModelError(
            "Converted attention takes a 2D attention_mask [batch, length]; a 4D mask was given. "
            "Pass the 2D mask, or leave this layer unconverted."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _refuse(kwargs: dict) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"This model uses {name!r} in its attention, which cannot be converted yet.")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "A model with converted attention has no attention weights to return: call it without "
            "output_attentions=True, or ask the unconverted model."
        )


AttentionInterface.register(NAME, efficient_attention_forward)
AttentionMaskInterface.register(NAME, key_mask)
