"""How the removed fraction grows during training: progress in [0, 1] -> fraction of the final ratio in [0, 1]."""

from collections.abc import Callable

# Cubic: s_t = s_f (1 - (1 - t)^3), Zhu & Gupta 2017 ("To prune, or not to prune", equation 1) with s_0 = 0.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
    "one-shot": lambda progress: 1.0 if progress > 0 else 0.0,
}


def ratio_at(schedule: str, step: int, start: int, end: int, ratio: float) -> float:
    """The ratio at an optimizer step: 0 before `start`, `ratio` from `end` on."""
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return ratio * SCHEDULES[schedule](progress)
