"""The layers of a model as functions of their own: what the model gives them beside their states, and what it makes
of the states that the last one gave.

    layers = Layers(model, stack, gives)
    first, calls = layers.record(batch)             # no layer is computed
    states = layers.call(3, states, calls[3])
    scalar = layers.finish(batch, states, loss)     # norm and head alone

A layer's other arguments (masks, positions) are those that the model itself makes while its layers hand on what they
get. That holds where they do not depend on what layers give, and is proven on a tiny model first (`proof`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..score.calibration import Loss
from ..score.layers import hand_back, states_in
from ..score.stream import Batch, Reached, forward

Call = tuple[tuple, dict]  # the arguments of a layer behind its states


class Layers:
    """The layers of one stack of a model.

    Parameters:
        gives: where among its arguments a layer finds what it gives beside its states; [] if it gives a tensor.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], gives: list[int | str]):
        self.model, self.layers, self.gives = model, list(layers), gives

    def record(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The states that the first layer reads, and what each layer is given beside them."""
        calls: list[Call] = []
        first: list[Tensor] = []

        def note(index: int, args: tuple, kwargs: dict) -> Any:
            if index != len(calls):
                raise NotInOrder
            first.append(states_in(args, kwargs))
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
            if len(calls) == len(self.layers):
                raise Reached
            return hand_back(self.gives, args, kwargs)

        with suppress(Reached), self._instead(note), torch.no_grad():
            forward(self.model, batch)
        if len(calls) != len(self.layers):
            raise NotInOrder
        return first[0], calls

    def call(self, index: int, states: Tensor, call: Call) -> Tensor:
        args, kwargs = call
        output = self.layers[index](states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def finish(self, batch: Batch, states: Tensor, loss: Loss) -> Tensor:
        """`loss(model, batch)` where the last layer gives these states."""
        last = len(self.layers) - 1

        def instead(index: int, args: tuple, kwargs: dict) -> Any:
            given = hand_back(self.gives, args, kwargs)
            if index < last:
                return given
            return (states, *given[1:]) if isinstance(given, tuple) else states

        with self._instead(instead):
            return loss(self.model, batch)

    @contextmanager
    def _instead(self, function: Callable[[int, tuple, dict], Any]) -> Iterator[None]:
        """No layer is computed: `function(index, args, kwargs)` gives what it would."""

        def patched(index: int) -> Callable:
            return lambda *args, **kwargs: function(index, args, kwargs)

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = patched(index)
            yield
        finally:
            for layer in self.layers:
                vars(layer).pop("forward", None)


class NotInOrder(Exception):
    """The layers are not called one after the other, each once."""
