"""How far a long loop is: a bar on a terminal; elsewhere a line now and then, for whoever asked for lines.

    with telling(print):
        for batch in told(batches, "calibrate"):       # calibrate: 12 of 64, 40 s left
            ...

A log file or a pipe gets lines, each a quarter more of the time after the one before it. A library that is only
imported stays silent there: nobody asked.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .ranks import is_main

T = TypeVar("T")
FIRST = 15.0  # seconds until the first line
LONGEST = 600.0  # seconds between two lines

_tell: Callable[[str], None] | None = None


@contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Within it `tell` gets a line of each long loop now and then, where there is no terminal for a bar."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


class Pace:
    """The lines of one loop of `total` steps, of which `start` were done before."""

    def __init__(self, what: str, total: int, start: int = 0):
        self.what, self.total, self.start = what, total, start
        self._tell = _tell if is_main() and not sys.stderr.isatty() else None
        self._began = time.monotonic()
        self._next = self._began + FIRST

    def reached(self, done: int) -> None:
        """So many steps are done."""
        if self._tell is None or done >= self.total or (now := time.monotonic()) < self._next:
            return
        seconds = now - self._began
        self._next = now + min(max(FIRST, seconds / 4), LONGEST)
        left = seconds / max(1, done - self.start) * (self.total - done)
        self._tell(f"{self.what}: {done:,} of {self.total:,}, {duration(left)} left")


def told(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, while it is told how many are done."""
    if not isinstance(items, Sized) or sys.stderr.isatty():
        yield from tqdm(items, desc=what, disable=None, leave=False)
        return
    pace = Pace(what, len(items))
    for done, item in enumerate(items, 1):
        yield item
        pace.reached(done)


class StepLines(TrainerCallback):
    """The steps of a training, as lines; on a terminal the Trainer has a bar."""

    def __init__(self, what: str = "training step"):
        self._what, self._pace = what, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace = Pace(self._what, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.reached(state.global_step)


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
