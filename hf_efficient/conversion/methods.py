"""The ways to more positions, by name. Light: a recipe that only names one imports nothing.

METHODS["tile"](table, 4096)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..io.lazy import LazyTable

if TYPE_CHECKING:
    from torch import Tensor

# Of a learned table [n, width] -> [length, width].
METHODS: "LazyTable[Callable[[Tensor, int], Tensor]]" = LazyTable(
    {"tile": "conversion.positions:tile", "interpolate": "conversion.positions:interpolate"}
)
ROPE = ("linear", "dynamic", "yarn")  # of rotary positions, as transformers calls them
