"""The stage that stores weights in 8 or 4 bits.

- quantize: {method: int8_dynamic}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtimes.quantization import METHODS, check_pruned_groups, check_torchao, quantize
from .base import Run, Stage
from .settings import integer, one_of

if TYPE_CHECKING:
    from ..reporting.schema import StageRecord


@dataclass(frozen=True)
class QuantizeStage(Stage):
    """`quantize(model, method, group_size)`: weights of 8 or 4 bits; nothing may follow it."""

    followers = ()
    reason = "what follows would have to change weights of 8 bits; an export quantises by itself"

    method: str = one_of("int8_dynamic", METHODS)
    group_size: int = integer(32, 1, 1 << 16)

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        check_torchao()
        if self.method == "int4":
            prunings = [stage.pruning for stage in before if stage.pruning is not None]
            check_pruned_groups(run.skeleton(config), prunings, self.group_size)
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        small = quantize(run.load(source), self.method, group_size=self.group_size)
        return {"method": self.method} | run.save(small, target)

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        return (
            "Weights of 8 or 4 bits by torchao: loading needs `pip install torchao`. On a CPU they save bytes, rarely "
            "time; an export to ONNX with quantize int8 saves both.",
        )
