"""Mixtures of experts: where a layer keeps a row for each expert, what the config says of them, and how a model gives
what it would give without some of them.

    for mixture in Anatomy.of(model).mixtures:
        print(mixture.name, mixture.experts)              # decoder.3.experts 128
    with without_experts(model, {mixture: [5, 7]}):       # their router scores are -inf
        model(**inputs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from .experts import Experts

SILENT = -1e9  # of a bias of the choice between experts: finite, so that no product with a zero is nan


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer of a model: their number, that of the equal groups that they lie in, one after another,
    the fewest that may be left, the config field that says their number (with its config), and the names of the
    modules in a list of experts."""

    stack: str
    layer: int
    prefix: str
    entry: Experts
    experts: int
    groups: int = 1
    fewest: int = 1
    field: str = ""
    names: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.stack, self.layer))

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.experts"

    def path(self, inside: str) -> str:
        """In the model, of what has a path inside the layer."""
        return f"{self.prefix}.{inside}" if inside else self.prefix

    def per_group(self, kept: Sequence[int]) -> list[int]:
        """How many of each group are kept."""
        size = self.experts // self.groups
        return [sum(group * size <= expert < (group + 1) * size for expert in kept) for group in range(self.groups)]

    def counts(self) -> range:
        """How many may be left, descending: all, then as many fewer of every group."""
        return range(self.experts, self.fewest - 1, -self.groups)


def mixture_of(
    layer: nn.Module, entry: Experts, config: PreTrainedConfig, stack: str, index: int, prefix: str, field: str
) -> Mixture:
    """That of a layer which has one; `config` is that of its stack."""
    names = tuple(name for name, _ in layer.get_submodule(entry.module).named_children()) if entry.listed else ()
    experts = num_experts(layer, entry)
    groups, fewest = entry.num_groups(config), min(entry.fewest(config), experts)
    return Mixture(stack, index, prefix, entry, experts, groups, fewest, field, names)


def num_experts(layer: nn.Module, entry: Experts) -> int:
    """Of a layer, by its modules or tensors."""
    if entry.listed:
        return sum(1 for _ in layer.get_submodule(entry.module).children())
    return layer.get_parameter(entry.own[0]).shape[entry.dims[entry.own[0]]]


def expert_parameters(model: PreTrainedModel, mixture: Mixture) -> int:
    """The parameters that leave with one expert: its own, and its rows of the router."""
    layer = model.get_submodule(mixture.prefix)
    total = sum(p.numel() for p in layer.get_submodule(mixture.entry.module).parameters()) if mixture.names else 0
    known = dict(layer.named_parameters())
    total += sum(known[name].numel() for name in mixture.entry.rows if name in known)
    return total // mixture.experts


@contextmanager
def without_experts(model: PreTrainedModel, gone: Mapping[Mixture, Sequence[int]]) -> Iterator[None]:
    """The model gives what it would give without these experts: what makes the scores of a router gives -inf there,
    and a bias that is added to scores is so low that they are never chosen. Its weights stay as they are."""
    weights: list[tuple[Tensor, int, Tensor]] = []
    before: list[tuple[Tensor, Tensor]] = []
    state = model.state_dict(keep_vars=True)
    try:
        with torch.no_grad():
            for mixture, experts in gone.items():
                leaving = torch.tensor(sorted(experts))
                for name, dim in mixture.entry.dims.items():
                    tensor = state.get(mixture.path(name))
                    if tensor is None or not len(leaving):
                        continue
                    if name in mixture.entry.routers:
                        weights.append((tensor, mixture.experts, leaving.to(tensor.device)))
                    elif "bias" in name and name not in mixture.entry.own:
                        before.append((tensor, tensor.detach().clone()))
                        tensor.index_fill_(dim, leaving.to(tensor.device), SILENT)
        with _Silent(weights):
            yield
    finally:
        with torch.no_grad():
            for tensor, whole in before:
                tensor.copy_(whole)


class _Silent(TorchFunctionMode):
    """Products with the weight of a router are -inf at some experts, whatever calls them: `nn.Linear`, or the code of
    the router itself, which may use another dtype."""

    def __init__(self, weights: Sequence[tuple[Tensor, int, Tensor]]):
        super().__init__()
        # by id: the tensor, which thereby keeps its id; how many experts there are, and which of them are silent
        self.known = {id(weight): (weight, experts, leaving) for weight, experts, leaving in weights}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        found = next((self.known[id(one)] for one in given if id(one) in self.known), None)
        if found is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        weight, experts, leaving = found
        if len(given) == 1:  # the same in another dtype, or transposed
            if result.numel() == weight.numel():
                self.known[id(result)] = (result, experts, leaving)
            return result
        return result.index_fill(-1, leaving, -torch.inf) if result.shape[-1] == experts else result
