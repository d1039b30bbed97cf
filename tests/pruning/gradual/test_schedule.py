"""Zhu & Gupta 2017, equation 1: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.pruning.gradual.schedule import ratio_at
from hf_efficient.pruning.methods import SCHEDULES


@given(step=st.integers(0, 300), ratio=st.floats(0.01, 0.99))
def test_cubic_is_zhu_and_gupta(step, ratio):
    first, last = 20, 220
    clipped = min(max(step, first), last)
    expected = ratio + (0 - ratio) * (1 - (clipped - first) / (last - first)) ** 3
    assert ratio_at("cubic", step, first, last, ratio) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_starts_at_nothing_ends_at_the_ratio_and_never_falls(schedule):
    values = [ratio_at(schedule, step, 10, 50, 0.6) for step in range(80)]
    assert values[:11] == [0.0] * 11
    assert values[50:] == [0.6] * 30
    assert values == sorted(values)


def test_schedules_differ():
    middle = {name: ratio_at(name, 30, 10, 50, 0.8) for name in SCHEDULES}
    assert middle == pytest.approx({"cubic": 0.7, "linear": 0.4, "one-shot": 0.8})


def test_a_schedule_without_length_is_a_step():
    assert [ratio_at("cubic", step, 5, 5, 0.5) for step in (4, 5, 6)] == [0.0, 0.0, 0.5]
