"""Old module names give the modules that stand elsewhere now, and only they."""

import importlib
import sys

import pytest

from hf_efficient._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_module_of_today(old):
    now = importlib.import_module(f"hf_efficient.{MOVED[old]}")
    spec = now.__spec__
    sys.modules.pop(f"hf_efficient.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"hf_efficient.{old} is now hf_efficient.{MOVED[old]}"):
        assert importlib.import_module(f"hf_efficient.{old}") is now
    assert now.__spec__ is spec and spec.name == f"hf_efficient.{MOVED[old]}"


def test_no_name_of_today_is_an_old_one():
    assert not MOVED.keys() & set(MOVED.values())


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"hf_efficient\.bundle'"):
        importlib.import_module("hf_efficient.bundle")


def test_data_gives_its_two_functions():
    from hf_efficient.data import load_dataset_any, prepare

    assert callable(load_dataset_any) and callable(prepare)
