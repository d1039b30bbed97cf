import numpy as np
import pytest
import torch

from hf_efficient.errors import ConfigError
from hf_efficient.measurement import latency
from hf_efficient.measurement.latency import compare_latency, summarize


class Clocked(torch.nn.Module):
    """Each forward takes the next of its given times on a clock of the test's own."""

    now = 0.0
    calls: tuple = ()

    def __init__(self, name, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.seconds = name, iter(seconds)

    def forward(self, x):
        Clocked.calls += ((self.name, self.training, torch.is_grad_enabled(), torch.get_num_threads()),)
        Clocked.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch):
    Clocked.now, Clocked.calls = 0.0, ()
    monkeypatch.setattr(latency, "perf_counter", lambda: Clocked.now)


def run(a, b, **settings):
    """Each model runs twice in a round; the first time, which takes 100 s, must not count."""
    twice = [[second for each in seconds for second in (100, each)] for seconds in (a, b)]
    models = {"teacher": Clocked("a", twice[0]), "student": Clocked("b", twice[1])}
    return compare_latency(models, lambda model: {"x": torch.zeros(1)}, **settings)


def test_rounds_are_interleaved_after_the_warmup(clock):
    timing = run([9, 9, 4, 6, 8], [7, 7, 2, 2, 4], rounds=3, warmup=2)
    assert [call[0] for call in Clocked.calls] == ["a", "a", "b", "b"] * 5
    assert timing.seconds == {"teacher": (4, 6, 8), "student": (2, 2, 4)}
    assert timing.latencies["teacher"].median_ms == 6000 and timing.latencies["teacher"].min_ms == 4000
    assert timing.latencies["teacher"].rounds == 3 and timing.latencies["teacher"].warmup == 2


def test_a_list_of_inputs_is_gone_through_again_and_again(clock):
    model, seen = Clocked("a", [1] * 7), []
    forward = model.forward
    model.forward = lambda x: seen.append(x) or forward(x)
    compare_latency({"a": model}, lambda model: [{"x": 0}, {"x": 1}, {"x": 2}], rounds=5, warmup=2)
    assert seen == [1, 2, 0, 1, 2, 0, 1]


def test_the_two_ratios_are_different_numbers(clock):
    timing = run([4, 6, 9], [2, 3, 3], rounds=3, warmup=0)
    assert timing.speedup("teacher", "student") == 6 / 3
    assert timing.paired_speedup("teacher", "student") == 2
    timing = run([4, 9, 6], [2, 2, 6], rounds=3, warmup=0)
    assert timing.speedup("teacher", "student") == 3
    assert timing.paired_speedup("teacher", "student") == 2
    assert timing.speedup("student", "teacher") == pytest.approx(1 / 3)


def test_p95_is_numpys():
    seconds = [0.3, 0.1, 0.9, 0.4, 0.25, 0.7, 0.2]
    summary = summarize(seconds, warmup=1)
    assert summary.p95_ms == pytest.approx(1e3 * np.percentile(seconds, 95))
    assert summary.median_ms == pytest.approx(300) and summary.min_ms == pytest.approx(100)


def test_threads_and_modes_are_used_and_put_back(clock):
    torch.set_num_threads(2)
    model = Clocked("a", [1] * 3)
    model.frozen = torch.nn.Dropout().eval()
    timing = compare_latency({"a": model}, lambda model: {"x": torch.zeros(1)}, rounds=2, warmup=1, threads=1)
    assert set(Clocked.calls) == {("a", False, False, 1)}
    assert timing.threads == 1
    assert torch.get_num_threads() == 2
    assert model.training and not model.frozen.training and torch.is_grad_enabled()


def test_threads_and_modes_are_put_back_after_an_error(clock):
    torch.set_num_threads(2)
    model = Clocked("a", [1, "no number"])
    with pytest.raises(TypeError):
        compare_latency({"a": model}, lambda model: {"x": torch.zeros(1)}, rounds=2, warmup=0, threads=1)
    assert torch.get_num_threads() == 2 and model.training


@pytest.mark.parametrize(
    "settings", [{"rounds": 1}, {"rounds": 2.0}, {"warmup": -1}, {"threads": 0}, {"threads": "2"}]
)
def test_bad_settings_are_errors(clock, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        run([1] * 9, [1] * 9, **settings)


def test_no_model_is_an_error():
    with pytest.raises(ConfigError, match="at least one model"):
        compare_latency({}, lambda model: {})
