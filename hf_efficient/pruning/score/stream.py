"""The hidden states that flow through the layers of one stack, layer by layer, for all calibration batches at once.

    stream = Stream(model, "encoder", batches)
    stream.inputs(0, blocks, "output.dense")     # what a linear of layer 0 reads, batch by batch
    stream.advance(0)                            # on to layer 1

Each layer is called with the arguments (masks, positions, encoder states) that the model itself gives it.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import DataError, HfEfficientError, shown
from ...models.anatomy import Anatomy
from ...models.token_masks import real_inputs

Batch = Mapping[str, torch.Tensor]


class Block(NamedTuple):
    """An attention or an FFN: the paths in a layer of the linear that reads first and of the one that writes."""

    reads: str
    writes: str


class Reached(Exception):
    """Ends a forward at the module it was run for."""


class Stream:
    """The stream of one stack; `states` are those that the next layer reads."""

    def __init__(self, anatomy: Anatomy, stack: str, batches: Sequence[Batch]):
        self.layers, self.norm = anatomy.stack(stack).layers, anatomy.family.norm
        self._calls: list[list[tuple[tuple, dict]]] = [[] for _ in self.layers]
        self.states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(self._recorder(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            for batch in batches:
                forward(anatomy.model, batch)
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

    def inputs(self, index: int, blocks: Sequence[Block], writes: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the linear `writes` of a layer reads, and the residual that its output is added to, batch by batch; the
        rest of the layer is not computed. `blocks` are those of the layer."""
        for number in range(len(self.states)):
            seen = _Seen(self.layers[index], blocks, self.norm, self.states[number], stop=writes)
            with contextlib.suppress(Reached), seen:
                self._call(index, number)
            yield seen.read, seen.residuals[writes]

    def advance(self, index: int, blocks: Sequence[Block] = ()) -> dict[str, list[torch.Tensor]]:
        """Through one layer; returns for each block the sum of its output and its residual, batch by batch."""
        sums: dict[str, Any] = {block.writes: self._kept(block.writes) for block in blocks}
        for number, states in enumerate(self.states):
            with _Seen(self.layers[index], blocks, self.norm, states) as seen:
                self.states[number] = self._call(index, number)
            for path, by_batch in sums.items():
                by_batch.append(seen.residuals[path] + seen.outputs[path])
        return sums

    def _kept(self, path: str) -> Any:
        """Where the sums of a block are gathered, batch by batch."""
        return []

    def _call(self, index: int, number: int) -> torch.Tensor:
        args, kwargs = self._calls[index][number]
        output = self.layers[index](self.states[number], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Seen:
    """What the blocks of a layer read, give, and add to, in one call of the layer on `states`.

    Post-norm: a block's residual is what it reads. Pre-norm: `states` and all that the blocks before it gave. Where
    neither is so it is unknown, and zero here.
    """

    def __init__(
        self,
        layer: nn.Module,
        blocks: Sequence[Block],
        norm: str | None,
        states: torch.Tensor,
        stop: str | None = None,
    ):
        self.layer, self.blocks, self.norm, self.stop = layer, blocks, norm, stop
        self.sum = states if norm == "pre" else torch.zeros_like(states)
        self.residuals: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "_Seen":
        for block in self.blocks:
            first, last = (self.layer.get_submodule(path) for path in block)
            enter, write, leave = (partial(step, block.writes) for step in (self._enter, self._write, self._leave))
            self._hooks.callback(first.register_forward_pre_hook(enter).remove)
            self._hooks.callback(last.register_forward_pre_hook(write).remove)
            self._hooks.callback(last.register_forward_hook(leave).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _enter(self, path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.residuals[path] = self._by_token(args[0]) if self.norm == "post" else self.sum

    def _write(self, path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if path == self.stop:
            self.read = self._by_token(args[0])
            raise Reached

    def _leave(self, path: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.outputs[path] = self._by_token(output)
        if self.norm == "pre":
            self.sum = self.sum + self.outputs[path]

    def _by_token(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, numbers]`, also where the layer lays the tokens of all rows one after another (OPT)."""
        return tensor.reshape(*self.sum.shape[:-1], tensor.shape[-1])


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
