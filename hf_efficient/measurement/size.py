"""Size of a model and cost of one forward: parameters, bytes, MACs, peak memory.

    inputs = dummy_inputs(model, batch_size=1, sequence_length=512)
    measure_size(model, inputs).macs

*Parameters*: each tensor once, however often it is shared. An embedding parameter is a weight of a
`torch.nn.Embedding`, that is a lookup table (words, learned positions, token types, T5's relative bias); a head tied
to it is the same tensor and counted there. Everything else is non-embedding: ViT's patch projection, untied heads.

*MACs*: half the FLOPs that `torch.utils.flop_counter.FlopCounterMode` sees: matrix products, convolutions and
attention (T * S * D for scores and as much for values; masks and causality not subtracted). Sums, norms, softmax,
biases and FFTs are not counted. Products of 8-bit integers count like any other.

*Peak memory*: bytes of the weights plus the largest amount that PyTorch's allocator held at any moment of the forward
over what it held before (CPU: the profiler's allocation events, so it is exact and repeats; CUDA:
`torch.cuda.max_memory_allocated`). The inputs, the Python process and libraries' own buffers are not in it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import CheckpointError
from ..models.modes import evaluating, synchronize
from ..reporting.schema import Size


def count_parameters(model: torch.nn.Module) -> tuple[int, int, int]:
    """(all, in lookup tables, not zero)."""
    parameters = list(model.parameters())  # each shared tensor once; of quantised ones, their numbers of 8 or 4 bits
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return (
        sum(p.numel() for p in parameters),
        sum(weight.numel() for weight in tables.values()),
        sum(int(torch.count_nonzero(stored(p)[0])) for p in parameters),
    )


def stored(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter consists of: itself, or the numbers (first) and scales of a quantised one."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [tensor for name in names for tensor in stored(getattr(parameter, name))]


def count_weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters as loaded, each shared tensor once: what a checkpoint holds but for its header."""
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in stored(p))


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of the weight files that `from_pretrained` would read from the folder; CheckpointError if it has none."""
    folder = Path(folder)
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = list(folder.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    raise CheckpointError(f"No weights (*.safetensors) in {folder}. Save the model there first.")


def count_macs(model: torch.nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of `model(**inputs)`; works on the meta device too."""
    # Torch counts its CUDA attention kernels but not the CPU one: without this, attention would be free on a CPU.
    mapping = {  # of shapes
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
            sdpa_flop_count(query, key, value)
        ),
        torch.ops.aten._int_mm: lambda left, right, *_, **__: 2 * left[0] * left[1] * right[1],
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with evaluating(model), parametrize.cached():
        for module in model.modules():  # the counter fails at weights that are computed, such as those of weight_norm
            for name in module.parametrizations if parametrize.is_parametrized(module) else ():
                getattr(module, name)
        with counter:
            model(**inputs)
    return counter.get_total_flops() // 2


def peak_memory_bytes(model: torch.nn.Module, inputs: Mapping[str, Any]) -> int:
    """Weights plus the peak of what one forward allocates (the module docstring says how)."""
    with evaluating(model):
        model(**inputs)  # lazily made buffers and workspaces are not the forward's own
        device = next(model.parameters()).device
        peak = _cuda_peak(model, inputs, device) if device.type == "cuda" else _cpu_peak(model, inputs)
    return count_weight_bytes(model) + peak


def _cuda_peak(model: torch.nn.Module, inputs: Mapping[str, Any], device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(**inputs)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(model: torch.nn.Module, inputs: Mapping[str, Any]) -> int:
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler writes its own start and stop to the user's terminal
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            output = model(**inputs)
    finally:
        os.environ.pop("KINETO_LOG_LEVEL")
        if level is not None:
            os.environ["KINETO_LOG_LEVEL"] = level
    del output
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure_size(model: torch.nn.Module, inputs: Mapping[str, Any], folder: str | Path | None = None) -> Size:
    """All of it for one forward of `inputs`; bytes on disk if the model lies in `folder`."""
    parameters, embedding, nonzero = count_parameters(model)
    return Size(
        parameters=parameters,
        embedding_parameters=embedding,
        nonzero_parameters=nonzero,
        weight_bytes=count_weight_bytes(model),
        macs=count_macs(model, inputs),
        peak_memory_bytes=peak_memory_bytes(model, inputs),
        bytes_on_disk=None if folder is None else bytes_on_disk(folder),
    )
