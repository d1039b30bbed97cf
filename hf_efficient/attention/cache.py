"""The cache of a layer that decodes from a state: a window of keys, or sums, in place of all keys and values.

    model = convert_attention(llama, AttentionConfig(kind="linear"))
    model.generate(**inputs, max_new_tokens=1000)      # the cache of each layer is as large at the end as at the start

transformers makes the cache, a list of layers, before it knows of any attention. Each converted causal self-attention
module looks for its layer when it is called: an empty stock layer gives way to a `StateLayer`, which goes on to the
attention function as the keyword argument `state_layer`. A layer that holds keys already is left as it is.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..errors import UnsupportedModelError
from .config import AttentionConfig
from .variant import State, hides_future

_ARGUMENTS = ("past_key_values", "layer_past")  # what attention modules call the cache; the latter GPT-NeoX
_STOCK = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # the former since 5.23


class StateLayer(CacheLayerMixin):
    """What `AttentionVariant.decode` carries from call to call, in the place of a stock cache layer.

    It stays on its device and in its precision when the rest of the cache is offloaded or quantised: it is small.

    Attributes:
        state: tensors with the batch first; None before the first token.
        tokens: how many tokens the layer was given.
        config: the attention that the state belongs to.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, config: AttentionConfig, is_sliding: bool = False, max_length: int = -1, keeps_keys: bool = False
    ):
        self.config, self.is_sliding, self.max_length, self.keeps_keys = config, is_sliding, max_length, keeps_keys
        self.reset()

    def reset(self) -> None:
        self.state: State | None = None
        self.tokens = self.decoded = 0
        self.expected = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the state comes with the first tokens."""

    def expect(self, config: AttentionConfig) -> None:
        """Get ready for one call of the attention that the state belongs to; UnsupportedModelError if it is that of
        another one, or lacks tokens of a call that failed."""
        if not self.tokens:
            self.config = config
        if self.config is not config and self.config != config:
            raise UnsupportedModelError(
                f"This cache holds the state of {self.config.to_dict()}, and cannot be continued with "
                f"{config.to_dict()}. Start with a new cache."
            )
        if self.tokens != self.decoded:
            raise UnsupportedModelError(
                f"This cache saw {self.tokens} tokens, of which only {self.decoded} reached its state: an earlier "
                "call failed, or the model does not pass `state_layer` on to its attention. Start with a new cache."
            )
        self.expected = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and give back their keys and values alone; UnsupportedModelError if the layer was not
        made ready: the caller would take these for all keys."""
        if not self.expected:
            raise UnsupportedModelError(
                f"This cache holds a state of {self.config.kind!r} attention, no keys. Only the model that filled it "
                "can go on from it."
            )
        self.expected = False
        self.dtype, self.device = key_states.dtype, key_states.device
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    def advance(self, state: State) -> None:
        """The state after all tokens so far."""
        self.state, self.decoded = state, self.tokens

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def keys(self) -> Tensor | None:
        """[B, K, m, D], those that are kept: of `local` the last in the window, as a sliding stock layer has them.

        Raises:
            UnsupportedModelError: the kind keeps none.
        """
        return self._kept(0)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._kept(1)

    def _kept(self, place: int) -> Tensor | None:
        if self.state is None:
            return None
        if not self.keeps_keys:
            raise UnsupportedModelError(
                f"This cache holds a state of {self.config.kind!r} attention, out of which no keys and values can be "
                "read. Use the cache as a whole, with the model that filled it; Whisper reads them for "
                "return_dict_in_generate=True: leave that out."
            )
        return self.state[place]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state or ())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return _mask_sizes(self, query_length)

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = tuple(tensor[indices.to(tensor.device)] for tensor in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = tuple(tensor.repeat_interleave(repeats, 0) for tensor in self.state)

    def offload(self) -> None:
        """Nothing: `Cache.update` offloads a layer before the state is read."""

    def prefetch(self) -> None:
        """Nothing: the state was not offloaded."""

    def crop(self, tokens_to_remove: int) -> None:
        """UnsupportedModelError, for 0 tokens too: none can be taken out of a state, as who asks means to later."""
        raise UnsupportedModelError(
            f"Assisted and contrastive decoding take tokens back from the cache, but {self.config.kind!r} attention "
            "keeps a state out of which none can be taken. Generate without assistant_model, prompt_lookup_num_tokens "
            "or penalty_alpha, and start with a new cache."
        )


class AllKeysLayer(DynamicLayer):
    """Takes the place of a sliding stock layer, which forgets the keys outside of the model's own window.

    A converted layer goes by its own setting, and a kind without a state needs all keys for it.
    """

    is_sliding = True

    def __init__(self, max_length: int = -1):
        super().__init__()
        self.max_length = max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return _mask_sizes(self, query_length)


def _mask_sizes(layer: StateLayer | AllKeysLayer, query_length: int) -> tuple[int, int]:
    """Number of keys and offset, as of the stock layer that was there: all keys, or room for `max_length` of them.

    Stock layers take their mask from this one if it is the first of its sort, so it must be as wide as theirs.
    """
    return (layer.get_seq_length() + query_length if layer.max_length < 0 else layer.max_length), 0


def attach_cache(
    module: nn.Module, config: AttentionConfig, has_state: bool, keeps_keys: bool = False
) -> RemovableHandle | None:
    """Make a self-attention module that is called with a cache see to its layer there.

    One that takes no further keywords could not pass a state on to its attention: it keeps its ordinary cache.
    """
    parameters = inspect.signature(module.forward).parameters
    names = [name for name in _ARGUMENTS if name in parameters]
    if names and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        argument = names[0], list(parameters).index(names[0])
        hook = partial(_find_state, (config, has_state, keeps_keys), argument)
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return None


def _find_state(
    kind: tuple[AttentionConfig, bool, bool], argument: tuple[str, int], module: Any, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """The forward pre-hook: adds `state_layer` to the arguments if this call decodes from a state.

    Otherwise attention is that over all keys: in training, when exporting, and where a static cache is compiled, whose
    tensors must stay the same ones. `kind` is what `attach_cache` knows of the kind; `argument` is the name and the
    place of the cache among the arguments of `module`.
    """
    (config, has_state, keeps_keys), (name, place) = kind, argument
    cache = args[place] if len(args) > place else kwargs.get(name)
    index = getattr(module, "layer_idx", None)  # None where one module serves several layers (Zamba)
    if cache is None or index is None or not hides_future(module):
        return None
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:  # layers are made on demand
        cache.layers.append(cache.layer_class_to_replicate())
    layers = cache.layers
    if index >= len(layers):
        return None
    layer = layers[index]
    fixed = isinstance(layer, StaticLayer) and torch.compiler.is_compiling()
    trains = module.training and torch.is_grad_enabled()  # `generate` in training mode records no gradients
    keeps_state = has_state and not (trains or fixed or torch.compiler.is_exporting())
    is_stock = type(layer) in _STOCK or isinstance(layer, _QUANTIZED)
    if is_stock and (keeps_state or layer.is_sliding):
        layer = layers[index] = _in_place_of(layer, config, keeps_state, keeps_keys)
    if not isinstance(layer, StateLayer):
        return None
    if trains:
        raise UnsupportedModelError(
            "This cache holds a state, which cannot be continued where gradients are recorded. Call model.eval(), or "
            "train without a cache."
        )
    layer.expect(config)
    return args, {**kwargs, "state_layer": layer}


def _in_place_of(layer: Any, config: AttentionConfig, keeps_state: bool, keeps_keys: bool) -> CacheLayerMixin:
    """What serves a converted layer instead of a stock layer; UnsupportedModelError if that has forgotten tokens."""
    tokens = int(layer.get_seq_length())
    max_length = layer.get_max_length() if isinstance(layer, StaticLayer) else -1
    if keeps_state and not tokens:
        return StateLayer(config, layer.is_sliding, max_length, keeps_keys)
    if not layer.is_sliding:
        return layer
    if tokens > (layer.keys.shape[2] if tokens else 0):
        raise UnsupportedModelError(
            f"This cache holds the last {layer.keys.shape[2]} of {tokens} tokens, too few for {config.kind!r} "
            "attention. Start with a new cache."
        )
    all_keys = AllKeysLayer(max_length)
    if tokens:
        all_keys.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens])
    return all_keys
