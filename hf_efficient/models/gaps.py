"""Layers that leave a gap: removed, while those behind them keep their places.

Some models know a layer by its place: every second window of Swin is shifted, LLaVA reads the last layer but one,
other models add the states of layers 5 and 11 to a text, or build the last layer unlike the rest. There a layer that
leaves has an empty one in its place, without weights, which hands on what it is given: to cut is to skip.

    leave_gaps(model.encoder.layers, (0, 2), 0)          # layer 1 is empty now
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

TENSOR = 0  # what a layer gives: a tensor, or else a tuple of so many entries of which the first is one


def leave_gaps(layers: nn.ModuleList, places: Sequence[int], gives: int) -> None:
    """Empty the layers that are not at these places; those of a stack give a tensor, or a tuple of `gives` things."""
    for place, layer in enumerate(layers):
        if place not in places:
            for held in (layer._modules, layer._parameters, layer._buffers):
                held.clear()
            layer.__class__ = _emptied(type(layer))
            layer.gives = gives


def states_of(args: tuple, kwargs: dict) -> Tensor:
    """What a layer is given to change: the first numbers."""
    return next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point())


class EmptyLayer(nn.Module):
    """A layer that hands on what it is given. It keeps the plain attributes of the one in whose place it is, such as
    the kind of its attention, by which models choose a mask."""

    gives: int
    _is_hf_initialized = True  # transformers would give values to what its class has and it has not

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = states_of(args, kwargs)
        return states if self.gives == TENSOR else (states, *[None] * (self.gives - 1))


@cache
def _emptied(kind: type[nn.Module]) -> type[nn.Module]:
    """Of the same class, by which transformers records hidden states, and by the same name."""
    return type(kind.__name__, (EmptyLayer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
