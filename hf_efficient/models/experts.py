"""What an entry of a family says of its mixtures of experts: where a layer has a row for each, and the config's names.

    Experts("mlp.experts", "mlp", rows=("mlp.gate.weight",), row_dims=(0,), count="num_experts")

What a model has of them is in `mixtures`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer, in the layers that have one; paths are relative to the layer.

    Fields:
        module: what holds the experts: a module with tensors `[experts, ...]`, or a list of modules (`listed`).
        block: the module around it that has the router too.
        rows, row_dims: parameters and buffers with a row for each expert, and in which dimension: the experts' own
            tensors and what is of the router.
        routers: those of `rows` that make the scores by which experts are chosen.
        count: the config field with the number of experts, the same in all layers.
        active: that with the number of experts that work for one token.
        groups, active_groups: those with the number of groups that experts are chosen from, which are equal in size,
            and how many of these a token may choose from (DeepSeek-V2, V3).
    """

    module: str
    block: str
    rows: tuple[str, ...] = ()
    row_dims: tuple[int, ...] = ()
    routers: tuple[str, ...] = ()
    count: str = ""
    active: str | None = None
    groups: str | None = None
    active_groups: str | None = None
    listed: bool = False

    @property
    def dims(self) -> dict[str, int]:
        return dict(zip(self.rows, self.row_dims, strict=True))

    @property
    def own(self) -> tuple[str, ...]:
        """The tensors of the experts themselves."""
        return tuple(name for name in self.rows if name.startswith(f"{self.module}."))

    def num_groups(self, config: PreTrainedConfig) -> int:
        return max(1, getattr(config, self.groups, None) or 1) if self.groups else 1

    def fewest(self, config: PreTrainedConfig) -> int:
        """How many have to stay: one, or two of each group, of which DeepSeek's routers add the two best scores."""
        return 2 * self.num_groups(config) if self.groups else 1

    def fields(self, config: PreTrainedConfig, kept: int) -> dict[str, int]:
        """The config fields that say that so many are left; fewer of them work for a token only where it must be."""
        changes = {self.count: kept}
        if self.active and (active := min(getattr(config, self.active), self._most_active(config, kept))):
            changes |= {self.active: active} if active < getattr(config, self.active) else {}
        return changes

    def _most_active(self, config: PreTrainedConfig, kept: int) -> int:
        chosen_from = getattr(config, self.active_groups, None) if self.active_groups else None
        groups = self.num_groups(config)
        return kept if not chosen_from or groups == 1 else kept // groups * min(chosen_from, groups)
