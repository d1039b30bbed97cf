"""Layers that go on with fewer tokens after their attention: what `AttentionConfig("merging")` needs of a layer.

    merge_layers(layers, attention, tokens=[8] * 12, protected=1)     # by `models.structure`

The forward of a layer is its own code and knows nothing of merging. So it runs twice, each time half of it. First to
the end of its attention, which hands over what it gives and stops the run; the tokens are matched by their keys; then
on the merged tokens, where the attention gives the merged result at once and the FFN follows. What a projection gives
for a mean of tokens is the mean of what it gives for them, so states and attention may be merged each for itself:
mean(x) + mean(attention(x)) = mean(x + attention(x)).

Who went into whom travels from layer to layer on the tensor of the states, so a model may run in several threads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..attention.kinds.merging import Tokens, current_tokens, match, merge, mergeable, unmerge, using
from ..errors import UnsupportedModelError
from .family import Attention

_OWNERS = "_token_owners"  # of a tensor with the states of tokens, some of which were merged


class Merging(NamedTuple):
    """What one layer merges: how many tokens, after the protected ones, and its place in the stack."""

    tokens: int
    protected: int
    is_first: bool
    is_last: bool


class _Attended(Exception):
    """The attention of a layer is done; what follows waits for fewer tokens."""


class _MergingLayer:
    """Before the class of a layer."""

    token_merging: Merging

    def __call__(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.token_merging.is_first and not hasattr(states, _OWNERS):
            raise UnsupportedModelError(
                f"The states of merged tokens were replaced between two layers, before {type(self).__name__}: which "
                "tokens they belong to is lost. Reentrant gradient checkpointing does so: use_reentrant=False."
            )
        owners = None if self.token_merging.is_first else getattr(states, _OWNERS)
        return super().__call__(states, *args, token_owners=owners, **kwargs)  # type: ignore[misc]

    def forward(self, states: Tensor, *args: Any, token_owners: Tensor | None = None, **kwargs: Any) -> Any:
        settings, run = self.token_merging, super().forward  # type: ignore[misc]
        merged = mergeable(states.shape[1], settings.tokens, settings.protected)
        tokens = Tokens(token_owners, merges=merged > 0)
        with using(tokens):
            if merged:
                with suppress(_Attended):
                    run(states, *args, **kwargs)
                states = _merged(tokens, states, merged, settings.protected)
            output = run(states, *args, **kwargs)
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if settings.is_last:
            first = first if tokens.owners is None else unmerge(first, tokens.owners)
        else:
            setattr(first, _OWNERS, tokens.owners)
        return first if rest is None else (first, *rest)


class _HandingAttention:
    """Before the class of the attention of a layer, with its projections.

    Not in `forward`: whoever follows the calls of modules, such as `torch.export`, shall see this one end.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = current_tokens()
        if tokens.attended is not None:
            return tokens.attended
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if tokens.merges:
            tokens.attended = output
            raise _Attended
        return output


def _merged(tokens: Tokens, states: Tensor, count: int, protected: int) -> Tensor:
    """The states `[B, T - count, C]`; what the attention gave and the owners are merged too."""
    if tokens.attended is None or tokens.keys is None:
        raise UnsupportedModelError("A layer that merges tokens does not call its attention.")
    places, remaining = match(tokens.keys, count, protected), states.shape[1] - count
    sizes, output = tokens.sizes(states.shape[1]), tokens.attended
    first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
    first = merge(first, places, remaining, sizes)
    tokens.attended = first if rest is None else (first, *rest)
    tokens.owners = places if tokens.owners is None else places.gather(1, tokens.owners)
    return merge(states, places, remaining, sizes)


@contextmanager
def merging_nothing(model: nn.Module) -> Iterator[None]:
    """Meanwhile no layer of the model merges any token."""
    before = {layer: layer.token_merging for layer in model.modules() if isinstance(layer, _MergingLayer)}
    try:
        for layer, settings in before.items():
            layer.token_merging = settings._replace(tokens=0)
        yield
    finally:
        for layer, settings in before.items():
            layer.token_merging = settings


def merge_layers(layers: Sequence[nn.Module], attention: Attention, tokens: Sequence[int], protected: int) -> None:
    """Give each layer of a stack the class of one that merges so many tokens, 0 for none.

    Raises:
        UnsupportedModelError: no part of the layer holds the whole attention with its projections.
    """
    paths = [attention.module.split("."), attention.output.split(".")]
    shared = [one for one, other in zip(*paths, strict=False) if one == other] if attention.output else paths[0][:1]
    if not any(shared):
        raise UnsupportedModelError("no part of its layers is the attention with all its projections")
    for index, layer in enumerate(layers):
        part = layer.get_submodule(".".join(shared))
        part.__class__ = _with_base(_HandingAttention, type(part))
        layer.__class__ = _with_base(_MergingLayer, type(layer))
        layer.token_merging = Merging(tokens[index], protected, index == 0, index == len(layers) - 1)


@cache
def _with_base(base: type, kind: type) -> type:
    """The class of a module with another before it; by the same name, which wrappers of layers look for."""
    return type(kind.__name__, (base, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
