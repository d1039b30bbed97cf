"""The dense model on the disk, layer by layer: forwards with the states of all batches, then backwards.

    dense = DenseModel.open(folder, calibration)
    dense.start(shelf)
    dense.forward()                                   # states.<layer>.<batch> on the shelf
    dense.backward(ANSWER, answer_loss(0), units=groups, blocks=True)
    dense.gradients(ANSWER, groups), dense.weights(3)

Backwards each layer is run again on the states that it read, and is given the gradient of what it gave: that yields
the gradients of the masks of its units (`score.statistics.mask_gradients`), of what its blocks gave, and of its
states, which go on to the layer before. What is on the shelf is not computed again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import UnsupportedModelError
from ...io.disk import check_space
from ...models.anatomy import Anatomy
from ...models.groups import Group, output_module, output_weight
from ...models.on_disk import StoredModel
from ...models.stacks import ModelStack
from ..fit.reconstruction import find_blocks, with_floor
from ..score.calibration import Loss, check_calibration, wide
from ..score.finite import check_finite
from ..score.handing import Batch, Call, Layers
from ..score.statistics import MaskGradients, masked
from .proof import prove_layers
from .shelf import Shelf, States

ANSWER = "answer"  # the backward pass from a direction of the answer, which says what tokens weigh in the fit
SPARE = 6  # states of all batches beside those of the layers: gradients, the pruned stream, the sums of two blocks
LOGITS = 1 << 26  # numbers in the logits of the rows that go through the head together: 256 MiB in float32


class Calls:
    """What the layers of a model are given beside their states, for each batch; the tensors lie on a shelf."""

    def __init__(self, shelf: Shelf, name: str):
        self.shelf, self.name = shelf, name
        self.forms: list[list[tuple[list[Any], TreeSpec]]] = []  # of each batch and layer; a tensor by its key

    def append(self, calls: Sequence[Call]) -> None:
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        forms = []
        for call in calls:
            leaves, form = tree_flatten(call)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):  # the same mask goes to many layers
                    key = keys.setdefault(id(leaf), str(len(keys)))
                    tensors[key] = leaf
                    leaves[place] = _Key(key)
            forms.append((leaves, form))
        self.shelf.put(f"{self.name}.{len(self.forms)}", tensors)
        self.forms.append(forms)

    def get(self, index: int, number: int) -> Call:
        leaves, form = self.forms[number][index]
        tensors = self.shelf.get(f"{self.name}.{number}")
        return tree_unflatten([tensors[one.name] if isinstance(one, _Key) else one for one in leaves], form)


@dataclass(frozen=True)
class _Key:
    name: str


@dataclass(eq=False)
class DenseModel:
    """A checkpoint folder, what its model is made of, and the batches that go through it."""

    stored: StoredModel
    anatomy: Anatomy
    batches: list[Batch]
    layers: Layers
    shelf: Shelf = field(init=False)
    calls: Calls = field(init=False)

    @classmethod
    def open(cls, name: str | Path, calibration: Any) -> "DenseModel":
        """
        Raises:
            CheckpointError, DataError: as `StoredModel.open` and `check_calibration`.
            UnsupportedModelError: layers that cannot be run one by one, experts in one tensor.
        """
        stored = StoredModel.open(name)
        anatomy = Anatomy.of(stored.model)
        gives = prove_layers(anatomy)
        for group in anatomy.groups:
            if any(output_weight(stored.model, member).ndim == 3 for member in group.members):
                raise UnsupportedModelError(
                    f"The experts of {group.name} are one tensor, and are not pruned layer by layer. Load the model "
                    "whole and give that."
                )
        batches = check_calibration(anatomy, calibration)
        return cls(stored, anatomy, batches, Layers(stored.model, anatomy.stacks[0].layers, gives))

    @property
    def stack(self) -> ModelStack:
        return self.anatomy.stacks[0]

    @property
    def depth(self) -> int:
        return len(self.stack.layers)

    @property
    def states(self) -> States:
        """What the first layer reads; `.at(layer)` what others do, the last of them what goes to the head."""
        return States(self.shelf, "states", len(self.batches))

    def outside(self) -> list[str]:
        """The weights that belong to no layer."""
        return [name for name in self.stored.names() if not name.startswith(f"{self.stack.prefix}.")]

    def before_layers(self) -> list[str]:
        """Those of them without the output embeddings, which no layer needs."""
        output = self.stored.model.get_output_embeddings()
        weight = None if output is None else output.weight
        own = {name for name, one in self.stored.model.named_parameters(remove_duplicate=False) if one is weight}
        tied = {name for names in self.stored.aliases.values() for name in names} | set(self.stored.aliases)
        return [name for name in self.outside() if name not in own - tied]

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """One layer with its weights."""
        with self.stored.loaded(f"{self.stack.layer_prefix(index)}."):
            yield

    def start(self, shelf: Shelf) -> None:
        """Embed the batches, and note what the layers are given; CheckpointError if the disk is too small."""
        self.shelf, self.calls, size = shelf, Calls(shelf, "calls"), 0
        with self.stored.loaded(*self.before_layers()):
            for number, batch in enumerate(self.batches):
                first, calls = self.layers.record(batch)
                self.states.put(number, first)
                self.calls.append(calls)
                size += first.numel() * first.element_size()
        if not self.states.at(1).is_whole():
            check_space(shelf.folder, (self.depth + SPARE) * size)

    @torch.no_grad()
    def forward(self) -> None:
        """All batches through all layers."""
        for index in range(self.depth):
            states = self.states.at(index)
            if states.at(index + 1).is_whole():
                continue
            with self.layer(index):
                for number in range(len(self.batches)):
                    given = self.layers.call(index, states[number], self.calls.get(index, number))
                    check_finite(given, f"What layer {index} gives for calibration batch {number}")
                    states[number] = given

    def backward(self, name: str, loss: Loss, units: Sequence[Group] = (), blocks: bool = False) -> None:
        """From the head to the first layer: for each the gradients of the masks of `units` `[rows, units]`, and of
        `blocks` how much the loss depends on what they give, `[B, T]` for each batch."""
        gradients = States(self.shelf, f"{name}-gradient", len(self.batches))
        if self.shelf.has(f"{name}.{0}"):
            return
        done = next((index for index in range(self.depth) if self.shelf.has(f"{name}.{index}")), self.depth)
        if done == self.depth and not gradients.at(done).is_whole():
            self._through_head(gradients.at(done), loss)
        for index in reversed(range(done)):
            own = [group for group in units if index in group.layers]
            self.shelf.put(f"{name}.{index}", self._through_layer(index, gradients.at(index), own, blocks))
            gradients.at(index + 1).drop()

    def _through_head(self, gradients: States, loss: Loss) -> None:
        with self.stored.loaded(*self.outside()):
            for number, batch in enumerate(self.batches):
                states, parts = self.states.at(self.depth)[number], []
                for start, stop in self._portions(states):
                    rows = {key: value[start:stop] if value.ndim else value for key, value in batch.items()}
                    leaf = states[start:stop].detach().requires_grad_()
                    with torch.enable_grad():
                        scalar = self.layers.finish(rows, leaf, loss)
                    [gradient] = torch.autograd.grad(scalar, [leaf], allow_unused=True)
                    parts.append(torch.zeros_like(leaf) if gradient is None else gradient)
                gradients.put(number, torch.cat(parts))

    def _portions(self, states: Tensor) -> Iterator[tuple[int, int]]:
        """Rows that go through the head together."""
        output = self.stored.model.get_output_embeddings()
        classes = 1 if output is None else output.weight.shape[0]
        rows = max(1, LOGITS // (states.shape[1] * classes))
        for start in range(0, len(states), rows):
            yield start, min(start + rows, len(states))

    def _through_layer(self, index: int, gradients: States, units: Sequence[Group], blocks: bool) -> dict[str, Tensor]:
        """What a layer says of its units and blocks; `gradients`, those of what it read, are put beside."""
        rows: dict[str, list[Tensor]] = {group.name: [] for group in units}
        found: dict[str, Tensor] = {}
        paths = [path for _, path in find_blocks(self.stack, index)] if blocks else []
        with self.layer(index):
            for number in range(len(self.batches)):
                states = self.states.at(index)[number].requires_grad_()
                masks: dict[Group, Tensor] = {}
                offsets: dict[str, Tensor] = {}
                with self._watched(index, units, masks, paths, offsets), torch.enable_grad():
                    given = self.layers.call(index, states, self.calls.get(index, number))
                names = ["states", *(f"units.{group.name}" for group in masks), *(f"block.{path}" for path in offsets)]
                wanted = [states, *masks.values(), *offsets.values()]
                above = gradients.at(index + 1)[number]
                results = torch.autograd.grad(given, wanted, above, allow_unused=True)
                for name, one, gradient in zip(names, wanted, results, strict=True):
                    gradient = torch.zeros_like(one) if gradient is None else gradient
                    kind, _, of = name.partition(".")
                    if kind == "states":
                        gradients.at(index).put(number, gradient)
                    elif kind == "units":
                        rows[of].append(wide(gradient))
                    else:
                        weight = gradient.float().square().sum(-1)
                        check_finite(weight, f"How much the answer depends on {self.stack.layer_prefix(index)}.{of}")
                        found[f"{name}.{number}"] = weight
        return found | {f"units.{name}": torch.cat(parts) for name, parts in rows.items() if parts}

    @contextmanager
    def _watched(
        self,
        index: int,
        units: Sequence[Group],
        masks: dict[Group, Tensor],
        paths: Sequence[str],
        offsets: dict[str, Tensor],
    ) -> Iterator[None]:
        """Masks of ones on the units, and zeros that are added to what blocks give: their gradients are wanted."""

        def add_zeros(path: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            offsets[path] = torch.zeros_like(output, requires_grad=True)
            return output + offsets[path]

        with ExitStack() as hooks:
            for group in units:
                for member in group.members:
                    module = output_module(self.stored.model, member)
                    hooks.callback(module.register_forward_pre_hook(masked(group, masks)).remove)
            for path in paths:
                module = self.stack.layers[index].get_submodule(path)
                hooks.callback(module.register_forward_hook(partial(add_zeros, path)).remove)
            yield

    def gradients(self, name: str, groups: Sequence[Group]) -> MaskGradients:
        """`[rows, units]` for each group, as `mask_gradients` gives them."""
        found: MaskGradients = {}
        for index in range(self.depth):
            kept = self.shelf.get(f"{name}.{index}")
            for group in (one for one in groups if index in one.layers):
                found[group] = kept.get(f"units.{group.name}", torch.zeros(1, group.units))
        return found

    def weights(self, index: int) -> dict[str, list[Tensor]]:
        """c_t of the blocks of a layer, batch by batch: `fit.reconstruction.token_weights`."""
        kept = self.shelf.get(f"{ANSWER}.{index}")
        paths = [path for _, path in find_blocks(self.stack, index)]
        return {path: with_floor([kept[f"block.{path}.{n}"] for n in range(len(self.batches))]) for path in paths}
