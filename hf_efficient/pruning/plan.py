"""A pruning plan: what is kept, as plain data.

{"layers": {"encoder": [0, 2, 5]}, "units": [{"stack": "encoder", "kind": "heads", "layers": [0], "kept": [1, 3]}]}
"""

from dataclasses import dataclass, field
from typing import Any

from .groups import Group


@dataclass(frozen=True)
class PruningPlan:
    """Which layers of each stack and which units of each group stay; what is not named stays whole."""

    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    units: dict[Group, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        units = [
            {"stack": group.stack, "kind": group.kind, "layers": list(group.layers), "kept": list(kept)}
            for group, kept in self.units.items()
        ]
        return {"layers": {name: list(layers) for name, layers in self.layers.items()}, "units": units}
