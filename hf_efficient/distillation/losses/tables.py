"""The named distances, imported when they are first used: so that names are checked without torch."""

from collections.abc import Callable
from typing import Any

from ...io.lazy import LazyTable

DIVERGENCES: LazyTable[Callable[..., Any]] = LazyTable(
    {
        "forward": "distillation.losses.divergences:forward_kl",
        "reverse": "distillation.losses.divergences:reverse_kl",
        "jsd": "distillation.losses.divergences:jensen_shannon",
    }
)
HIDDEN_DISTANCES: LazyTable[Callable[..., Any]] = LazyTable(
    {"mse": "distillation.losses.losses:mean_squared", "cosine": "distillation.losses.losses:cosine"}
)
ATTENTION_LOSSES = ("kl", "mse")
SCORE_LOSSES = ("mse", "kl")
MAX_TEMPERATURE = 1000.0
