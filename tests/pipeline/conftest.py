"""What several files of this folder are given."""

import pytest


@pytest.fixture
def rows(tmp_path):
    lines = ["text,label", *(f"{'abcd'[i % 4]} {'efgh'[i % 3]} {i % 7},{'xy'[i % 2]}" for i in range(40))]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def no_doubts(monkeypatch):
    """What a report says of a busy machine depends on what else runs beside the tests, and tiny teachers guess."""
    monkeypatch.setattr("hf_efficient.measurement.latency.run_delay", lambda: None)
    monkeypatch.setattr("hf_efficient.pipeline.report.describe_guessing", lambda teacher: "")
