"""A pruning plan: what is kept, such as `PruningPlan(layers={"encoder": (0, 2, 5)}, units={group: (1, 3)})`."""

from dataclasses import dataclass, field

from .groups import Group


@dataclass(frozen=True)
class PruningPlan:
    """Which layers of each stack and which units of each group stay; what is not named stays whole."""

    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    units: dict[Group, tuple[int, ...]] = field(default_factory=dict)
