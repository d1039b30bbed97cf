"""Weights of 8 or 4 bits by torchao, in a checkpoint that transformers reloads.

    small = quantize(model, "int8_dynamic")
    small.save_pretrained("out/int8")          # AutoModel.from_pretrained("out/int8") needs torchao installed

| method | weights | activations |
|---|---|---|
| `int8_dynamic` | 8 bits, one scale per output | 8 bits, one scale per token, found while it runs |
| `int8` | 8 bits, one scale per output | as they are |
| `int4` | 4 bits, one scale per `group_size` inputs | as they are |

Linear layers only; embeddings and the output head of a language model stay. On a CPU the checkpoint gets smaller, the
forward rarely faster: PyTorch has few integer kernels there, and keeps 4 bits in bytes. `export(..., quantize="int8")`
is the way to speed on a CPU.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, unknown_name
from ..models.checks import check_floats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..pruning.config import PruningConfig

METHODS = ("int8_dynamic", "int8", "int4")


def quantize(model: "PreTrainedModel", method: str = "int8_dynamic", *, group_size: int = 32) -> "PreTrainedModel":
    """A copy of `model` with quantised linears, in eval mode.

    Parameters:
        method: one of `METHODS`.
        group_size: inputs that share a scale, for `int4`; must divide the inputs of every linear.

    Raises:
        ConfigError: an unknown method, torchao is missing, or a linear whose inputs the groups do not divide.
        UnsupportedModelError: the model is quantised already.
    """
    from ..models.loading import load_model

    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    check_torchao()
    check_floats(model, "Quantise the one it was made of.")
    if method == "int4":
        check_groups(model, group_size)
    import torch
    import torchao.quantization as ao
    import transformers

    types: dict[str, Callable[[], Any]] = {
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "int8": ao.Int8WeightOnlyConfig,
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(group_size)),
    }
    with tempfile.TemporaryDirectory() as folder:  # transformers quantises what it loads, and nothing else
        model.save_pretrained(Path(folder))
        config = transformers.TorchAoConfig(types[method]())
        return load_model(type(model), folder, quantization_config=config).eval()


def check_torchao() -> None:
    """Before any long work: ConfigError if torchao is not installed."""
    if find_spec("torchao") is None:
        raise ConfigError('Quantisation needs torchao. Run `pip install "hf-efficient[quant]"`.')


def check_pruned_groups(model: "PreTrainedModel", prunings: "Sequence[PruningConfig]", group_size: int) -> None:
    """ConfigError, with what to set, unless the groups will surely divide the inputs of every linear after pruning;
    `model` may be on the meta device."""
    import torch

    from ..models.anatomy import Anatomy
    from ..models.groups import output_module

    check_groups(model, group_size)
    for pruning, group in itertools.product(prunings, Anatomy.of(model).groups):
        linear, width = output_module(model, group.members[0]), group.members[0].output.width
        if group.kind not in pruning.unit_kinds or not isinstance(linear, torch.nn.Linear):
            continue
        if group.is_neurons and pruning.round_to % group_size:
            raise ConfigError(
                f"Pruning with round_to={pruning.round_to} may leave a number of neurons that group_size={group_size} "
                f"of int4 does not divide. Set round_to to {math.lcm(pruning.round_to, group_size)}, or quantise with "
                "method int8."
            )
        if not group.is_neurons and width % group_size:
            raise ConfigError(
                f"Pruning heads, of {width} inputs each, may leave a number of inputs that group_size={group_size} of "
                f"int4 does not divide. Set group_size to {math.gcd(width, group_size)}, leave head out of "
                "granularity, or quantise with method int8."
            )


def check_groups(model: "PreTrainedModel", group_size: int) -> None:
    """Raises ConfigError where the groups do not divide the inputs of a linear."""
    import torch

    if type(group_size) is not int or group_size < 1:
        raise ConfigError(f"group_size must be a positive integer, got {group_size!r}.")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % group_size:
            raise ConfigError(
                f"group_size={group_size} does not divide the {module.in_features} inputs of {name}. Prune with "
                f"round_to={group_size}, or choose a smaller power of 2, or method 'int8'."
            )
