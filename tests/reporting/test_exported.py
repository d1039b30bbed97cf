"""Speed-ups in the same runtime stand beside those over PyTorch, and the headline is the former."""

import math
from dataclasses import replace

import pytest

from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.exported import ALONE, export_header, export_rows, headline, serving_rows
from hf_efficient.reporting.language import Decoding
from hf_efficient.reporting.language_tables import language_rows
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.schema import Report
from hf_efficient.reporting.tables import markdown_results, text_table
from hf_efficient.reporting.timing import ExportedTeacher, Latency, ServedProgram, Serving

from .pages import full_report, parsed

THERE = ExportedTeacher(Latency(41.7, 45.2, 40.1, 20, 3), 4.1234, 23_456_789, 0.9512, 0.0104)
QUICK, SLOW = Latency(1.37, 1.52, 1.21, 20, 1), Latency(5.61, 6.04, 5.33, 20, 1)
SERVING = (
    Serving(
        "mixed",
        32,
        53.27,
        (
            ServedProgram("pytorch", SLOW, 178.4, 2.71, SLOW, 66.1, 2.71),
            ServedProgram("onnx-int8", QUICK, 729.3, 11.1, SLOW, 177.7, 4.21),
            ServedProgram("openvino", QUICK, 728.2, 9.87),
        ),
    ),
)


def beside():
    report = full_report()
    return replace(report, exports=(replace(report.exports[0], teacher=THERE),), serving=SERVING)


def test_it_comes_back_from_json_and_older_reports_are_written_as_before():
    report = beside()
    assert Report.from_json(report.to_json()) == report
    old = full_report().to_dict()
    assert "serving" not in old and "teacher" not in old["exports"][0]


def test_both_speed_ups_stand_in_every_table():
    report = beside()
    [row] = export_rows(report)
    named = dict(zip(export_header(report), row, strict=True))
    assert named["same runtime"] == "4.12x" and named["over PyTorch"] == "9.40x"
    assert named["teacher there"] == "41.7 ms, 95.1% ± 1.0"
    for shown in (text_table(report), str(model_card(report)), report_page(report)):
        assert (
            "4.12x" in shown
            and "9.40x" in shown
            and "exported and quantised in the same way" in shown.replace("\n", " ")
        ) or shown == text_table(report)
        assert "was not measured" not in shown
    assert "onnx-int8 4.1x, over PyTorch 9.4x" in markdown_results({"fast": report})
    assert export_header(full_report()) == ALONE and "how fast" in report_page(full_report())


def test_the_tile_says_what_is_compared():
    assert headline(beside().exports[0]) == (
        "4.1x",
        "as fast, both onnx int8: -0.1 ± 0.2 points; 9.4x the teacher in PyTorch",
    )
    page = report_page(beside())
    tiles = page[page.index('class="tiles"') : page.index("</ul>")]
    assert "as fast, both onnx int8" in tiles and ">9.4x<" not in tiles
    assert "teacher, onnx, int8" in page, "the teacher there is a point of the chart"
    parsed(page)


def test_a_float_program_of_the_teacher_needs_no_score_of_its_own():
    report = beside()
    plain = replace(report, exports=(replace(report.exports[0], quantize=None),))
    assert export_rows(plain)[0][3] == "41.7 ms"
    mixed = replace(report, exports=(*report.exports, *full_report().exports))
    assert export_rows(mixed)[1][3:6] == ("", "", "9.40x"), "of one teacher nothing is known"


def test_texts_as_they_come_in():
    report = beside()
    first, second, third = serving_rows(report)
    assert first[:2] == ("all sorts, 32 at once, 53.3 tokens", "PyTorch float32") and first[-2:] == ("2.71x", "2.71x")
    assert second == ("", "onnx, int8", "5.61 ms", "6.04 ms", "178", "1.37 ms", "1.52 ms", "729", "4.21x", "11.10x")
    assert third[2:5] == ("", "", "") and third[-2:] == ("", "9.87x")
    for shown in (text_table(report), str(model_card(report)), report_page(report)):
        assert "all sorts, 32 at once" in shown
    for shown in (text_table(full_report()), str(model_card(full_report())), report_page(full_report())):
        assert "come in" not in shown


def test_a_decoder_is_compared_in_its_runtime_while_it_writes():
    report, writing = beside(), Decoding(20.0, 2.0, 100)
    from .test_language import GENERATION

    [export] = report.exports
    told = replace(export, cache=True, writing=writing, writing_speedup=6.0)
    for teacher, words in (
        (THERE, "6.0x speed-up"),
        (replace(THERE, writing=Decoding(50.0, 7.0, 100)), "3.5x speed-up, 6.0x over PyTorch"),
    ):
        rows = language_rows(replace(report, generation=GENERATION, exports=(replace(told, teacher=teacher),)))
        assert [row[3] for row in rows if row[0].startswith("each token written, onnx")] == [words]


@pytest.mark.parametrize("load", ["{0.__class__}", "short\n# head", "<img src=x>"])
def test_what_a_stranger_wrote_is_shown_as_it_is(load):
    odd = replace(SERVING[0], load=load, tokens=math.inf, batch_size=10**30)
    report = Report.from_json(replace(beside(), serving=(odd,)).to_json())
    assert load.split("\n")[0] in serving_rows(report)[0][0]
    assert "<img" not in str(model_card(report)) and "<img" not in report_page(report)
    text_table(report)
