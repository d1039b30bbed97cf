"""The attention of a model that writes it out, seen while its scores and weights are watched (`attention.watched`).

attention = watched_attention(layer, attention, sizes)    # known by its linears: is it softmax(q k^T + b) v?
attention, sizes, is_causal = found_by_watching(layer)    # not known: where in the layer is such a product?
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...attention.deferred import Reading, Scores
from ...attention.dispatch import HIDDEN
from ...attention.watched import Watch, routing
from ..family import Attention
from .observe import LayerRun
from .roles import Heads, NotDerivable


class Product(NamedTuple):
    """Weights times values, seen in the forward of a module."""

    weights: Scores
    value: Tensor

    def heads(self, module: nn.Module) -> int:
        """By the place of the heads among the dimensions, or, where they are rows of a batch, by what the module says.

        Raises:
            NotDerivable: it says nothing.
        """
        lead = self.weights.query.shape[:-2]
        if len(lead) > 1:
            return lead[-1]
        said = [
            value
            for name, value in vars(module).items()
            if "head" in name and "dim" not in name and type(value) is int
        ]
        known = [value for value in said if value > 1 and lead.numel() % value == 0]
        if not known:
            raise NotDerivable(f"{type(module).__name__} does not say how many heads it has")
        return known[0]


def watched_attention(layer: LayerRun, attention: Attention, sizes: Heads) -> Attention:
    """The same, with what is seen of it while it computes scores and weights.

    Raises:
        UnsupportedModelError: it is not softmax(q k^T + b) v, with heads of these sizes.
    """
    module = layer.layer.get_submodule(attention.module)
    return _described(attention, sizes, _readings(_products(layer, module), module, sizes))


def found_by_watching(layer: LayerRun) -> tuple[Attention, Heads, bool]:
    """The only self-attention of a layer: its module, its sizes, and whether it sees no later tokens.

    Raises:
        NotDerivable: there is none, or there are several.
    """
    found: dict[str, list[Product]] = {}
    inner = [(path, module) for path, module in layer.layer.named_modules() if path and any(module.children())]
    for path, module in reversed(inner):  # those inside of others first
        if any(other.startswith(f"{path}.") for other in found):
            continue
        try:
            products = _products(layer, module)
        except Exception:  # whatever the code of a model may raise, which says that there is none
            continue
        lengths = {one.weights.shape[-2:] for one in products}
        if all(queries == keys for queries, keys in lengths) and not getattr(module, "is_cross_attention", False):
            found[path] = products
    if len(found) != 1:
        raise NotDerivable(f"{len(found)} of its modules have self-attention")
    [(path, products)] = found.items()
    module = layer.layer.get_submodule(path)
    heads, (weights, value) = products[0].heads(module), products[0]
    kv_heads = 1 if weights.key.shape[:-2] != weights.query.shape[:-2] else heads
    sizes = Heads(heads, kv_heads, weights.query.shape[-1], value.shape[-1])
    readings = _readings(products, module, sizes)
    return _described(Attention(path), sizes, readings), sizes, all(_hides_future(one) for one in readings)


def _products(layer: LayerRun, module: nn.Module) -> list[Product]:
    """
    Raises:
        UnsupportedModelError: there is none, or there is something else like it.
    """
    seen: list[Product] = []

    def attend(watch: Watch, weights: Scores, value: Tensor) -> Tensor:
        seen.append(Product(weights, value))
        return weights.tensor() @ value

    with routing([module], attend):
        layer.run()
    return seen


def _readings(products: Sequence[Product], module: nn.Module, sizes: Heads) -> list[Reading]:
    readings = [one.weights.read(sizes.heads) for one in products]
    known = [one for one in readings if one is not None and one.query.shape[-1] == sizes.dim]
    if len(known) < len(products) or any(one.value.shape[-1] != sizes.value_dim for one in products):
        raise NotDerivable(f"{type(module).__name__} computes its attention in a way of its own")
    return known


def _described(attention: Attention, sizes: Heads, readings: Sequence[Reading]) -> Attention:
    masks = [one.mask for one in readings if one.mask is not None]
    return replace(
        attention,
        routed=True,
        uneven=sizes.dim != sizes.value_dim,
        biased=any(bool(mask.masked_fill(mask <= HIDDEN, 0).any()) for mask in masks),
    )


def _hides_future(reading: Reading) -> bool:
    if reading.mask is None:
        return False
    hidden = reading.mask <= HIDDEN
    future = torch.ones(hidden.shape[-2:], dtype=torch.bool).triu(1)
    return hidden.shape[-2] > 1 and bool(hidden[..., future].all())
