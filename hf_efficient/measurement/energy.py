"""Energy of work, and the CO2 behind it, through codecarbon (`pip install "hf-efficient[energy]"`).

    energy = measure_energy(lambda: model(**inputs), batch_size=1)
    energy.wh_per_1000, energy.source                        # watt hours of 1,000 inputs; "estimated ..."
    facts, used = tracked(lambda: train(), country="DEU")    # used.kwh, used.co2_grams

Nothing is sent anywhere and no file is left behind. Without counters in the processor that may be read (RAPL; most
cloud machines hide them) codecarbon estimates from its load and its rated power: `source` says which it was, and
tables and cards repeat it. CO2 is only told for a country that was given: nothing is guessed from an address.
"""

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError
from ..reporting.schema import Energy, Footprint
from ..training.ranks import meet

SECONDS = 5.0  # of running: codecarbon looks once a second
ESTIMATED, MEASURED = "estimated from load and rated power", "measured by counters of the hardware"
_COUNTERS = ("intel_rapl", "intel_power_gadget")


def check_energy(country: str | None = None) -> None:
    """Before any long work: ConfigError if codecarbon is missing, or knows no such country."""
    if find_spec("codecarbon") is None:
        raise ConfigError('Measuring energy needs codecarbon. Run `pip install "hf-efficient[energy]"`.')
    if country is not None and (len(country) != 3 or not country.isalpha() or not country.isupper()):
        raise ConfigError(f"country must be an ISO code of three capital letters, such as 'DEU', got {country!r}.")


def measure_energy(forward: Callable[[], Any], batch_size: int, seconds: float | None = None) -> Energy:
    """The energy of `forward`, called again and again for that long.

    Parameters:
        forward: runs `batch_size` inputs.
        seconds: default `SECONDS`.

    Raises:
        ConfigError: codecarbon is missing.
    """
    check_energy()
    forward()

    def work() -> int:
        calls, end = 0, time.perf_counter() + (SECONDS if seconds is None else seconds)
        while not calls or time.perf_counter() < end:
            forward()
            calls += 1
        return calls

    calls, footprint = tracked(work)
    inputs = calls * batch_size
    return Energy(1e6 * footprint.kwh / inputs, inputs, footprint.source, footprint.tool)


def tracked(work: Callable[[], Any], country: str | None = None) -> tuple[Any, Footprint]:
    """What `work` returns, and what it used: processor, memory and GPUs of this process (needs codecarbon)."""
    check_energy(country)
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    import codecarbon

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # its import sets it back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.3 has another way to say so, earlier ones do not
        tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=country,
            save_to_file=False,
            save_to_api=False,
            log_level="critical",
            tracking_mode="process",
            measure_power_secs=1,
            allow_multiple_runs=True,
        )
    tracker.start()
    try:
        result = work()
    finally:
        tracker.stop()
    data = tracker.final_emissions_data
    modes = {str(getattr(each, "_mode", "")) for each in getattr(tracker, "_hardware", ())}
    return result, Footprint(
        kwh=float(data.energy_consumed),
        co2_grams=1000 * float(data.emissions) if country else None,
        country=country,
        source=MEASURED if modes & set(_COUNTERS) else ESTIMATED,
        tool=f"codecarbon {codecarbon.__version__}",
    )


def with_energy(work: Callable[..., dict[str, Any]], country: str | None) -> Callable[..., dict[str, Any]]:
    """A stage whose facts also say what it used; `Report.footprint` adds them up."""

    def run(*arguments: Any) -> dict[str, Any]:
        facts, footprint = tracked(lambda: work(*arguments), country)
        parts = meet(asdict(footprint))  # of each process
        sums = {name: sum(part[name] for part in parts) for name in ("kwh", "co2_grams") if parts[0][name] is not None}
        return facts | {"energy": parts[0] | sums}

    return run
