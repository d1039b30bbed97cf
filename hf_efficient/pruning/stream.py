"""The hidden states that flow through the layers of one stack, layer by layer, for all calibration batches at once.

    stream = Stream(model, "encoder", batches)
    stream.inputs(0, "output.dense")     # what a linear of layer 0 reads, batch by batch
    stream.advance(0)                    # on to layer 1

Each layer is called with the arguments (masks, positions, encoder states) that the model itself gives it.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families import find_stacks

Batch = Mapping[str, torch.Tensor]


class _Reached(Exception):
    """Ends a forward at the module it was run for."""


class Stream:
    """The stream of one stack; `states` are those that the next layer reads."""

    def __init__(self, model: PreTrainedModel, stack: str, batches: Sequence[Batch]):
        self.layers = next(layers for found, layers in find_stacks(model) if found.name == stack)
        self._calls: list[list[tuple[tuple, dict]]] = [[] for _ in self.layers]
        self.states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(self._recorder(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            for batch in batches:
                forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, index: int):
        def record(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            states, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if index == 0:
                self.states.append(states)
            self._calls[index].append((args, {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        return record

    def inputs(self, index: int, path: str) -> Iterator[torch.Tensor]:
        """What the module at `path` in a layer reads; the rest of the layer is not computed."""
        caught: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        module = self.layers[index].get_submodule(path)
        for number in range(len(self.states)):
            handle = module.register_forward_pre_hook(stop)
            try:
                self._call(index, number)
            except _Reached:
                pass
            finally:
                handle.remove()
            yield caught.pop()

    def advance(self, index: int, watch: Sequence[str] = ()) -> dict[str, list[torch.Tensor]]:
        """Through one layer; returns what the modules at the paths in `watch` gave, batch by batch."""
        seen: dict[str, list[torch.Tensor]] = {path: [] for path in watch}
        hooks = [
            self.layers[index]
            .get_submodule(path)
            .register_forward_hook(lambda module, args, output, path=path: seen[path].append(output))
            for path in watch
        ]
        try:
            self.states = [self._call(index, number) for number in range(len(self.states))]
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _call(self, index: int, number: int) -> torch.Tensor:
        args, kwargs = self._calls[index][number]
        output = self.layers[index](self.states[number], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def forward(model: PreTrainedModel, batch: Batch):
    """The model's answer to one batch, without a cache of keys and values."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    without = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(**inputs, **without, return_dict=True)
