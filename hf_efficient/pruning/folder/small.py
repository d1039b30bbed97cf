"""The pruned model, written layer by layer: cut, fitted to the dense stream, saved, and the next one.

    small = SmallModel(dense, plan, target)
    small.write(fits=True)                 # shards in `target`, as save_pretrained would name them

Each layer is a file of its own. One that is there is finished: the states that the next layer reads lie on the shelf.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...io.tensors import write_tensors
from ...models.anatomy import Anatomy
from ...models.classes import block_of, stock_config
from ...models.cutting import cut_layers, cut_units
from ...models.on_disk import put, skeleton
from ...models.rebuild import class_for
from ...models.registry import is_known, remember
from ...models.shards import in_portions, shard_paths, write_beside
from ..cut.surgery import kept_layers, planned_config
from ..fit.reconstruction import find_blocks, fit_layer
from ..plan import PruningPlan
from ..score.handing import Layers
from ..score.stream import Stream
from .dense import Calls, DenseModel
from .shelf import Kept, Shelf, States


class StoredStream(Stream):
    """A stream whose states lie on a shelf, before each layer and behind it."""

    def __init__(self, layers: Layers, norm: str | None, states: States, calls: Calls, shelf: Shelf):
        self.one_by_one, self.layers, self.norm = layers, layers.layers, norm
        self.states, self.calls, self.shelf = states, calls, shelf

    def at(self, index: int) -> "StoredStream":
        return StoredStream(self.one_by_one, self.norm, self.states.at(index), self.calls, self.shelf)

    def _kept(self, path: str) -> Any:
        return Kept(self.shelf, f"sums.{path}")

    def _call(self, index: int, number: int) -> Tensor:
        return self.one_by_one.call(index, self.states[number], self.calls.get(index, number))


class SmallModel:
    """What a plan leaves of a model on the disk.

    Parameters:
        target: an own folder, where files that are there were written by an equal call.
    """

    def __init__(self, dense: DenseModel, plan: PruningPlan, target: Path):
        self.dense, self.plan, self.target = dense, plan, target
        stored, anatomy = dense.stored, dense.anatomy
        config = planned_config(anatomy, plan)
        config = stock_config(config) if block_of(config).is_trivial() else config
        self.model = skeleton(class_for(stored.model, config), config, stored.model.dtype)
        if stored.model.can_generate():
            self.model.generation_config = stored.model.generation_config
        if not is_known(self.model.config) and not any(ffn.num_neurons for ffn in dense.stack.ffns.values()):
            remember(self.model.config, anatomy.family)
        self.anatomy = Anatomy.of(self.model)
        self.kept = kept_layers(dense.stack, plan)

    @torch.no_grad()
    def write(self, fits: bool) -> None:
        """All files of the checkpoint; those that are there already stay."""
        portions = in_portions(self.dense.stored, self.dense.outside())
        shards = shard_paths(self.target, len(portions) + len(self.kept))
        for shard, names in zip(shards, portions, strict=False):
            if not shard.is_file():
                write_tensors(shard, {name: self.dense.stored.read(name) for name in names})
        stream = self._start(shards[-1]) if fits else None
        for index, shard in enumerate(shards[len(portions) :]):
            if not shard.is_file():
                write_tensors(shard, self._layer(index, stream))
            if stream is not None:
                stream.states.at(index).drop()
        write_beside(self.model, self.dense.stored.folder, self.target, shards)

    def _start(self, last: Path) -> StoredStream | None:
        """The stream of the small model before its first layer; None if all layers are written."""
        if last.is_file():
            return None
        dense = self.dense
        layers = Layers(self.model, self.anatomy.stacks[0].layers, dense.layers.gives)
        states = States(dense.shelf, "pruned", len(dense.batches))
        stream = StoredStream(
            layers, self.anatomy.family.norm, states, Calls(dense.shelf, "pruned-calls"), dense.shelf
        )
        before = dense.before_layers()
        for name in before:
            self._put(name, dense.stored.read(name))
        for number, batch in enumerate(dense.batches):
            first, calls = layers.record(batch)
            states.put(number, first)
            stream.calls.append(calls)
        for name in before:
            self._put(name, torch.empty(dense.stored.tensors[name].shape, dtype=self.model.dtype, device="meta"))
        return stream

    def _put(self, name: str, tensor: Tensor) -> None:
        for one in (name, *self.dense.stored.aliases.get(name, ())):
            put(self.model, one, tensor)

    def _layer(self, index: int, stream: StoredStream | None) -> dict[str, Tensor]:
        """One finished layer; with a stream it is fitted to the dense one first, and the stream goes on behind it."""
        origin = self.kept[index]
        if stream is None:
            return self._cut(origin)
        dense = self.dense
        blocks = find_blocks(dense.stack, origin)
        whole = StoredStream(dense.layers, dense.anatomy.family.norm, dense.states, dense.calls, dense.shelf)
        with dense.layer(origin):
            sums = whole.at(origin).advance(origin, blocks)
        state = self._cut(origin)
        for name, tensor in state.items():
            put(self.model, name, tensor)
        here = stream.at(index)
        fit_layer(here, index, blocks, sums, dense.weights(origin), dense.stack.layer_prefix(origin))
        here.advance(index)
        dense.shelf.drop("sums.")
        fitted = self.model.state_dict()
        finished = {name: fitted[name] for name in state}
        for name in state:
            put(self.model, name, torch.empty_like(finished[name], device="meta"))
        return finished

    def _cut(self, origin: int) -> dict[str, Tensor]:
        """What is left of a layer of the dense model, by its names in the small one."""
        stored, stack = self.dense.stored, self.dense.stack
        state = {name: stored.read(name) for name in stored.names(f"{stack.layer_prefix(origin)}.")}
        state = cut_units(state, [g for g in self.dense.anatomy.groups if origin in g.layers], self.plan.units)
        return cut_layers(state, stack, self.kept)
