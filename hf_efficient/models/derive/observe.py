"""Watch a model run: who calls the attention interface, and what changes where when something is disturbed.

with observing(model) as calls:
    model(**inputs)
calls[0].module, calls[0].query.shape

layer = LayerRun(model, "encoder.layer.0", inputs)
seen = layer.run({"attention.self.query": None})      # noise on all outputs of one linear
seen.inputs["attention.output.dense"]                 # what the other linears then get
"""

import copy
import dis
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from ..interface import changed_interface

NAME, GROUPS = "hf_efficient_observer", "num_key_value_groups"
SMALL = 1e-6  # of the largest number: what is less is rounding


@dataclass
class Call:
    """One call of the attention interface: query `[B, H, T, D]`, key `[B, K, S, D]`, value `[B, K, S, E]`, output
    `[B, T, H, E]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    is_cross: bool
    is_causal: bool
    has_bias: bool
    has_logits: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


_OF_BOOLS: WeakSet[PreTrainedModel] = WeakSet()  # models whose masks must be bools
Masked = Callable[[nn.Module, Tensor | None, int, int], Tensor | None]


@contextmanager
def observing(model: PreTrainedModel, masked: Masked | None = None) -> Iterator[list[Call]]:
    """Calls of attention while the model runs, each computed as the model itself does it.

    Parameters:
        masked: what becomes of the mask of a self-attention, given also the numbers of queries and keys.
    """
    calls: list[Call] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ):
        if model in _OF_BOOLS and isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
            hides = torch.finfo(query.dtype).min
            attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, hides)
        mask = attention_mask
        is_cross = query.shape[2] != key.shape[2] or bool(getattr(module, "is_cross_attention", False))
        if masked is not None and not is_cross:
            mask = masked(module, mask, query.shape[2], key.shape[2])
        if kwargs.get("scaling", 1) is None:  # which fused attention takes for the usual one
            kwargs["scaling"] = query.shape[-1] ** -0.5
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
        if not hasattr(module, GROUPS) and GROUPS in eager.__code__.co_names:  # of other modules of the model
            eager = sdpa_attention_forward
        if mask is not attention_mask and not _reads(eager, "attention_mask"):  # V-JEPA 2
            eager = sdpa_attention_forward
        output, weights = eager(module, query, key, value, mask, **kwargs)
        if mask is not None and mask is not attention_mask:  # a query that sees no key gives zeros
            output = output.masked_fill(_hidden(mask).all(-1).transpose(1, 2)[..., None], 0)
        has_bias = kwargs.get("position_bias") is not None
        has_logits = any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))
        if mask is None and not _reads(eager, "is_causal") and eager is not sdpa_attention_forward:
            kwargs["is_causal"] = False  # whatever the module says (BridgeTower)
        is_causal = _is_causal(module, mask, kwargs)
        calls.append(Call(module, query, key, value, output, is_cross, is_causal, has_bias, has_logits))
        return output, weights

    before = [(config, config._attn_implementation) for config in _configs(model)]
    with changed_interface():
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, _full_mask if model in _OF_BOOLS else eager_mask)
        try:
            for config, _ in before:
                config._attn_implementation = NAME
            yield calls
        finally:
            for config, name in before:
                config._attn_implementation = name


def read_bools(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Let a model have masks of bools, as for fused attention, if it does not give the same with those of numbers that
    are added to scores (Nemotron ASR)."""
    with torch.no_grad():
        own = run(model, inputs)
        with observing(model):
            other = run(model, inputs)
    first = next((name for name in own if isinstance(own[name], Tensor)), None)
    if first and not torch.allclose(own[first], other[first], rtol=1e-3, atol=1e-3, equal_nan=True):
        _OF_BOOLS.add(model)


def _full_mask(*given: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*given, **options | {"allow_is_causal_skip": False})


def _hidden(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


@cache
def _reads(function: Callable, name: str) -> bool:
    """Whether a function does anything with one of its parameters, or with a field of that name."""
    return any(one.argval == name or name in str(one.argval) for one in dis.get_instructions(inspect.unwrap(function)))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that a module of the model reads, once; some models copy theirs."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def _is_causal(module: nn.Module, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """By the mask, if it says anything about the future; else by what the model says."""
    said = options.get("is_causal")
    said = getattr(module, "is_causal", True) if said is None else said
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] < 2:
        return bool(said)
    if mask.shape[-2] < 2:  # the same for all queries: padding
        return False
    hidden = _hidden(mask)
    queries, keys = mask.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
    return bool(hidden[..., future].all())


def run(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The output for copies of the inputs, always with the same random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model(**_copied(inputs), **options)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(one) for one in value)
    return copy.copy(value) if type(value).__name__.endswith("Cache") else value


@dataclass
class Seen:
    """What happened in one run of a layer: calls of attention, what each linear got and gave, and the result."""

    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    result: Tensor | None = None


class LayerRun:
    """One layer of a model, run again and again with what it was first called with.

    `linears` are those that a run reaches, by their paths inside the layer; `states` is its first input.

    Raises:
        UnsupportedModelError: the layer is not called.
    """

    def __init__(self, model: PreTrainedModel, layer: nn.Module, inputs: Mapping[str, Any]):
        self.model, self.layer = model, layer
        self._called: dict[str, Any] = {}
        handle = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            run(model, inputs)
        finally:
            handle.remove()
        if not self._called:
            raise UnsupportedModelError(f"{type(layer).__name__} is not called as a module")
        for name in ("past_key_values", "past_key_value", "layer_past", "past_kv"):
            if name in self._called["kwargs"]:
                self._called["kwargs"][name] = None
        if "use_cache" in self._called["kwargs"]:
            self._called["kwargs"]["use_cache"] = False
        candidates = (*self._called["args"], *self._called["kwargs"].values())
        self.states = next((one for one in candidates if isinstance(one, Tensor) and one.is_floating_point()), None)
        self.linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self.base = self.run()
        self.linears = {name: self.linears[name] for name in self.base.outputs}
        self._whole: dict[str, Seen] = {}

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._called:
            self._called.update(args=_copied(args), kwargs=_copied(kwargs))

    def disturbed(self, name: str) -> Seen:
        """A run with noise on all outputs of one linear; made once."""
        if name not in self._whole:
            self._whole[name] = self.run(name)
        return self._whole[name]

    def reaches(self, name: str, other: str) -> bool:
        """Whether noise on the outputs of one linear arrives at another."""
        return name != other and differs(self.disturbed(name).inputs.get(other), self.base.inputs[other])

    def last(self, names: Collection[str]) -> list[str]:
        """Those of the linears that reach no other of them: of a chain the last link."""
        return [name for name in names if not any(self.reaches(name, other) for other in names)]

    def disturbed_token(self, name: str, row: int, token: int) -> Seen:
        """A run with noise on the outputs of one linear for one token; made once."""
        key = f"{name} {row} {token}"
        if key not in self._whole:
            self._whole[key] = self.run(name, place=(row, token))
        return self._whole[key]

    def run(self, name: str | None = None, units: Tensor | None = None, place: tuple[int, int] | None = None) -> Seen:
        """A run with noise on the outputs of one linear.

        Parameters:
            units: `[batch, length]`, at each token the one unit that is disturbed, -1 for none; None disturbs all.
            place: the row and the token that are disturbed; None: all.
        """
        seen, noise = Seen(), torch.Generator().manual_seed(3)

        def after(path: str, module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, Tensor) and args:  # a router gives several things
                seen.inputs.setdefault(path, args[0].detach().clone())
                seen.outputs.setdefault(path, output.detach().clone())
            if path != name or (hasattr(self, "base") and output.shape != self.base.outputs[path].shape):
                return None
            extra = torch.randn(output.shape, generator=noise)
            if place is not None:
                extra[:, [token for token in range(extra.shape[1]) if token != place[1]]] = 0
                extra[[row for row in range(len(extra)) if row != place[0]]] = 0
            if units is None:
                return output + extra * output.abs().mean().clamp(min=1e-3)
            where = torch.zeros_like(output).scatter_(-1, units.clamp(min=0)[..., None], 1.0)
            return output + where * (units >= 0)[..., None] * (extra.abs() + 2) * output.abs().max()

        with ExitStack() as hooks:
            for path, linear in self.linears.items():
                hook = linear.register_forward_hook(lambda m, a, o, path=path: after(path, m, a, o))
                hooks.callback(hook.remove)
            seen.calls = hooks.enter_context(observing(self.model))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                result = self.layer(*_copied(self._called["args"]), **_copied(self._called["kwargs"]))
        seen.result = result if isinstance(result, Tensor) else result[0]
        return seen


def differs(new: Tensor | None, old: Tensor) -> bool:
    if new is None or new.shape != old.shape or not old.numel():  # no token reaches it
        return False
    return bool(((new - old).abs() > SMALL * old.abs().max()).any())


def is_same(given: Tensor, output: Tensor) -> bool:
    flat = output.reshape(-1)
    return given.numel() == flat.numel() and torch.allclose(given.reshape(-1), flat, rtol=1e-5, atol=1e-6)
