"""What else belongs to single heads, beside the projections: parameters by their shapes, and arguments that a model
makes for the heads of all layers at once.

    next(with_head_parts(layer, attention, heads=4, dim=8)).head_parts       # {"relative_bias.weight": 1}
    with_shared(run, attention, heads=4).shared                              # ("position_bias",)

A size may be that of the heads by chance: the proof on the tiny model, and the real one with other sizes, tell.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..family import Attention
from ..groups import inside
from ..linears import output_dim
from .observe import LayerRun, is_same


def with_head_parts(layer: nn.Module, attention: Attention, heads: int, dim: int) -> Iterator[Attention]:
    """The attention with the parameters that may have rows for each head: those with as many as there are heads, or
    that stand in the module itself and are as wide as all heads; then also linears as wide as all heads; then none."""
    module = layer.get_submodule(attention.module)
    known = {attention.query, attention.key, attention.value, attention.output, *attention.gates}
    sure: dict[str, int] = {}
    wide: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        place = name.rpartition(".")[0]
        if inside(attention.module, place) in known:
            continue
        of_heads = [i for i, size in enumerate(parameter.shape) if size == heads]
        of_all = [i for i, size in enumerate(parameter.shape) if size == heads * dim]
        holder = module.get_submodule(place)
        if len(of_heads) == 1:
            sure[name] = of_heads[0]
        elif not of_heads and not place and len(of_all) == 1:
            sure[name] = of_all[0]
        elif isinstance(holder, nn.Linear | Conv1D):
            rows = output_dim(holder) if parameter.ndim == 2 else 0
            wide |= {name: rows} if parameter.shape[rows] == heads * dim else {}
    for parts in (sure, sure | wide, {}) if wide else (sure, {}):
        dims = tuple(parts.values()) if any(parts.values()) else ()
        yield replace(attention, per_head=tuple(parts), per_head_dims=dims)


def without_part(attention: Attention, name: str) -> Attention:
    """The same without one of these parameters."""
    parts = {part: dim for part, dim in attention.head_parts.items() if part != name}
    return replace(attention, per_head=tuple(parts), per_head_dims=tuple(parts.values()))


def with_shared(layer: LayerRun, attention: Attention, heads: int) -> Attention:
    """The attention with the arguments of its module, beside the states, that have a dimension of its heads: one of as
    many, or the first with those of the whole batch."""
    module = layer.layer.get_submodule(attention.module)
    given: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.update(dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        layer.run()
    finally:
        handle.remove()
    batch, states = len(layer.states), layer.base.inputs[attention.query]
    found = {}
    for name, value in given.items():
        is_bias = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        if is_bias and not is_same(value, states):
            sizes = enumerate(value.shape[:-1])
            dims = [i for i, size in sizes if size == heads or (i == 0 and size == batch * heads)]
            found |= {name: dims[0]} if len(dims) == 1 else {}
    return replace(attention, shared=tuple(found), shared_dims=tuple(found.values()))
