"""Long loops say how far they are where there is no terminal, and only to whoever asked."""

import io
import logging
import sys

import pytest

from hf_efficient import Recipe, compress
from hf_efficient.cli.noise import silence
from hf_efficient.training import progress, ranks
from hf_efficient.training.progress import Pace, duration, telling, told

from ..pipeline.tiny import TINY


@pytest.fixture
def clock(monkeypatch):
    """Time that goes by when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def worked(clock, items, seconds, what="work"):
    for _ in told(items, what):
        clock[0] += seconds


def test_a_line_now_and_then(clock):
    lines = []
    with telling(lines.append):
        worked(clock, range(20), 10, "calibrate")
    assert lines[0] == "calibrate: 2 of 20, 3 min left"
    assert lines[-1] == "calibrate: 17 of 20, 30 s left" and len(lines) == 7
    worked(clock, range(20), 10)  # nobody asked
    assert len(lines) == 7


def test_lines_become_rarer(clock):
    lines = []
    with telling(lines.append):
        worked(clock, range(1000), 10)
    assert len(lines) < 40 and lines[-1].endswith("left")


def test_what_is_short_says_nothing(clock):
    lines = []
    with telling(lines.append):
        worked(clock, range(100), 0.1)
    assert lines == []


def test_a_terminal_has_bars_and_another_process_is_silent(clock, monkeypatch):
    lines = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with telling(lines.append), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        worked(clock, range(20), 10, "calibrate")
        assert "calibrate: " in sys.stderr.getvalue()
    monkeypatch.setattr(progress, "is_main", lambda: False)
    with telling(lines.append):
        worked(clock, range(20), 10)
    assert lines == [] and ranks.is_main()


def test_a_run_that_goes_on_counts_its_own_steps(clock):
    lines = []
    with telling(lines.append):
        pace = Pace("training step", 100, start=80)
        clock[0] = 20
        pace.reached(90)
    assert lines == ["training step: 90 of 100, 20 s left"]


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (89, "89 s"), (120, "2 min"), (12_600, "3.5 h")])
def test_times_as_a_person_says_them(seconds, words):
    assert duration(seconds) == words


def test_a_recipe_tells_the_steps_of_its_stages(tmp_path, monkeypatch, quick_end):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    recipe = TINY | {"teacher": {"max_steps": 4, "batch_size": 16}, "stages": [{"prune": {"ratio": 0.3}}]}
    lines = []
    compress(Recipe.from_dict(recipe), output_dir=tmp_path / "out", announce=lines.append)
    kinds = {line.split(":")[0] for line in lines if " left" in line}
    assert {"training step", "calibrate", "evaluate"} <= kinds
    assert lines.index(next(line for line in lines if line.startswith("training step: 1 of 4"))) < lines.index(
        next(line for line in lines if line.startswith("0-teacher done"))
    )


@pytest.mark.parametrize(
    ("name", "text", "is_heard"),
    [
        ("torchao", "Failed to load /x/torchao/_C_cutlass_90a.abi3.so: Could not load this library", False),
        ("torchao", "Failed to load the weights", True),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by "
         "torch.compile as an opaque value type.", False),
        ("torch.utils._pytree", "<class 'dict'> is already registered", True),
    ],
)  # fmt: skip
def test_only_those_messages_are_left_out(monkeypatch, name, text, is_heard):
    logger, heard = logging.getLogger(name), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    monkeypatch.setattr(logger, "filters", [])
    logger.addHandler(handler)
    try:
        logger.warning(text)  # a library that is only imported leaves it
        assert heard == [text]
        silence()
        silence()
        assert len(logger.filters) == 1
        logger.warning(text)
    finally:
        logger.removeHandler(handler)
    assert heard == [text] * (2 if is_heard else 1)
