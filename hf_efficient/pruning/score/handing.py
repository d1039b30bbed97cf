"""One forward of a model, and its layers as functions of their own: what the model gives them beside their states, and
what it makes of the states that the last one gave.

    layers = find_layers(model, stack, seen)        # or NotAlone: what was seen in a forward says that they cannot
    first, calls = layers.record(batch)             # no layer is computed
    states = layers.call(3, states, calls[3])
    scalar = layers.finish(batch, states, loss)     # norm and head alone

A layer's other arguments (masks, positions) are those that the model itself makes while its layers hand on what they
get. That holds where they do not depend on what layers give: `find_layers` compares them with those of a forward.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ...errors import DataError, HfEfficientError, shown
from ...models.token_masks import real_inputs

Batch = Mapping[str, torch.Tensor]
Call = tuple[tuple, dict]  # the arguments of a layer behind its states
NOWHERE = ""  # the place of None among the arguments


class Reached(Exception):
    """Ends a forward at the module it was run for."""


class NotAlone(Exception):
    """Why layers cannot be run one by one."""


def forward(model: PreTrainedModel, batch: Batch):
    """The model's answer to one batch, without a cache of keys and values."""
    inputs = real_inputs({key: value.to(model.device) for key, value in batch.items()}, model)
    options = {"return_dict": True} | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})
    known = inspect.signature(model.forward).parameters  # a model of one's own may know neither
    if not any(one.kind is one.VAR_KEYWORD for one in known.values()):
        options = {name: value for name, value in options.items() if name in known}
    try:
        return model(**inputs, **options)
    except HfEfficientError:
        raise
    except (IndexError, TypeError, ValueError) as error:  # what no check of names, sizes and ranges foresees
        sizes = {key: list(value.shape) for key, value in batch.items()}
        raise DataError(f"{type(model).__name__} cannot read the calibration batch {shown(sizes)}: {error}") from error


@dataclass
class Seen:
    """What the layers of a stack were given in a forward, and what they gave, call by call."""

    states: list[Tensor] = field(default_factory=list)  # that the first layer read
    calls: list[Call] = field(default_factory=list)
    gives: list[list[int | str] | None] = field(default_factory=list)  # None: it makes something of its own


@contextmanager
def watching(layers: Sequence[nn.Module]) -> Iterator[Seen]:
    """`Seen`, filled by the forward that is made within."""
    seen = Seen()

    def enter(index: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if index == 0:
            seen.states.append(states_in(args, kwargs))
        seen.calls.append(beside_states(args, kwargs))

    def leave(layer: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        others = list(output[1:]) if isinstance(output, tuple) else []
        found = find_places(others, dict(enumerate(args)) | kwargs)
        seen.gives.append(found if isinstance(output, Tensor) or others else None)

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
        yield seen


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
                raise NotAlone("they are not called one after the other")
            first.append(states_in(args, kwargs))
            calls.append(beside_states(args, kwargs))
            if len(calls) == len(self.layers):
                raise Reached
            return hand_back(self.gives, args, kwargs)

        with suppress(Reached), instead(self.layers, note), torch.no_grad():
            forward(self.model, batch)
        if len(calls) != len(self.layers):
            raise NotAlone("they are not called once each")
        return first[0], calls

    def call(self, index: int, states: Tensor, call: Call) -> Tensor:
        return run_layer(self.layers[index], states, call)

    def finish(self, batch: Batch, states: Tensor, loss: Callable[[PreTrainedModel, Batch], Tensor]) -> Tensor:
        """`loss(model, batch)` where the last layer gives these states."""
        last = len(self.layers) - 1

        def given(index: int, args: tuple, kwargs: dict) -> Any:
            handed = hand_back(self.gives, args, kwargs)
            if index < last:
                return handed
            return (states, *handed[1:]) if isinstance(handed, tuple) else states

        with instead(self.layers, given):
            return loss(self.model, batch)


def find_layers(model: PreTrainedModel, layers: Sequence[nn.Module], batch: Batch, seen: Seen) -> Layers:
    """The layers, which in a forward of this batch were `seen`.

    Raises:
        NotAlone: what one is given depends on what others give.
    """
    if len(seen.calls) != len(layers):
        raise NotAlone("they are not called once each")
    if any(one is None or one != seen.gives[0] for one in seen.gives):
        raise NotAlone("a layer makes something for those behind it")
    found = Layers(model, layers, seen.gives[0] or [])
    _, recorded = found.record(batch)
    for before, after in zip(seen.calls, recorded, strict=True):
        one, other = tree_leaves(before), tree_leaves(after)
        if len(one) != len(other) or not all(map(_same, one, other)):
            raise NotAlone("what a layer is given depends on those before it")
    return found


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and (not isinstance(one, bool | int | float | str) or one == other)


@contextmanager
def instead(layers: Sequence[nn.Module], function: Callable[[int, tuple, dict], Any]) -> Iterator[None]:
    """No layer is computed: `function(index, args, kwargs)` gives what it would."""

    def patched(index: int) -> Callable:
        return lambda *args, **kwargs: function(index, args, kwargs)

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            before = vars(layer).get("forward")  # accelerate puts one there too
            undo.callback(*((setattr, layer, "forward", before) if before else (delattr, layer, "forward")))
            layer.forward = patched(index)
        yield


def run_layer(layer: nn.Module, states: Tensor, call: Call) -> Tensor:
    args, kwargs = call
    output = layer(states, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def states_in(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def beside_states(args: tuple, kwargs: dict) -> Call:
    return args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}


def find_places(others: Sequence, arguments: Mapping[int | str, object]) -> list[int | str] | None:
    """Where among its arguments a layer found what it gives beside its states; None: it made some of it."""
    places: list[int | str] = []
    for other in others:
        matches = [NOWHERE] if other is None else [place for place, value in arguments.items() if value is other]
        if not matches:
            return None
        places += matches[:1]
    return places


def hand_back(places: Sequence[int | str], args: tuple, kwargs: dict) -> Tensor | tuple:
    """What a layer gives that does nothing: its states, and beside them what it finds at these places."""
    arguments = dict(enumerate(args)) | kwargs
    states = states_in(args, kwargs)
    return (states, *(arguments.get(place) for place in places)) if places else states
