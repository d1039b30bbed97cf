"""Which modules of any model compute self-attention, and what of it converted attention would lose.

    inputs, expected = first_run(model)
    layers, reached = find_self_attentions(model, inputs, expected)

Nothing is known of the model beforehand. So one tiny forward runs through attention and mask functions of our own,
which write down who calls them with what, and its output must be the stock one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..attention.dispatch import NAME, efficient_attention_forward
from ..attention.masks import key_mask
from ..attention.variant import HeadShape
from ..errors import UnsupportedModelError
from ..models.interface import changed_interface
from .probe import Inputs, forward_names, run, run_steps, tiny_inputs

PROBE = f"{NAME}_probe"
TOLERANCE = 1e-3  # of the largest output; half precision: 50 times that


class SelfAttention(NamedTuple):
    """A module that computes self-attention.

    `like` is a query, for the device and dtype that it works with; `calls` how often one forward calls it;
    `is_causal`, whether it sees all tokens so far and no later ones.
    """

    module: nn.Module
    shape: HeadShape
    like: Tensor
    calls: int
    is_causal: bool


@dataclass
class _Recorder:
    """The attention and mask functions of one forward, which write down who calls them with what.

    A mask with a `local_size` belongs to a window or a chunk, of which attention must be told as well.
    """

    layers: dict[nn.Module, SelfAttention] = field(default_factory=dict)
    crossed: set[nn.Module] = field(default_factory=set)
    masks_are_local: bool = False
    knows_window: bool = False
    is_biased: bool = False

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        shape = HeadShape(query.shape[1], key.shape[1], query.shape[3])  # query [B, H, T, D], key [B, K, S, D]
        calls = self.layers[module].calls + 1 if module in self.layers else 1
        causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
        has_window = kwargs.get("sliding_window") is not None
        self.layers[module] = SelfAttention(module, shape, query.detach(), calls, causal and not has_window)
        if query.shape[2] != key.shape[2] or getattr(module, "is_cross_attention", False):
            self.crossed.add(module)
        self.knows_window |= has_window
        self.is_biased |= kwargs.get("position_bias") is not None
        return efficient_attention_forward(module, query, key, value, mask, **kwargs)

    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self.masks_are_local |= kwargs.get("local_size") is not None
        return key_mask(*args, **kwargs)


def first_run(model: PreTrainedModel) -> tuple[Inputs, Any]:
    """Inputs that the base model runs with, and its stock output; UnsupportedModelError if none can be made up."""
    problem: Exception | None = None
    for main_only in (True, False):
        try:
            inputs = tiny_inputs(model, main_only)
            if "input_ids" in inputs and "attention_mask" in forward_names(model):
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][:, 1] = 0  # what loses its padding must show; the first may be what is pooled
            return inputs, run(model, inputs)
        except Exception as error:
            problem = error
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be run with made-up inputs, so its attention cannot be found: {problem}"
    ) from problem


def find_self_attentions(
    model: PreTrainedModel, inputs: Inputs, expected: Any
) -> tuple[list[SelfAttention], set[nn.Module]]:
    """The modules that compute self-attention through the interface, in the order in which they are called; and all
    that call it.

    Raises:
        UnsupportedModelError: there are none, or their attention is more than converted attention has a place for.
    """
    recorder, name = _Recorder(), type(model).__name__
    try:
        with changed_interface():
            AttentionInterface.register(PROBE, recorder.attend)
            AttentionMaskInterface.register(PROBE, recorder.mask)
            use_attention(model, PROBE)
            output = run(model, inputs)
        layers = [layer for module, layer in recorder.layers.items() if module not in recorder.crossed]
        reached = set(recorder.layers)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} does not run with converted attention, most likely because its masks are more than padding and "
            f"causality. Models of this family cannot be converted. ({error})"
        ) from error
    finally:
        recorder.layers, recorder.crossed = {}, set()  # the registers keep the recorder, not the model
    if not layers:
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface, so there is nothing to convert (as DeBERTa, "
            "MPNet, BLOOM, Longformer and others)."
        )
    is_lost = recorder.is_biased or (recorder.masks_are_local and not recorder.knows_window)
    unlike = None if is_lost else _find_unlike(output, expected, inputs.get("attention_mask"))
    if is_lost or unlike is not None:
        raise UnsupportedModelError(
            f"The attention of {name} is more than softmax over the keys that are not padding: converted attention "
            f"has no place for its bias or its mask{f' ({unlike} would change)' if unlike else ''}. Models of this "
            "family cannot be converted."
        )
    return layers, reached


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention function in every config that a module reads it from: some models copy theirs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


def calls_interface(module: nn.Module) -> bool:
    """Its forward looks up transformers' attention functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def decodes_alike(model: PreTrainedModel, inputs: Inputs) -> bool:
    """True if the model gives the same token by token from a cache; False where it fails, or has none."""
    try:
        outputs = run_steps(model, inputs)
        return outputs is not None and _is_close(*outputs, None)
    except Exception:  # whatever the code of a model may raise that wants more than tokens
        return False


def _find_unlike(output: Any, expected: Any, mask: Tensor | None) -> str | None:
    """The name of a tensor of the output that is not as expected; None: all are."""
    tensors = _tensors(output)
    for name, tensor in _tensors(expected).items():
        other = tensors.get(name)
        if other is None or other.shape != tensor.shape or not _is_close(other, tensor, mask):
            return name
    return None


def _tensors(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The floating-point tensors of an output, however deep they lie, by their names."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.numel() else {}
    parts = output if isinstance(output, Mapping) else {}
    if isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    tensors = {}
    for key, value in parts.items():
        tensors |= _tensors(value, str(key) if name == "output" else f"{name}.{key}")
    return tensors


def _is_close(output: Tensor, expected: Tensor, mask: Tensor | None) -> bool:
    """Equal to rounding, at the tokens that are not padding and where a number is expected."""
    if mask is not None and mask.shape == expected.shape[:2]:
        output, expected = output[mask.bool()], expected[mask.bool()]
    dtype, finite = expected.dtype, expected.isfinite()
    if not finite.any():
        return True
    output, expected = output[finite].double(), expected[finite].double()
    tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else 50 * TOLERANCE
    return bool((output - expected).abs().max() <= tolerance * expected.abs().max())
