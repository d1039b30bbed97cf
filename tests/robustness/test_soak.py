"""The short form of `make soak`: a few compressions in a row hold no more than one."""

import mmap
import sys

import pytest
import torch

from .soak import Used, growth, one_round, soak


@pytest.mark.skipif(sys.platform != "linux", reason="counts what a process holds in /proc")
def test_rounds_hold_nothing(tmp_path):
    used = soak(5)[3:]
    assert {each.tensors for each in used} == {used[0].tensors}
    assert {each.files for each in used} == {used[0].files}
    assert {each.threads for each in used} == {used[0].threads}
    assert used[-1].memory - used[0].memory < 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts what a process holds in /proc")
def test_what_is_held_is_seen(tmp_path):
    before = Used.now()
    held = [torch.ones(1), (tmp_path / "open").open("w")]
    block = mmap.mmap(-1, 1 << 28)  # a tensor may take memory that another has left
    block[::4096] = bytes(1 << 16)
    after = Used.now()
    assert after.tensors == before.tensors + 1 and after.files == before.files + 1
    assert after.memory - before.memory > 100 << 20  # of 256 MB; other memory may be given back meanwhile
    held[1].close()


def test_growth_is_that_after_the_warm_up():
    steady = [Used(memory, 0, 0, 0) for memory in [1, 90, 400, 900, *[1000] * 6]]
    rising = [Used(memory, 0, 0, 0) for memory in [0] * 4 + [1000 + 64 * n for n in range(6)]]
    assert growth(steady) == 0 and growth(rising) == pytest.approx(64)


def test_a_round_does_something(tmp_path):
    one_round(tmp_path)
    assert (tmp_path / "model/model.safetensors").is_file() and (tmp_path / "run/checkpoint-4/complete").is_file()
