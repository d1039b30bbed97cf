"""Global tokens that stay near in a model with rotary positions, so that a text may have any length.

A rotary score depends on the distance between query and key. A window keeps that small, but the global tokens fall
behind, and beyond the distances that a model was trained on their scores mean nothing. With `streaming` a query sees
them from where it would stand if the text were them and the window alone, the last place there (StreamingLLM, Xiao
2023, arXiv 2309.17453, section 3.2: positions within the cache):

    score(i, j) = scaling q_i turned from place i to place min(i, e) . k_j,       e = first + g + window - 1

Nothing has to know how the angles are made. The cosines and sines that the model gives its attention say how to turn a
query back to place 0, and those of place e, which are kept while decoding, how to turn it there.

    near = NearTokens(Rotary(cos, sin), distance, edge, reach)
    added = near.scores(query, global_key, scaling)                 # [B,H,T,g], to the scores of the global tokens
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import UnsupportedModelError

ARGUMENT = "position_embeddings"  # what attention modules of transformers call the cosines and sines
NOT_ROTARY = (
    "streaming=True needs a model that gives each attention the cosines and sines of its rotary positions "
    f"({ARGUMENT}=...), by which the first half of a head's numbers turns with the second. Leave streaming out."
)
CAPPED = "streaming=True has no place for the capped scores of this model. Leave streaming out."


class Rotary(NamedTuple):
    """Cosines and sines [B or 1,T,R] of the places of T tokens, for the first R numbers of a head; the first half of
    these turns with the second."""

    cos: Tensor
    sin: Tensor

    def at(self, index: Tensor) -> "Rotary":
        """[B,R]: those of one token of each row."""
        return Rotary(*(x.expand(len(index), -1, -1)[torch.arange(len(index)), index] for x in self))

    def turn(self, x: Tensor) -> Tensor:
        """[B,H,T,R] from place 0 to the places of the tokens, as the models do."""
        first, second = x.chunk(2, -1)
        return x * self.cos.unsqueeze(1) + torch.cat([-second, first], -1) * self.sin.unsqueeze(1)

    def turn_back(self, x: Tensor) -> Tensor:
        """[B,H,T,R] from the places of the tokens to place 0; YaRN makes cosines and sines longer than 1."""
        length = self.cos.square() + self.sin.square()
        return Rotary(self.cos / length, -self.sin / length).turn(x)


Places = tuple[Tensor, Tensor]  # cosines and sines as a model gives them


class NearTokens(NamedTuple):
    """`distance` [B,T] of the queries from the first global token; `edge` [B,R] is the rotary of the place where it is
    `reach`, zeros if no query was there yet."""

    rotary: Rotary
    distance: Tensor
    edge: Rotary
    reach: int

    def scores(self, query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
        """[B,H,T,g]: what the scores of query [B,H,T,D] and global key [B,K,g,D] change by."""
        width, exact = self.rotary.cos.shape[-1], torch.promote_types(query.dtype, torch.float32)
        rotary, edge = (Rotary(*(x.to(exact) for x in one)) for one in (self.rotary, self.edge))
        turned = query[..., :width].to(exact)
        near = Rotary(*(x.unsqueeze(1) for x in edge)).turn(rotary.turn_back(turned))
        is_far = (self.distance > self.reach)[:, None, :, None]
        change = torch.where(is_far, near - turned, 0)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        key = key[..., :width].to(exact).repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (change @ key.mT * scaling).to(query.dtype)

    @property
    def next_edge(self) -> Rotary:
        """[B,R]: the edge as it is known after these tokens."""
        length = self.distance.shape[1]
        index = (self.reach - self.distance[:, 0]).clamp(0, length - 1)  # of the query that stands there
        arrives = (self.distance == self.reach).any(1, keepdim=True)
        here = self.rotary.at(index)
        return Rotary(*(torch.where(arrives, new, old) for new, old in zip(here, self.edge, strict=True)))


def near_tokens(
    rotary: Places, distance: Tensor, window: int, count: int, known: tuple[Tensor, ...] = ()
) -> NearTokens:
    """For `distance` [B,T] from the first of `count` global tokens; `known`: the edge after the calls before."""
    places = Rotary(*rotary)
    shape = len(distance), places.cos.shape[-1]
    edge = Rotary(*known) if known else Rotary(*(places.cos.new_zeros(shape) for _ in range(2)))
    near = NearTokens(places, distance, edge, count + window - 1)
    return near._replace(edge=near.next_edge)


def beside(scores: Tensor, pairs: Tensor | None, keys: int) -> Tensor:
    """[B,H,T,g+keys]: scores of the global tokens, and none of `keys` others, with the mask `pairs` of all of them."""
    added = F.pad(scores, (0, keys))
    if pairs is None:
        return added
    return added.masked_fill(~pairs, float("-inf")) if pairs.dtype == torch.bool else added + pairs


def attach_rotary(module: nn.Module) -> RemovableHandle | None:
    """Make a self-attention module hand its rotary positions on to its attention function, as `rotary`."""
    parameters = signature(module.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if ARGUMENT not in parameters or not takes_more:
        return None
    hook: Callable = partial(_hand_on, list(parameters).index(ARGUMENT))
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def needed_places(variant: Any, rotary: Places | None, softcap: float | None) -> dict[str, Any]:
    """The argument `rotary` for a variant with `streaming`; UnsupportedModelError if no places were handed on, or
    scores are capped: what is added to them here comes after the cap."""
    if variant is None or not variant.config.streaming:
        return {}
    if rotary is None or softcap is not None:
        raise UnsupportedModelError(NOT_ROTARY if rotary is None else CAPPED)
    return {"rotary": rotary}


def _hand_on(place: int, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    rotary = args[place] if len(args) > place else kwargs.get(ARGUMENT)
    is_plain = isinstance(rotary, tuple | list) and len(rotary) == 2 and all(one.ndim == 3 for one in rotary)
    return args, {**kwargs, "rotary": tuple(rotary) if is_plain else None}
