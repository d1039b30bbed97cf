"""Running means over steps and ranks that cost one collective, when they are read.

meter = Meter()
meter.add("ce", total, count)
meter.drain(accelerator)        # {"ce": sum of totals / sum of counts over all ranks}, and empty again
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums of (total, count) by name. They stay on the device: adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def clear(self) -> None:
        self._sums = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = old_total + total, old_count + count

    def broken(self) -> list[str]:
        """The names whose total is not finite, on this rank."""
        return sorted(name for name, (total, _) in self._sums.items() if not math.isfinite(float(total)))

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each name with a count above 0. All ranks must call it, with the same names added."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.tensor([[float(value) for value in self._sums[name]] for name in names], dtype=torch.float64)
        if accelerator.device.type == "mps":  # has no float64
            table = table.float()
        table = accelerator.reduce(table.to(accelerator.device), reduction="sum").cpu()
        self.clear()
        return {name: (total / count).item() for name, (total, count) in zip(names, table, strict=True) if count > 0}
