"""Are the weights of a model numbers that can be worked on: there, and floats?

check_floats(model, "Convert it first and quantise the result.")
"""

from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers leaves on a model that it loaded from quantised weights, and on its config.
MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "quantization_config", "_is_quantized")


def is_quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def quantization_method(holder: Any) -> Any:
    """What the `quantization_config` of a config or a quantiser names, usually a text; None where there is none."""
    config = getattr(holder, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def take_floats(model: Any) -> None:
    """Let a model that was loaded from a GGUF file be what it is.

    Where transformers has unpacked the file, the weights are plain floats, and the model is still marked as quantised,
    so that it can be neither trained nor saved. Here it loses these marks. Any other model stays as it is.
    """
    marked_by = (model.config, getattr(model, "hf_quantizer", None))
    if "gguf" not in map(quantization_method, marked_by):
        return
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        for part in (model, *(module for module in model.modules() if hasattr(module, "config"))):
            for marked in (vars(part), vars(part.config)):
                for mark in MARKS:
                    marked.pop(mark, None)


def check_floats(model: Any, advice: str) -> None:
    """UnsupportedModelError if the model is quantised: others work on floats; `advice` says what to do."""
    take_floats(model)
    if is_quantized(model):
        raise UnsupportedModelError(
            f"The model is quantised. {advice} From a GGUF file, load the unpacked weights: from_pretrained(..., "
            "gguf_file=..., quantization_config=GgufConfig(dequantize=True))."
        )


def check_has_weights(model: "PreTrainedModel") -> None:
    """UnsupportedModelError if a part has no values, as after `init_empty_weights` or with weights on a disk."""
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise UnsupportedModelError(
            f"{len(empty)} tensors of this {type(model).__name__} have no values (meta device), such as {empty[0]!r}. "
            "Load it whole first, without a device_map that leaves weights on a disk."
        )
