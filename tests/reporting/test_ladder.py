"""The ladder of a report: which rung is taken, what is said of it, and that others' reports know none."""

import json
import math
from dataclasses import replace

import pytest

from hf_efficient.errors import DataError
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.ladder_tables import advice, ladder_chart, ladder_rows, ladder_text
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.plots import LADDER as PICTURE
from hf_efficient.reporting.plots import plot_ladder, save_plots
from hf_efficient.reporting.schema import Report

from .ladders import LADDER, ladder
from .pages import parsed
from .samples import sample_report

RULE = (
    "of all that lose at most 1 point to the teacher it is the fastest (of those within 5 % of its time, the smallest)"
)


def told(**changes) -> Report:
    return sample_report(ladder=ladder(**changes))


@pytest.mark.parametrize(
    ("changes", "best", "words"),
    [
        ({}, "onnx-int8", f"Take our result as onnx-int8: {RULE}."),
        ({"onnx-int8": None}, "student", f"Take our result: {RULE}."),
        (
            {"tfidf": {"difference": -0.01}},  # a whole point is allowed
            "tfidf",
            f"Take tfidf (TF-IDF), and not our result: {RULE}. The run keeps it in baseline-tfidf.",
        ),
        ({"tfidf": {"difference": -0.0101}}, "onnx-int8", f"Take our result as onnx-int8: {RULE}."),
        ({"student": {"median_ms": 5.3}}, "onnx-int8", f"Take our result as onnx-int8: {RULE}."),  # a tie: smaller
        ({"student": {"median_ms": 5.3, "weight_bytes": 5}}, "student", f"Take our result: {RULE}."),
        ({"student": {"median_ms": 5.4, "weight_bytes": 5}}, "onnx-int8", f"Take our result as onnx-int8: {RULE}."),
        (
            {"student": None, "onnx-int8": None, "int8": {"median_ms": 44.0}},
            "teacher",
            "Take the teacher as it is: nothing faster loses at most 1 point to the teacher.",
        ),
        (
            {rung.name: {"difference": math.nan} for rung in LADDER.rungs},
            None,
            "Take none of these: nothing loses at most 1 point to the teacher.",
        ),
    ],
)
def test_which_one_to_take(changes, best, words):
    report = told(**changes)
    assert (report.ladder.best.name if best else report.ladder.best) == best
    assert advice(report) == words
    for text in (str(model_card(report)).replace("\\", ""), ladder_text(report)):
        assert words in text


def test_more_may_be_lost_and_a_loss_may_be_the_better_score():
    report = sample_report(ladder=replace(LADDER, allowed_loss=0.05))
    assert report.ladder.best.name == "tfidf" and "at most 5 points" in advice(report)
    lower = replace(LADDER, score="loss", higher_is_better=False, allowed_loss=0.5)
    rungs = (replace(lower.rungs[0], median_ms=9.0), replace(lower.rungs[1], difference=0.6))
    assert replace(lower, rungs=rungs).best.name == "teacher"
    assert "0.5 of loss" in advice(sample_report(ladder=replace(lower, rungs=rungs)))


def test_the_rows_from_fast_to_slow():
    rows = ladder_rows(told(shallow=None, int8=None))
    assert rows == [
        ("tfidf: TF-IDF", "80.5% ± 0.9", "-4.6 ± 1.0 points", "0.410 ms", "101.2x", "1.23 MB", "2 s"),
        ("onnx-int8", "84.4% ± 0.8", "-0.7 ± 0.6 points", "5.10 ms", "8.1x", "17.0 MB", ""),
        ("student", "84.6% ± 0.8", "-0.5 ± 0.6 points", "10.4 ms", "4.0x", "65.2 MB", ""),
        ("teacher", "85.1% ± 0.8", "", "41.5 ms", "1.00x", "90.9 MB", ""),
    ]


def test_card_and_page_show_it_and_no_other_report_does(tmp_path):
    report, plain = told(), sample_report()
    page, card = report_page(report), str(model_card(report))
    parsed(page)
    for text in (page, card):
        assert "Beside what is cheap to try" in text and "the teacher in 8 bits" in text
    assert "16 texts in batches of 8, median of 5 rounds in turn, 2 threads" in card
    for text in (report_page(plain), str(model_card(plain)), ladder_text(plain), ladder_chart(plain)):
        assert "cheap" not in text
    assert not ladder_text(plain) and not ladder_chart(plain) and not advice(plain)
    assert tmp_path / PICTURE in save_plots(replace(report, structure=()), tmp_path)
    assert tmp_path / PICTURE not in save_plots(replace(plain, structure=()), tmp_path)


def test_a_report_comes_back_from_json_and_old_ones_have_none():
    assert Report.from_json(told().to_json()) == told()
    assert "ladder" not in sample_report().to_dict() and "ladder" in told().to_dict()
    assert Report.from_json(json.dumps(sample_report().to_dict())).ladder is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -5.0, 0.0, 1e-320, 1.7e308])
def test_whatever_a_stranger_writes_there_can_be_shown(value, tmp_path):
    names = ("median_ms", "score", "standard_error", "difference")
    report = told(**{rung.name: {name: value} for rung, name in zip(LADDER.rungs, names, strict=False)})
    parsed(report_page(report))
    assert str(model_card(report)) and ladder_text(report)
    assert plot_ladder(report, tmp_path / PICTURE).is_file()
    emptied = sample_report(ladder=replace(LADDER, rungs=()))
    assert report_page(emptied) and str(model_card(emptied)) and not ladder_chart(emptied)
    with pytest.raises(DataError, match="nothing to draw"):
        plot_ladder(emptied, tmp_path / PICTURE)


def test_the_chart_has_powers_of_ten():
    chart = ladder_chart(told())
    assert [f">{number}<" in chart for number in ("0.3", "1", "3", "10", "30")] == [True] * 5
    near = ladder_chart(told(tfidf=None))
    assert ">5<" in near and ">20<" in near and near != chart and "tfidf" not in near
