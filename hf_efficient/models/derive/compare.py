"""Everything that a model gives, and how far two models are apart.

distance(outputs_of(small, inputs), outputs_of(model, inputs), inputs)     # 0.0: the same at all real tokens
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .makers import TOKENS
from .observe import run

SKIPPED = re.compile("past_key_values|cache_params|(.*_)?attentions|rope_deltas|states")


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor], inside: str | None = None) -> dict[str, Tensor]:
    """All floating-point tensors that a model gives, by their names; and those that a module `inside` of it gives."""
    tensors: dict[str, Tensor] = {}
    given: list[Any] = []
    handle = inside and model.get_submodule(inside).register_forward_hook(lambda *seen: given.append(seen[-1]))
    try:
        _collect(run(model, inputs), "output", tensors)
    finally:
        if handle:
            handle.remove()
    _collect(given, "inside", tensors)
    return tensors


def _collect(output: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
        tensors[name] = output
    parts = output if isinstance(output, Mapping) else {}
    parts = dict(enumerate(output)) if isinstance(output, list | tuple) else parts
    for key, value in parts.items():
        if not SKIPPED.fullmatch(str(key)):
            _collect(value, f"{name}.{key}", tensors)


def run_in_training(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Once, with dropout, of which there are several sorts.

    Raises:
        UnsupportedModelError: of ours; a model may want more in training than is known here.
    """
    try:
        run(model.train(), inputs)
    except UnsupportedModelError:
        raise
    except Exception:  # whatever the code of a model may raise that wants labels
        return
    finally:
        model.eval()


def decoded(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The first output `[1, tokens, width]` for the text without padding, token by token from a cache.

    None: the model keeps no cache of a text that is its only input.
    """
    main = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    is_text = set(inputs) <= {"input_ids", "attention_mask", "decoder_input_ids"} and main in inputs
    if not is_text or not keeps_cache(model):
        return None
    rest = {name: value[1:2] for name, value in inputs.items() if name != "attention_mask"}
    ids, steps, cache = rest.pop(main), [], None
    for part in ids.split([2] + [1] * (ids.shape[1] - 2), dim=1):  # a prompt of two tokens, then one by one
        with torch.no_grad():
            output = model(**rest, **{main: part}, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return None
        steps.append(output[0])
    return torch.cat(steps, 1)


def decodes_alike(model: PreTrainedModel, inputs: Mapping[str, Tensor], tolerance: float) -> bool | None:
    """Whether a model gives the same from a cache as in one pass; None: it keeps none, or fails with one."""
    try:
        steps = decoded(model, inputs)
    except Exception:  # whatever the code of a model may raise that wants more than tokens
        return None
    if steps is None:
        return None
    row = {name: value[1:2] for name, value in inputs.items()}
    whole = run(model, row)[0]
    return whole.shape == steps.shape and distance({"output": steps}, {"output": whole}, {}) <= tolerance


def keeps_cache(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    takes_more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return "past_key_values" in parameters and ("use_cache" in parameters or takes_more)


def text_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a text with images or sounds, which come first, its words alone."""
    if set(inputs) <= {"input_ids", "attention_mask", "decoder_input_ids"} or "input_ids" not in inputs:
        return dict(inputs)
    return {"input_ids": inputs["input_ids"][:, -TOKENS:]}


REAL_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1  # of the norm; in half precision a router may choose otherwise


def unlike(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> str | None:
    """Which output of a real model is not what is wanted, by the norm at real tokens; None: all are."""
    for name, right in wanted.items():
        left, mask = outputs.get(name), inputs.get("attention_mask")
        if left is None or left.shape != right.shape:
            return f"{name} has another shape"
        if mask is not None and mask.shape == right.shape[:2]:
            left, right = left[mask.bool()], right[mask.bool()]
        tolerance = HALF_TOLERANCE if right.dtype in (torch.float16, torch.bfloat16) else REAL_TOLERANCE
        finite = right.isfinite()
        left, right = left[finite].double(), right[finite].double()
        apart = ((left - right).norm() / right.norm().clamp(min=1e-6)).item() if len(right) else 0.0
        if not apart <= tolerance:
            return f"{name} is {apart:.1e} off"
    return None


def distance(outputs: dict[str, Tensor], wanted: dict[str, Tensor], inputs: Mapping[str, Tensor]) -> float:
    """The largest difference at real tokens, as a part of the largest number of its tensor."""
    worst = 0.0
    for name, right in wanted.items():
        left, mask = outputs[name], inputs.get("attention_mask")
        if mask is not None and mask.shape == right.shape[:2]:
            left, right = left[mask.bool()], right[mask.bool()]
        finite = right.isfinite()
        if finite.any():
            left, right = left[finite].double(), right[finite].double()
            error = ((left - right).abs().max() / right.abs().max().clamp(min=1e-6)).item()
            worst = max(worst, error if error == error else float("inf"))
    return worst
