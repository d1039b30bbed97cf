"""A decoder as one program with a cache: keys and values of earlier tokens go in, those with the new tokens come out.

    inputs:  input_ids [B, T], attention_mask [B, P + T], position_ids [B, T],
             past_key_values.0.key, past_key_values.0.value [B, heads, P, size], the same of layer 1, ...
    outputs: logits [B, T, V], present.0.key, present.0.value [B, heads, P + T, size], ...

With an empty past (P = 0) the program reads a prompt, with T = 1 it writes, with more it reads on. Names and order are
those of Optimum, which transformers.js and ONNX Runtime GenAI know too. A layer has heads and sizes of its own, so
that layers which pruning left unequal are no matter.
"""

import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UnsupportedModelError
from ..models.classes import block_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = ("input_ids", "attention_mask", "position_ids")
PAST = "past_key_values"
LEAST = 4  # tokens of a traced text: of one past token and one new one the sizes would be fixed

Pairs = Mapping[str, Mapping[str, Tensor]]


class Decoder(nn.Module):
    """A causal model as the exporters must see it: with the cache as plain tensors, which have the names of above."""

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, past_key_values: Pairs, **inputs: Tensor) -> dict[str, Any]:
        cache = DynamicCache()
        for pair in past_key_values.values():
            layer = DynamicLayer()
            layer.lazy_initialization(pair["key"], pair["value"])
            layer.keys, layer.values = pair["key"], pair["value"]
            cache.layers.append(layer)
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        return {"logits": output.logits, "present": _pairs(cache)}


class CachedProgram:
    """The program, called as its model: without a past it begins, without positions it counts on.

    Parameters:
        program: takes and gives what `Decoder` does.
        traced: how each of its inputs was traced, as the exporters write it down.
    """

    def __init__(self, program: Callable[..., Any], traced: Mapping[str, Any]):
        self.program, self.traced = program, traced

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Pairs | None = None,
    ) -> CausalLMOutputWithPast:
        rows, new = input_ids.shape
        past = self._empty(rows) if past_key_values is None else past_key_values
        old = past["0"]["key"].shape[2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, old + new, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(old, old + new).expand(rows, -1)
        text = dict(zip(TEXT, (input_ids, attention_mask, position_ids), strict=True))
        taken = {name: value for name, value in text.items() if name in self.traced}
        output = self.program(**taken, past_key_values=past)
        return CausalLMOutputWithPast(logits=output["logits"], past_key_values=output["present"])

    def _empty(self, rows: int) -> Pairs:
        def none(leaf: Mapping[str, Any]) -> Tensor:
            _, heads, _, size = leaf["shape"]
            return torch.zeros(rows, heads, 0, size, dtype=getattr(torch, leaf["dtype"]))

        layers = self.traced[PAST]["leaves"]
        return {layer: {name: none(leaf) for name, leaf in pair["leaves"].items()} for layer, pair in layers.items()}


def check_decoder(model: "PreTrainedModel") -> None:
    """`model` may be on the meta device.

    Raises:
        UnsupportedModelError: it writes no text, or its attention keeps something else than keys and values.
    """
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} is no decoder with a head for language, which alone is exported with a cache. "
            "Export it without."
        )
    stacks = block_of(model.config).stacks.values()
    if others := {each.kind for stack in stacks for each in stack.attention or ()} - {"full"}:
        raise UnsupportedModelError(
            f"Attention of the kind {', '.join(sorted(others))} keeps another state than keys and values, which is "
            "not exported. Export it without a cache, or generate with it in PyTorch."
        )


def texts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch is read; positions are counted."""
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def traced_decoder(model: "PreTrainedModel", batch: Mapping[str, Tensor]) -> tuple[Decoder, dict[str, Any]]:
    """The module to trace and its inputs: the second half of the texts of `batch`, and the cache of the first half.

    Raises:
        UnsupportedModelError: the cache of the model holds something else than keys and values of all tokens.
    """
    ids = batch["input_ids"]
    ids = ids.repeat(1, LEAST) if ids.shape[1] < LEAST else ids
    half, mask = ids.shape[1] // 2, torch.ones_like(ids)
    cache = DynamicCache()
    try:
        with torch.no_grad():
            model(input_ids=ids[:, :half], attention_mask=mask[:, :half], past_key_values=cache, use_cache=True)
        pairs = _pairs(cache)
        kept = {value.shape[2] for pair in pairs.values() for value in pair.values()}
    except Exception as error:  # the code of a model asks a cache of its own for what others do not have
        raise _other_cache(model, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if kept != {half}:
        raise _other_cache(model, f"after {half} tokens it holds {sorted(kept)}")
    example = {"input_ids": ids[:, half:], "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        example["position_ids"] = torch.arange(half, ids.shape[1]).repeat(len(ids), 1)
    return Decoder(model), example | {PAST: pairs}


def in_pieces(runtime: Callable[..., Any], **batch: Tensor) -> tuple[Tensor]:
    """Logits of whole texts, which the program reads in up to three pieces, the last of one token."""
    ids = batch["input_ids"]
    mask, length = batch.get("attention_mask", torch.ones_like(ids)), ids.shape[1]
    past, logits = None, []
    for start, end in pairwise(sorted({0, length // 2, length - 1, length})):
        output = runtime(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = output.past_key_values
        logits.append(torch.as_tensor(output.logits))
    return (torch.cat(logits, dim=1),)


def _pairs(cache: DynamicCache) -> dict[str, dict[str, Tensor]]:
    return {str(index): {"key": layer.keys, "value": layer.values} for index, layer in enumerate(cache.layers)}


def _other_cache(model: "PreTrainedModel", reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} is not exported with a cache: that of the model is not keys and values of every "
        f"token ({reason}). Export it without."
    )
