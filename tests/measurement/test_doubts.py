"""Numbers that mean less than they seem to: a machine that did something else meanwhile, a teacher that guesses."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_efficient.measurement import latency
from hf_efficient.measurement.quality import evaluate_quality
from hf_efficient.measurement.run_delay import run_delay
from hf_efficient.reporting.doubts import describe_guessing, describe_waiting
from hf_efficient.reporting.schema import Quality, Report, Score
from hf_efficient.reporting.tables import comparison_rows, measurement_table, text_table

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


def test_a_teacher_that_guesses_is_told():
    def teacher(right, largest, error=0.01):
        scores = (Score("accuracy", right, error, True),)
        return replace(TEACHER, quality=Quality("text-classification", 400, 400, scores, largest))

    assert describe_guessing(None) == describe_guessing(replace(TEACHER, quality=None)) == ""
    assert describe_guessing(teacher(0.9, None)) == describe_guessing(teacher(0.9, 0.6)) == ""
    assert describe_guessing(teacher(0.625, 0.6)) == ""
    note = describe_guessing(teacher(0.615, 0.6))
    assert "right in 61.5% ± 1.0%" in note and "alone in 60.0%" in note
    rows = dict(row[:2] for row in comparison_rows(teacher(0.9, 0.6), teacher(0.8, 0.6), None))
    assert rows["the largest class alone"] == "60.0%"
    assert "the largest class alone" not in dict(row[:2] for row in comparison_rows(TEACHER, STUDENT, None))


def test_the_share_of_the_largest_class_is_counted():
    rows = [{"pixel_values": torch.zeros(1, 8, 8), "labels": label} for label in (0, 2, 2, 1, 2)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes))
    assert evaluate_quality(model, rows).quality.largest_class == 0.6


def test_other_systems_say_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_efficient.measurement.run_delay.TASKS", tmp_path / "none")
    assert run_delay() is None
    monkeypatch.setattr("hf_efficient.measurement.run_delay.TASKS", tmp_path)
    (tmp_path / "1").mkdir()
    assert run_delay() is None
    (tmp_path / "1" / "schedstat").write_text("no number 3")
    assert run_delay() is None


def test_a_thread_that_ends_meanwhile_leaves_the_others_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_efficient.measurement.run_delay.TASKS", tmp_path)
    for name, waited in (("1", 2_000_000_000), ("3", 500_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(f"7 {waited} 3\n")
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter([self / "1", self / "2", self / "3"]))
    assert run_delay() == 2.5


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
