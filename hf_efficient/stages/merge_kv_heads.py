"""The stage that merges key/value heads: less to keep in the cache.

- merge_kv_heads: {kv_heads: 4}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Run, Stage
from .settings import MAX_BATCH, MAX_STEPS, integer

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan


@dataclass(frozen=True)
class MergeStage(Stage):
    """`merge_kv_heads(model, kv_heads, calibration)` with `calibration_samples` rows in batches of `batch_size`.

    Before pruning and conversions, which may give layers other numbers of heads:

        - merge_kv_heads: {kv_heads: 4}
        - distill: {epochs: 1, losses: {kd: 1.0, ce: 0.5}}
    """

    kv_heads: int = integer(1, 1, 1 << 12)
    calibration_samples: int = integer(64, 1, MAX_STEPS)
    batch_size: int = integer(8, 1, MAX_BATCH)

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        from ..models.anatomy import Anatomy
        from ..pruning.fit.kv_heads import merged_config

        return merged_config(Anatomy.of(run.skeleton(config)), self.kv_heads)

    def plan(self, run: Run, config: Any) -> "tuple[Any, PruningPlan]":
        from ..models.anatomy import Anatomy
        from ..pruning.fit.kv_heads import merged_config
        from ..pruning.plan import PruningPlan
        from ..pruning.price.forecast import forecast
        from ..pruning.score.calibration import DEFAULT_LENGTH

        anatomy = Anatomy.of(run.skeleton(config))
        merged = merged_config(anatomy, self.kv_heads)
        sizes = PruningPlan(chosen=False, model=config.model_type)
        length = run.recipe.data.max_length or DEFAULT_LENGTH
        return merged, PruningPlan(
            chosen=False, model=config.model_type, forecast=forecast(anatomy, sizes, length, config=merged)
        )

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from ..models.rebuild import is_portable
        from ..pruning.fit.kv_heads import merge_kv_heads
        from .fit import first_batches

        model = run.load(source)
        batches = first_batches(run.data(config=model.config), self.calibration_samples, self.batch_size)
        small = merge_kv_heads(model, self.kv_heads, batches)
        facts: dict[str, Any] = {
            "kv_heads": self.kv_heads,
            "loads_with": "portable" if is_portable(small) else "plugin",
        }
        facts |= {"parameters_before": model.num_parameters(), "parameters_after": small.num_parameters()}
        return facts | run.save(small, target)
