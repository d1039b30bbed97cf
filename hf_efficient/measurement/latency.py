"""Latency of models against each other: warm-up, then interleaved rounds, so that the ratio holds on a noisy machine.

    timing = compare_latency({"teacher": a, "student": b}, lambda model: dummy_inputs(model, 1, 512), threads=1)
    timing.latencies["student"].median_ms, timing.speedup("teacher", "student")

Each round times every model once, in the order given (a, b, a, b, ...): what slows the machine for a while slows all.
Before it is timed a model runs once uncounted: in service it does not meet the caches and the still spinning threads
of another one either.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from ..errors import ConfigError
from ..models.modes import evaluating, synchronize, using_threads
from ..reporting.schema import Latency
from .run_delay import run_delay


@dataclass(frozen=True)
class LatencyComparison:
    """Times in seconds per model and round, and their summaries."""

    seconds: dict[str, tuple[float, ...]]
    latencies: dict[str, Latency]
    threads: int

    def speedup(self, slow: str, fast: str) -> float:
        """Ratio of the medians: above 1 if `fast` is the faster one."""
        return statistics.median(self.seconds[slow]) / statistics.median(self.seconds[fast])

    def paired_speedup(self, slow: str, fast: str) -> float:
        """Median of the ratios within each round; disturbances that last several rounds cancel."""
        return statistics.median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))


def compare_latency(
    models: Mapping[str, torch.nn.Module],
    inputs_of: Callable[[torch.nn.Module], Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> LatencyComparison:
    """Time one forward of each model, interleaved, in eval and inference mode.

    Parameters:
        models: name -> model; timed in this order.
        inputs_of: makes each model's inputs, once, outside the timing: those of all rounds, or a list of them that
            the rounds go through again and again.
        rounds: at least 2. warmup: uncounted rounds before.
        threads: CPU threads while timing (None: as they are); put back afterwards.

    Raises:
        ConfigError: no model, fewer than 2 rounds, or a bad number of threads.
    """
    if not models:
        raise ConfigError("compare_latency needs at least one model, got none.")
    if not isinstance(rounds, int) or rounds < 2:
        raise ConfigError(f"rounds must be an integer of at least 2, got {rounds!r}.")
    if not isinstance(warmup, int) or warmup < 0:
        raise ConfigError(f"warmup must be an integer of at least 0, got {warmup!r}.")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    waited: dict[str, list[float | None]] = {name: [] for name in models}
    with evaluating(*models.values()), using_threads(threads) as used:
        made = {name: inputs_of(model) for name, model in models.items()}
        inputs = {name: [each] if isinstance(each, Mapping) else list(each) for name, each in made.items()}
        for round_number in range(warmup + rounds):
            for name, model in models.items():
                given = inputs[name][(round_number - warmup) % len(inputs[name])]
                if len(models) > 1:
                    model(**given)
                before = run_delay()
                spent = _time_once(model, given)
                if round_number >= warmup:
                    seconds[name].append(spent)
                    after = run_delay()
                    waited[name].append(None if before is None or after is None else max(after - before, 0.0))
    latencies = {name: summarize(times, warmup, waited[name], used) for name, times in seconds.items()}
    return LatencyComparison({name: tuple(times) for name, times in seconds.items()}, latencies, used)


def _time_once(model: torch.nn.Module, inputs: Mapping[str, Any]) -> float:
    device = next(model.parameters()).device
    synchronize(device)
    start = perf_counter()
    model(**inputs)
    synchronize(device)
    return perf_counter() - start


def summarize(
    seconds: list[float], warmup: int, waited: Sequence[float | None] = (None,), threads: int = 1
) -> Latency:
    """Median, 95th percentile (linear between neighbours, as NumPy's) and minimum, in milliseconds.

    `waited`: seconds that the threads together had no core, in each of the rounds, where known.
    """
    known = [each for each in waited if each is not None]
    share = min(sum(known) / (sum(seconds) * threads), 1.0) if len(known) == len(seconds) else None
    return Latency(
        median_ms=1e3 * statistics.median(seconds),
        p95_ms=1e3 * statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        min_ms=1e3 * min(seconds),
        rounds=len(seconds),
        warmup=warmup,
        waited=None if share is None else round(share, 4),
    )
