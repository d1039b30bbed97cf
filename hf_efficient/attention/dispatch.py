"""The one attention function that transformers knows, and how it finds the variant of each layer.

    AttentionInterface.register("hf_efficient", efficient_attention_forward)

A converted layer carries an `AttentionVariant` as a child of its attention module; that is all the state there is. A
layer without one, and cross attention unless asked for, gets dense softmax attention, so layers can mix freely.
"""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging
from transformers.utils.output_capturing import _active_collector

from ..errors import UnsupportedModelError
from .cache import StateLayer, attach_cache
from .config import AttentionConfig
from .engines.parts import full_attention, full_weights, join_masks
from .engines.streaming import attach_rotary, needed_places
from .masks import key_mask
from .registry import ATTENTIONS
from .variant import BIASED, CAUSAL, OWN, AttentionVariant, HeadShape, Logits, hides_future

logger = logging.get_logger(__name__)
NAME = "hf_efficient"
ATTACHED = "efficient_attention"
HIDDEN = -1000.0  # added to a score: its weight is 0 in every dtype


def attach(
    module: nn.Module, config: AttentionConfig, shape: HeadShape, cross: bool = False
) -> RemovableHandle | None:
    """Give one attention module its variant; `full` means none. `cross`: its keys are those of another sequence.

    Returns:
        the hook that sees to its cache, if it has one.
    """
    handle = None
    if config.kind != "full":
        device = torch.empty(0).device
        variant = make_variant(config, shape)
        if device.type != "cpu":  # where it is made; but its parameters, where a model is built without memory for any
            variant = variant.to(device)
        if device.type != "meta":
            for part, name, value in _plain_tensors(variant):
                setattr(part, name, value.to(device))
        if is_biased(module) or hasattr(type(module), OWN):
            variant.has_state = False  # the model makes its bias, and its masks, by the keys that it sees in the cache
        module.add_module(ATTACHED, variant)
        if config.streaming and not cross:
            attach_rotary(module)
        if not cross:
            handle = attach_cache(module, variant.config, variant.has_state, variant.keeps_keys)
    return handle


def make_variant(config: AttentionConfig, shape: HeadShape) -> AttentionVariant:
    """A variant with its starting values, on the CPU: they depend on the config and the shape alone.

    What is drawn at random in whatever way is drawn from the seed of the config, so that what a checkpoint does not
    hold (a buffer that is not persistent, a tensor that is no buffer) is the same when it is loaded; and it is made
    for real where a model is built on meta, so that `__init__` may read its own tensors.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(config.seed)
        variant = ATTENTIONS[config.kind](config.resolve(causal=False), shape)
        variant.reset_parameters()
    return variant


@torch.no_grad()
def fill_missing(variant: AttentionVariant) -> None:
    """Give what no checkpoint held of a loaded variant the values of a new one. What was loaded is not touched."""
    floats = [each.dtype for each in (*variant.parameters(), *variant.buffers()) if each.is_floating_point()]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(floats[0] if floats else usual)  # as where the model was built
    try:
        new = make_variant(variant.config, variant.shape)
    finally:
        torch.set_default_dtype(usual)
    fresh = dict(new.named_parameters()) | dict(new.named_buffers())
    for name, tensor in (*variant.named_parameters(), *variant.named_buffers()):
        if name in fresh and not getattr(tensor, "_is_hf_initialized", False):
            tensor.copy_(fresh[name])
    parts = dict(variant.named_modules())
    paths = {part: path for path, part in new.named_modules()}
    for part, name, value in _plain_tensors(new):  # torch.nn.init did nothing in `__init__` while it was loaded
        target = parts[paths[part]]
        setattr(target, name, value.to(getattr(target, name)))


def _plain_tensors(variant: AttentionVariant) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """The tensors that are attributes, neither parameters nor buffers: transformers neither loads nor moves them."""
    return [
        (part, name, value)
        for part in variant.modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]


def variant_of(module: nn.Module) -> AttentionVariant | None:
    """The variant of an attention module, if it has one."""
    return module._modules.get(ATTACHED)


def decodes_from_state(model: nn.Module) -> bool:
    """True if a layer of the model carries a state from token to token instead of all keys and values."""
    pairs = ((module, variant_of(module)) for module in model.modules())
    stateful = (module for module, variant in pairs if variant is not None and variant.has_state)
    return any(hides_future(module) for module in stateful)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    state_layer: StateLayer | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query `[B,H,T,D]`, key and value `[B,K,S,D]` -> `([B,T,H,D], weights)`.

    The weights `[B,H,T,S]` come with `output_attentions=True` alone, else None; `[B,H,T,0]` of a kind without weights.

    Raises:
        UnsupportedModelError: a 4D mask with a kind that cannot obey it; capped scores (`softcap`) or sinks (`s_aux`
            [H]) with a kind that is no softmax; weights while decoding from a state.
    """
    extra = needed_places(variant := variant_of(module), kwargs.get("rotary"), softcap)
    if softcap is not None or s_aux is not None:
        check_logits(variant)
        extra["logits"] = Logits(softcap, None if s_aux is None else s_aux.flatten())
    causal = hides_future(module, is_causal)
    with_weights = _weights_wanted(kwargs)
    is_given = attention_mask is not None and attention_mask.ndim == 4
    if is_given or is_biased(module):
        given = attention_mask, position_bias, causal
        attention_mask, position_bias, causal, pairs = _read_pairs(module, given, query, key)
        extra |= {} if pairs is None else {"pairs": pairs}
    if variant is not None and variant.has_state and state_layer is not None:
        common = {"scaling": scaling, "bias": None if position_bias is None else position_bias[:, :, 0], **extra}
        out, weights = _decode(variant, state_layer, (query, key, value, attention_mask), common, with_weights)
        return out.transpose(1, 2).contiguous(), weights
    if attention_mask is not None:
        # The keys of a static cache are longer than the text, those of a sliding one shorter.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
        if "pairs" in extra:
            extra["pairs"] = extra["pairs"][..., : attention_mask.shape[1]][..., -key.shape[2] :]
        attention_mask = attention_mask[:, -key.shape[2] :]
    common = {"causal": causal, "scaling": scaling, "bias": _carrier(position_bias, query, key), **extra}
    window = kwargs.get("sliding_window")
    if window is not None and not causal:
        window = window - 1  # without causality theirs says |i - j| < window (ModernBERT), ours <=
    if variant is None:
        # Zeros that T5 passes to cross attention are no relative bias, and there is no window over other sequences.
        unbiased_zeros = position_bias is not None and common["bias"] is None
        common["window"] = None if unbiased_zeros or is_given else window
        if is_given:  # it says all
            attention_mask, common["causal"] = None, False
        out = full_attention(query, key, value, attention_mask, dropout=dropout, **common)
        weights = full_weights(query, key, attention_mask, **common) if with_weights else None
    else:
        out = variant(query, key, value, attention_mask, window=window, dropout=dropout, **common)
        weights = _weights(variant, query, key, attention_mask, **common) if with_weights else None
    return out.transpose(1, 2).contiguous(), weights


def _decode(
    variant: AttentionVariant, layer: StateLayer, inputs: tuple, common: dict, with_weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The new tokens alone, their query, key, value and mask, after those that the cache layer sums up; weights only
    if there are none before."""
    if with_weights and layer.state is not None:
        raise UnsupportedModelError(
            f"{variant.config.kind!r} attention keeps no keys to weigh while it decodes from a cache: ask for "
            "output_attentions with use_cache=False."
        )
    query, key, value, mask = inputs
    mask = None if mask is None else mask[:, -query.shape[2] :]
    weights = _weights(variant, query, key, mask, causal=True, **common) if with_weights else None
    out, state = variant.decode(query, key, value, mask, layer.state, **common)
    layer.advance(state)
    return out, weights


def _weights_wanted(kwargs: dict) -> bool:
    """`output_attentions=True`, which GPT-2 does not tell its attention; transformers collects what comes anyway."""
    collected = None if torch.compiler.is_compiling() else _active_collector.get()
    return bool(kwargs.get("output_attentions")) or "attentions" in (collected or ())


def _weights(variant: AttentionVariant, query: torch.Tensor, key: torch.Tensor, mask, **common) -> torch.Tensor:
    """Those of the variant; `[B, H, T, 0]` of a kind that has none, so that other layers' keep their places."""
    if variant.has_weights:
        return variant.weights(query, key, mask, dropout=0.0, **common)
    if not torch.compiler.is_compiling():
        logger.warning_once(
            f"{variant.config.kind!r} attention has no weight for each pair of tokens: where attentions are asked "
            "for, those of its layers are tensors with 0 keys."
        )
    return query.new_zeros(*query.shape[:3], 0)


def _carrier(position_bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The Toeplitz carrier `[1, H, S+T-1]`, or None for the full-size zeros of a module without a bias table."""
    if position_bias is None:
        return None
    length = key.shape[2] + query.shape[2] - 1
    is_carrier = position_bias.shape[2] == 1 and position_bias.shape[3] == length
    return position_bias[:, :, 0] if is_carrier else None


def check_logits(variant: AttentionVariant | None) -> None:
    """Refuse a kind with no place for capped scores and sinks; none at all is full attention."""
    if variant is not None and not variant.takes_logits:
        allowed = ", ".join(name for name, other in ATTENTIONS.items() if other.takes_logits)
        raise UnsupportedModelError(
            f"{variant.config.kind!r} attention cannot express the capped scores or the attention sinks of this "
            f"model. Kinds that keep them: {allowed}."
        )


def is_biased(module: nn.Module) -> bool:
    """Whether the model of an attention module gives it a bias for all pairs, which is no Toeplitz carrier."""
    return bool(vars(module).get(BIASED))


def _read_pairs(
    module: nn.Module,
    given: tuple[torch.Tensor | None, torch.Tensor | None, bool],
    query: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool, torch.Tensor | None]:
    """From a mask and a position bias, one or both of which are of all pairs, and whether later tokens are hidden: a
    2D mask, a Toeplitz carrier, the latter again, and one mask of all pairs [B or 1, H or 1, T or 1, S], bool or added
    scores.

    Raises:
        UnsupportedModelError: a kind that cannot obey it, one of another shape, or keys behind the last query (a
            static cache).
    """
    (mask, bias, causal), variant, pairs = given, variant_of(module), None
    looks = not torch.compiler.is_compiling()
    if mask is not None and mask.ndim == 4:
        if mask.shape[2] not in (1, query.shape[2]):
            raise UnsupportedModelError(f"A 4D mask {list(mask.shape)} does not fit {query.shape[2]} queries.")
        is_bool = mask.dtype == torch.bool
        sees = mask if is_bool else mask > HIDDEN
        pairs, mask = mask, sees.any(1).any(1).expand(query.shape[0], -1)  # the keys that any query sees
        if variant is not None and looks:
            causal = _hides(module, sees, query.shape[2], causal)
            # Padding and what is hidden anyway need no pairs; for one query that has a state it may be more than that.
            is_known = query.shape[2] > 1 or not variant.has_state or sees.all()
            is_plain = not variant.takes_pairs and is_known and _is_of_keys(sees, mask, query.shape[2], causal)
            if is_plain and (is_bool or not pairs.masked_fill(~sees, 0).any()):
                pairs = None
        if pairs is not None and not is_bool:
            pairs = pairs.to(query.dtype)
            pairs = pairs if variant is None else pairs.masked_fill(~sees, float("-inf"))
    if bias is not None and is_biased(module):
        width = key.shape[2] if pairs is None else pairs.shape[3]
        pairs, bias = join_masks(None, bias[..., :width].to(query.dtype), pairs), None
    if pairs is not None and variant is not None and not variant.takes_pairs:
        allowed = ", ".join(name for name, other in ATTENTIONS.items() if other.takes_pairs)
        raise UnsupportedModelError(
            f"{variant.config.kind!r} attention takes a 2D attention_mask [batch, length]; a 4D mask was given, by "
            "the caller or by a model whose masks are more than padding and causality (packed sequences, images in "
            f"a text, a bias of its own). Kinds that obey one: {allowed}; or pass the 2D mask, or leave this layer "
            "unconverted."
        )
    return mask, bias, causal, pairs


def _is_of_keys(sees: torch.Tensor, keys: torch.Tensor, length: int, causal: bool) -> bool:
    """Whether a mask [B or 1, H or 1, T or 1, S] of all pairs says no more than which keys [B, S] are real, and that
    later ones are hidden."""
    if sees.shape[1] > 1 or sees.shape[2] == 1:
        return sees.shape[1] == 1
    wanted = keys[:, None, None, :].expand(-1, -1, length, -1)
    return torch.equal(sees.expand_as(wanted), wanted.tril(keys.shape[1] - length) if causal else wanted)


def _hides(module: nn.Module, sees: torch.Tensor, length: int, causal: bool) -> bool:
    """Whether later tokens are hidden, by a mask [B or 1, H or 1, T or 1, S] of all pairs if nothing else is known.

    Raises:
        UnsupportedModelError: keys behind the last query.
    """
    seen = sees.shape[3]
    if causal and length < seen and not sees[..., -1, -1].any():
        raise UnsupportedModelError("A 4D mask with keys behind the last query (a static cache) cannot be obeyed.")
    if CAUSAL in vars(module) or length < seen or length == 1:
        return causal
    return not sees.expand(-1, -1, length, -1).triu(1).any()


AttentionInterface.register(NAME, efficient_attention_forward)
AttentionMaskInterface.register(NAME, key_mask)
