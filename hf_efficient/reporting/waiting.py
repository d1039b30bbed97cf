"""What a reader of times must know where the machine did something else meanwhile."""

from .schema import Measurement

BUSY = 0.1  # of the time that a thread wanted to run


def describe_waiting(*measurements: Measurement | None) -> str:
    """An empty text where all of them had the machine for themselves, or nothing is known of it."""
    shares = [each.latency.waited for each in measurements if each is not None and each.latency.waited is not None]
    if not shares or max(shares) < BUSY:
        return ""
    return (
        f"The machine was busy: while it was timed, this process waited for a core {max(shares):.0%} of the time. "
        "Latency and speed-up are not those of a quiet machine; measure again on one."
    )
