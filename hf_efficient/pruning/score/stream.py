"""The hidden states that flow through the layers of one stack, layer by layer, for all calibration batches at once.

    stream = Stream(model, "encoder", batches)
    stream.inputs(0, blocks, "output.dense")     # what a linear of layer 0 reads, batch by batch
    stream.advance(0)                            # on to layer 1

Each layer is called with the arguments (masks, positions, encoder states) that the model itself gives it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.anatomy import Anatomy
from .handing import Batch, Call, Layers, NotAlone, Reached, find_layers, forward, run_layer, watching


class Block(NamedTuple):
    """An attention or an FFN: the paths in a layer of the linear that reads first and of the one that writes."""

    reads: str
    writes: str


class Stream:
    """The stream of one stack; `states` are those that the next layer reads."""

    def __init__(self, anatomy: Anatomy, stack: str, batches: Sequence[Batch]):
        self.layers, self.norm = anatomy.stack(stack).layers, anatomy.family.norm
        self._calls: list[list[Call]] = []  # of each batch
        self.states: list[torch.Tensor] = []
        alone: Layers | None = None
        for number, batch in enumerate(batches):
            if alone is not None:  # so no layer needs to be run to know what they are given
                states, calls = alone.record(batch)
                self.states.append(states)
                self._calls.append(calls)
                continue
            with watching(self.layers) as seen:
                forward(anatomy.model, batch)
            self.states += seen.states
            self._calls.append(seen.calls)
            if number == 0 and len(batches) > 1:
                with contextlib.suppress(NotAlone):
                    alone = find_layers(anatomy.model, self.layers, batch, seen)

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
        return run_layer(self.layers[index], self.states[number], self._calls[number][index])


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
