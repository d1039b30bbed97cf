"""A machine that does something else meanwhile is noticed."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from torch import nn

from hf_efficient.measurement import latency
from hf_efficient.measurement.run_delay import run_delay
from hf_efficient.reporting.schema import Report
from hf_efficient.reporting.tables import measurement_table, text_table
from hf_efficient.reporting.waiting import describe_waiting

from ..reporting.samples import STUDENT, TEACHER, sample_report

LOOK = """
import os, sys, torch
from torch import nn
from hf_efficient.measurement.latency import compare_latency
os.sched_setaffinity(0, {int(sys.argv[1])})
torch.set_num_threads(1)
found = compare_latency({"a": nn.Linear(256, 256)}, lambda m: {"input": torch.ones(4000, 256)}, rounds=30)
print(found.latencies["a"].waited)
"""


def told(delays, monkeypatch):
    """What is made of these readings, one before and one after each counted forward."""
    monkeypatch.setattr(latency, "run_delay", lambda: next(delays))
    monkeypatch.setattr(latency, "_time_once", lambda model, inputs: 0.5)
    made = latency.compare_latency({"a": nn.Linear(2, 2)}, lambda m: {}, rounds=2, warmup=0, threads=2)
    return made.latencies["a"].waited


def test_the_share_of_the_time_of_all_threads(monkeypatch):
    assert told(iter([0.0, 0.1, 0.1, 0.4]), monkeypatch) == pytest.approx(0.4 / (2 * 0.5 * 2))
    assert told(iter([3.0, 3.0, 3.0, 3.0]), monkeypatch) == 0
    assert told(iter([3.0, 2.0, 2.0, 2.0]), monkeypatch) == 0  # a thread ended, and its time with it
    assert told(iter([0.0, 9.0, 9.0, 18.0]), monkeypatch) == 1
    assert told(iter([None] * 4), monkeypatch) is None


def test_a_busy_machine_is_told_and_a_quiet_one_is_not():
    def with_waits(model, waited):
        return replace(model, latency=replace(model.latency, waited=waited))

    assert describe_waiting(STUDENT, None, with_waits(TEACHER, 0.09)) == ""
    note = describe_waiting(with_waits(STUDENT, 0.02), with_waits(TEACHER, 0.34))
    assert "waited for a core 34% of the time" in note
    busy = replace(with_waits(STUDENT, 0.5), baseline=TEACHER)
    assert "50% of the time" in measurement_table(busy) and "busy" not in measurement_table(STUDENT)


def test_a_report_keeps_it_and_an_older_one_is_written_as_it_was():
    report = sample_report(student=replace(STUDENT, latency=replace(STUDENT.latency, waited=0.0)))
    assert Report.from_json(report.to_json()) == report
    assert report.to_dict()["student"]["latency"]["waited"] == 0
    assert "waited" not in sample_report().to_dict()["student"]["latency"]
    assert "busy" not in text_table(report)


def test_other_systems_say_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_efficient.measurement.run_delay.TASKS", tmp_path / "none")
    assert run_delay() is None


@pytest.mark.processes
@pytest.mark.skipif(run_delay() is None, reason="this system does not count it")
def test_work_beside_it_is_noticed():
    core = str(min(os.sched_getaffinity(0)))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        done = subprocess.run([sys.executable, "-c", LOOK, core], capture_output=True, text=True, env=environment)
    finally:
        for other in others:
            other.kill()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.2
