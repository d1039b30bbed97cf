"""One thread, no network, fixed seeds: what every test may rely on."""

import gc
import os
from collections import Counter
from collections.abc import Hashable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from .helpers import THOROUGH, covering
from .processes import run_module


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down its call stack for GPUs that may come
    torch.set_num_threads(1)


def _unless_meta(draw):
    return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else draw(tensor, *args, **kwargs)


# Every model that is loaded is built on meta first. There is nothing to draw there, and torch takes long for it.
for _name in ("kaiming_uniform_", "normal_", "uniform_"):
    setattr(torch.nn.init, _name, _unless_meta(getattr(torch.nn.init, _name)))


@pytest.fixture(autouse=True)
def _forked(request, monkeypatch):
    """That a model loads in another process is checked in a fork; marked `cold`, in a new interpreter as for users."""
    if "cold" not in request.keywords:
        monkeypatch.setattr("hf_efficient.pipeline.verify.run_module", run_module)


@pytest.fixture
def quick_end(monkeypatch):
    """A run ends without pictures, and without another process that loads its result: other tests see to both."""
    monkeypatch.setattr("hf_efficient.pipeline.verify.check_reload", lambda *_: None)
    monkeypatch.setattr("hf_efficient.reporting.plots.save_plots", lambda *_: [])


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="all combinations of families and kinds, not a selection")


def pytest_configure(config):
    if config.getoption("--thorough"):
        os.environ[THOROUGH] = "1"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--thorough"):
        return
    items_of = {}
    for item in items:
        mark = item.get_closest_marker("cover")
        if mark and "thorough" not in item.keywords:
            items_of.setdefault((item.path, item.originalname, *mark.args), []).append(item)
    left_out = {item for item in items if "thorough" in item.keywords}
    for (_, _, *strength), rows in items_of.items():
        item_of = {tuple(map(_hashable, item.callspec.params.values())): item for item in rows}
        left_out |= set(rows) - {item_of[values] for values in covering(list(item_of), *strength)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session):
    """What is imported by now stays: accelerate collects garbage after each training, and looked at all of it."""
    gc.collect()
    gc.freeze()


def _hashable(value):
    return value if isinstance(value, Hashable) else id(value)


def pytest_terminal_summary(terminalreporter, config):
    """With `--durations`: the seconds of every folder, summed over the workers."""
    if config.option.durations is None:
        return
    seconds, tests = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                folder = report.nodeid.partition("::")[0].rpartition("/")[0]
                seconds[folder] += report.duration
                tests[folder] += report.when == "call"
    terminalreporter.section("seconds by folder")
    for folder, total in seconds.most_common():
        terminalreporter.write_line(f"{total:7.1f} s {tests[folder]:6d} tests  {folder}")
    terminalreporter.write_line(f"{seconds.total():7.1f} s {tests.total():6d} tests")
