"""Feature maps for tests: their weights, and functions that take these in the place of a bias.

So `assert_equals_naive`, which compares the gradient of a bias, compares that of the weights of a map.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .cases import DIM, HEADS

FEATURES = 6  # of `favor`: neither the dimension nor a multiple of it


def draw_weights(feature_map: str, kv_heads: int = 2) -> Tensor | None:
    """All weights of a map in one tensor."""
    if feature_map == "favor":
        return torch.randn(FEATURES, DIM, dtype=torch.float64)
    return torch.randn(HEADS + kv_heads, DIM, DIM, dtype=torch.float64) if feature_map == "hedgehog" else None


def map_options(feature_map: str, weights: Tensor | None) -> dict:
    """What an attention function takes of a map and all its weights."""
    pair = None
    if weights is not None:
        pair = (weights, weights) if feature_map == "favor" else (weights[:HEADS], weights[HEADS:])
    return {"feature_map": feature_map, "map_weights": pair}


def mapped(function: Callable, feature_map: str) -> Callable:
    """An attention function with a feature map, whose weights it takes as `bias`."""
    return partial(_call, function, feature_map)


def _call(function: Callable, feature_map: str, *inputs: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    return function(*inputs, **map_options(feature_map, bias), **options)
