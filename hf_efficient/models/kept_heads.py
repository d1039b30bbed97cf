"""What a model makes once for the heads of all its layers, and what a layer with fewer heads takes of it.

MPNet makes one position bias `[B, H, T, T]`, BLOOM the slopes of ALiBi `[B * H, 1, S]`, and hands them to every layer.
A layer that was pruned to the heads 0, 2 and 3 takes those of these three:

    keep_heads(layer.attention, Attention("attention", shared=("position_bias",), shared_dims=(1,)), (0, 2, 3), 4)
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Attention


def keep_heads(module: nn.Module, attention: Attention, kept: Sequence[int], heads: int) -> None:
    """From now on the module is given the part of its shared arguments that belongs to these of `heads` heads."""
    names = list(inspect.signature(module.forward).parameters)
    dims = zip(attention.shared, attention.shared_dims, strict=True)
    shared = {name: (names.index(name) if name in names else len(names), dim) for name, dim in dims}
    module.register_forward_pre_hook(partial(_with_kept, shared, tuple(kept), heads), with_kwargs=True)


def _with_kept(
    shared: dict[str, tuple[int, int]], kept: tuple[int, ...], heads: int, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = list(args), dict(kwargs)
    for name, (place, dim) in shared.items():
        if name in kwargs:
            kwargs[name] = of_heads(kwargs[name], dim, kept, heads)
        elif place < len(args):
            args[place] = of_heads(args[place], dim, kept, heads)
    return tuple(args), kwargs


def of_heads(given: Any, dim: int, kept: Sequence[int], heads: int) -> Any:
    """The part of a tensor that belongs to these of its heads; in its dimension `dim` it has all heads of one row of
    the batch after another. What is no tensor, or the same for all heads, stays."""
    if not isinstance(given, Tensor) or given.shape[dim] == 1:
        return given
    # [..., B * H, ...] -> [..., B, H, ...] -> [..., B * kept, ...]
    index = torch.tensor(kept, device=given.device)
    return given.unflatten(dim, (-1, heads)).index_select(dim + 1, index).flatten(dim, dim + 1)
