"""What processes tell each other beside tensors: that they have come to a meeting, that they live, that one failed.

    session = Session(store, rank, size)
    wait(session, "3")                      # until all are there; HfEfficientError with the reason if one has failed
    tell(session, error)                    # why this one fails

All of it is in the key-value store of the process group. Each process has a thread that shows that it lives and looks
whether another one has failed.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .. import errors
from ..errors import ConfigError, HfEfficientError

ENTRY = 1800.0  # seconds in which all processes must have come to `together`
PAUSE = (0.001, 0.1)  # seconds between two looks, the first and the longest
WATCH = 0.5  # the same of the thread
SILENT = 180.0  # after which a process that shows no sign of life counts as dead
GRACE = 30.0  # for the main thread to leave a run that has failed, before the process is ended
LINGER = 10.0  # for the others to hear of the end from the process that may keep the store
FAILED = "failed"


@dataclass
class Session:
    store: Any
    rank: int
    size: int
    meetings: int = 0
    failure: HfEfficientError | None = None
    over: threading.Event = field(default_factory=threading.Event)


def wait(session: Session, name: str, limit: float = float("inf"), what: str = "") -> None:
    """Until all have come to the meeting, or one has failed."""
    pause, end = PAUSE[0], time.monotonic() + limit
    session.store.add(f"{name}/came", 1)
    while True:
        if session.failure is not None:
            raise session.failure
        try:
            came = session.store.add(f"{name}/came", 0)
        except RuntimeError as error:  # the store is gone with the process that kept it: the thread may know why
            session.over.wait(2 * WATCH)
            raise session.failure or HfEfficientError("The main process has ended before this one.") from error
        if came >= session.size:
            return
        if time.monotonic() > end:
            raise ConfigError(
                f"Only {came} of {session.size} processes have called {what} within {limit:.0f} s. Call it in all of "
                "them, with the same arguments: they share the work out."
            )
        time.sleep(pause)
        pause = min(2 * pause, PAUSE[1])


def said(session: Session, name: str) -> Any:
    """What a process of ours has left in the store."""
    return json.loads(session.store.get(name))


def watch(session: Session, ends: bool) -> None:
    """Show that this process lives, and look whether one has failed; in a thread."""
    beats: dict[int, tuple[int, float]] = {}
    while session.failure is None and not session.over.is_set():
        try:
            session.store.add(f"alive/{session.rank}", 1)
            session.failure = _failure(session, beats)
        except RuntimeError:
            if session.over.wait(WATCH):
                return
            session.failure = HfEfficientError("The main process has ended before this one, without a word.")
        session.over.wait(WATCH)
    if session.failure is None:
        return
    if ends and not session.over.wait(GRACE):
        from transformers.utils import logging

        logging.get_logger(__name__).error(f"error: {session.failure} This process cannot go on, and ends.")
        os._exit(1)


def _failure(session: Session, beats: dict[int, tuple[int, float]]) -> HfEfficientError | None:
    if session.store.check([FAILED]):
        told = said(session, FAILED)
        if told["rank"] == session.rank:
            return None
        kind = getattr(errors, told["kind"], None)
        known = isinstance(kind, type) and issubclass(kind, HfEfficientError)
        message = f"Process {told['rank']} of {session.size} failed: {told['message']}"
        return kind(message) if known and kind is not None else HfEfficientError(message)
    for rank in range(session.size):
        beat, now = session.store.add(f"alive/{rank}", 0), time.monotonic()
        if rank not in beats or beats[rank][0] != beat:
            beats[rank] = beat, now
        elif now - beats[rank][1] > SILENT and not session.store.check([f"gone/{rank}"]):
            return HfEfficientError(f"Process {rank} of {session.size} has given no sign of life for {SILENT:.0f} s.")
    return None


def tell(session: Session, error: BaseException) -> BaseException:
    """Tell the others why this process fails; what it shall raise itself, which is what another one told before it."""
    if isinstance(error, RuntimeError) and not isinstance(error, HfEfficientError):
        end = time.monotonic() + 4 * WATCH  # an exchange broke off, perhaps since another one failed
        while session.failure is None and time.monotonic() < end:
            time.sleep(PAUSE[1])
    if session.failure is not None:
        return session.failure
    is_ours = isinstance(error, HfEfficientError)
    message = str(error) if is_ours else f"{type(error).__name__}: {error}"
    told = {"rank": session.rank, "kind": type(error).__name__, "message": message}
    try:
        session.store.compare_set(FAILED, "", json.dumps(told))
    except RuntimeError:  # the store is gone
        return error
    return error


def part(session: Session) -> None:
    """Say that this process is through; the one that may keep the store waits a while until all others are."""
    try:
        session.store.set(f"gone/{session.rank}", "1")
        end = time.monotonic() + LINGER
        others = [f"gone/{rank}" for rank in range(session.size)]
        while session.rank == 0 and time.monotonic() < end and not session.store.check(others):
            time.sleep(PAUSE[1] / 4)
    except RuntimeError:
        return
