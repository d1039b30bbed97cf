"""May the tokens of a stack be merged, and which must stay? Found and proven on a tiny model, head and all.

protected_tokens(ViTForImageClassification, config, "encoder")      # 1: the class token

- Nothing merged, the model gives what it gave, to the bit.
- Where tokens are alike to begin with, merging them loses nothing: with each token standing twice, the output is that
  of the model without merging, whichever layer merges. So whatever looks at places between the layers, or at a grid
  afterwards, and does not get all tokens back, is found.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...attention.config import AttentionConfig
from ...errors import UnsupportedModelError
from ..block import EfficientBlock, StackBlock
from ..classes import with_block
from ..family import CONVERT
from ..rebuild import quietly, rebuild
from ..stacks import ModelStack, model_stacks
from . import _DERIVING, _undisturbed, family_for
from .compare import distance, outputs_of
from .inputs import tiny_inputs
from .observe import run
from .roles import NotDerivable
from .tiny import model_classes, tiny_config, tiny_model
from .trial import TOLERANCE

_KNOWN: dict[tuple, int | str] = {}  # by class, tiny config and stack: the number of tokens, or why not


def protected_tokens(model_class: type[PreTrainedModel] | None, config: PreTrainedConfig, stack: str) -> int:
    """How many first tokens of a stack are of no part of the input, such as a class token, and are never merged.

    Parameters:
        model_class: a stock class; None: the plainest for the config.
        config: a stock config of any size.

    Raises:
        UnsupportedModelError: tokens of this stack cannot be merged; the message says why.
    """
    with _DERIVING, quietly():
        small = tiny_config(config)
        key = (model_class, type(config), small.to_json_string(use_diff=False), stack)
        if key not in _KNOWN:
            with _undisturbed():
                _KNOWN[key] = _found(model_class, small, stack)
    found = _KNOWN[key]
    if isinstance(found, str):
        kind = config.model_type if model_class is None else model_class.__name__
        raise UnsupportedModelError(f"Tokens of the {stack} of {kind} cannot be merged: {found.rstrip('.')}.")
    return found


def _found(model_class: type[PreTrainedModel] | None, config: PreTrainedConfig, name: str) -> int | str:
    try:
        model = tiny_model(config, *([model_class] if model_class else model_classes(config)))
        inputs = tiny_inputs(model)
        inputs.pop("attention_mask", None)
        family = family_for(model.config, model)
        stack = next((one for one in model_stacks(model, family) if one.name == name), None)
        if stack is None or stack.entry.why_not(CONVERT) is not None:
            return "it is not there, or its attention cannot be converted"
        if len(stack.attending) < len(stack.layers):
            return "some of its layers have no softmax attention"
        if stack.is_causal or stack.cross:
            return "it is a decoder, in which a merged token would stand at several positions"
        protected = _leading(model, stack, inputs)
        _prove(_Merged(model, stack, inputs), protected)
        return protected
    except Exception as error:  # whatever the code of a model may raise
        kind = "" if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: "
        return f"{kind}{' '.join(str(error).split())[:200]}"


def _leading(model: PreTrainedModel, stack: ModelStack, inputs: Mapping[str, Tensor]) -> int:
    """The number of first tokens that are the same whatever the image or sound is."""
    generator = torch.Generator().manual_seed(5)
    others = {
        key: value + torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    first, second = (_states(model, stack, each) for each in (inputs, others))
    if first.ndim != 3 or first.shape != second.shape:
        raise NotDerivable("its layers do not take states of batch, tokens and width")
    same = (first - second).abs().amax((0, 2)) == 0  # [tokens]
    count = int(same.long().cumprod(0).sum())
    if same[count:].any() or count > len(same) - 4:
        raise NotDerivable("it reads no image or sound, or tokens of its own stand behind those of the image")
    return count


def _states(model: PreTrainedModel, stack: ModelStack, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the first layer of a stack is given."""
    seen: list[Tensor] = []
    handle = stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        run(model, inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise NotDerivable(f"its layers are called {len(seen)} times in one forward")
    return seen[0]


class _Merged:
    """A tiny model, and copies of it that merge tokens in one stack."""

    def __init__(self, model: PreTrainedModel, stack: ModelStack, inputs: Mapping[str, Tensor]):
        self.model, self.stack, self.inputs = model, stack, inputs

    def outputs(self, tokens: Mapping[int, int] | None, protected: int, twice: bool = False) -> dict[str, Tensor]:
        """What the model gives with so many tokens merged in some layers; None: as it is itself.

        Parameters:
            twice: each token that may be merged stands beside one that is the same.
        """
        model, depth = self.model, len(self.stack.layers)
        if tokens is not None:
            configs = (
                AttentionConfig("merging", merged_tokens=tokens.get(layer, 0), protected_tokens=protected)
                for layer in range(depth)
            )
            block = EfficientBlock(stacks={self.stack.name: StackBlock(attention=tuple(configs))})
            model = rebuild(self.model, with_block(self.model.config, block)).eval()
        stack = next(one for one in model_stacks(model, self.stack.family) if one.name == self.stack.name)

        def doubled(module: Any, args: tuple) -> tuple:
            states = args[0].clone()
            pairs = (states.shape[1] - protected) // 2
            states[:, protected + 1 :: 2][:, :pairs] = states[:, protected::2][:, :pairs]
            return (states, *args[1:])

        with ExitStack() as hooks:
            if twice:
                hooks.callback(stack.layers[0].register_forward_pre_hook(doubled).remove)
            return outputs_of(model, self.inputs)


def _prove(merged: _Merged, protected: int) -> None:
    plain, none = merged.outputs(None, protected), merged.outputs({}, protected)
    same_code = getattr(merged.model.config, "_attn_implementation", None) == "sdpa"
    for name, tensor in plain.items():
        if name not in none or (same_code and not torch.equal(none[name], tensor)):
            raise NotDerivable(f"with nothing merged, {name} of a tiny model is another")
    if distance(none, plain, merged.inputs) > TOLERANCE:
        raise NotDerivable("with nothing merged, the output of a tiny model is another")
    wanted = merged.outputs(None, protected, twice=True)
    pairs = (_states(merged.model, merged.stack, merged.inputs).shape[1] - protected) // 2
    for layer in range(len(merged.stack.layers)):
        outputs = merged.outputs({layer: pairs}, protected, twice=True)
        for name, right in wanted.items():
            left = outputs.get(name)
            if left is None or left.shape != right.shape:
                raise NotDerivable(f"{name} of a tiny model has another shape when tokens are merged")
        if distance(outputs, wanted, merged.inputs) > TOLERANCE:
            raise NotDerivable(f"in layer {layer}, to merge tokens that are alike changes what a tiny model gives")
    changed = merged.outputs({0: pairs}, protected)
    if not distance(changed, plain, merged.inputs) > 10 * TOLERANCE:
        raise NotDerivable("to merge half of the tokens changes nothing")
