"""When and how fast a callback prunes while training.

    gradual = Gradual(PruningConfig(ratio=0.5, importance="movement"), start=0.1, end=0.6, every=10)
    gradual.ratio(step=300, max_steps=1000)     # of the network, by then

The schedules are those of `pruning.methods`.
"""

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, shown
from ..config import PruningConfig
from ..methods import IMPORTANCES, SCHEDULES, TRAINED_IMPORTANCES

# What of PruningConfig has a meaning while training; the rest is that of `prune`.
WHILE_TRAINING = (
    "ratio",
    "metric",
    "granularity",
    "importance",
    "allocation",
    "mask_structure",
    "round_to",
    "sequence_length",
    "schedule",
    "seed",
)


def ratio_at(schedule: str, step: int, start: int, end: int, ratio: float) -> float:
    """The ratio at an optimizer step: 0 before `start`, `ratio` from `end` on."""
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return ratio * SCHEDULES[schedule](progress)


@dataclass(frozen=True)
class Gradual:
    """What `PruningCallback` removes, and when; its parameters.

    Raises:
        ConfigError: a value that is not allowed, or what cannot be done while training.
    """

    config: PruningConfig
    start: float = 0.05
    end: float = 0.7
    every: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("start", "end", "momentum"):
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise ConfigError(f"{name} must be a number, got {shown(value)}.")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"start and end are fractions of the run with 0 <= start < end <= 1, got {shown(self.start)}, "
                f"{shown(self.end)}."
            )
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"every must be a whole number of optimizer steps, at least 1, got {shown(self.every)}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be from 0 to below 1, got {shown(self.momentum)}.")
        self._check_granularity()
        self._check_rest()

    def _check_granularity(self) -> None:
        names = list(self.config.granularity)
        for part in ("layer", "expert"):
            if part in names:
                raise ConfigError(
                    f"PruningCallback removes heads and neurons, or weights, got granularity {names}. Drop {part}s "
                    f"before: model = prune(model, PruningConfig(granularity={part!r}, ...), calibration)."
                )
        if "weight" in names and len(names) > 1:
            raise ConfigError(
                f"PruningCallback removes units or weights in one run, got granularity {names}: a pattern of zeros "
                "would not survive when units leave. Prune heads and neurons first, then weights in their own run."
            )

    def _check_rest(self) -> None:
        config = self.config
        needs_data = config.importance not in IMPORTANCES or IMPORTANCES[config.importance].needs_data
        if config.importance not in TRAINED_IMPORTANCES and needs_data:
            free = [name for name, importance in IMPORTANCES.items() if not importance.needs_data]
            raise ConfigError(
                f"importance={config.importance!r} needs calibration batches, which PruningCallback does not have. "
                f"Choose one that training gives ({', '.join(TRAINED_IMPORTANCES)}) or that needs no data "
                f"({', '.join(free)}), or use prune(model, config, calibration)."
            )
        if config.metric == "latency":
            raise ConfigError(
                "PruningCallback counts MACs or parameters; metric='latency' is checked by timing small models, which "
                "are made only at its end. Choose metric='macs', or prune(model, config, calibration) and then train."
            )
        if config.steps > 1:
            raise ConfigError(
                f"steps={config.steps} are those of prune. While training the ratio rises from start to end, every so "
                "many optimizer steps. Leave steps out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what has a meaning while training."""
        config = {name: value for name, value in self.config.to_dict().items() if name in WHILE_TRAINING}
        if self.config.structure is not None:
            del config["ratio"]  # mask_structure says it, also where that is overridden
        return config | {"start": self.start, "end": self.end, "every": self.every, "momentum": self.momentum}

    def ratio(self, step: int, max_steps: int) -> float:
        """What must be gone after this optimizer step; 0 where nothing is to be done."""
        first, last = int(self.start * max_steps), max(1, int(self.end * max_steps))
        if step > last or (step % self.every and step != last):
            return 0.0
        return ratio_at(self.config.schedule, step, first, last, self.config.ratio)
