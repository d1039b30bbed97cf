"""One thread, no network, fixed seeds: what every test may rely on."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="all combinations of families and kinds, not a selection")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--thorough"):
        return
    left_out = [item for item in items if "thorough" in item.keywords]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if "thorough" not in item.keywords]
