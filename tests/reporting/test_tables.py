from dataclasses import replace

import pytest

from hf_efficient.reporting.schema import LayerStructure, Quality, Score
from hf_efficient.reporting.tables import (
    align,
    comparison_rows,
    describe_workload,
    format_bytes,
    format_count,
    format_ms,
    format_ratio,
    format_score,
    markdown,
    markdown_structure,
    markdown_table,
    text_table,
)

from .samples import COMPARISON, STUDENT, WORKLOAD, sample_report


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (22_714_757, "22.7M"), (999_600, "1.00M"), (999_400, "999k")]
    + [(1_435_000_832, "1.44G"), (7e12, "7.00T"), (12_345, "12.3k"), (99_960, "100k")],
)
def test_counts_have_three_digits(value, text):
    assert format_count(value) == text


def _rows(report):
    return comparison_rows(report.teacher, report.student, report.comparison)


def test_other_numbers():
    assert format_bytes(90_859_028) == "90.9 MB" and format_bytes(1500) == "1.50 KB" and format_bytes(12) == "12 B"
    assert [format_ms(x) for x in (123.4, 12.34, 1.234, 0.1234)] == ["123 ms", "12.3 ms", "1.23 ms", "0.123 ms"]
    assert format_ratio(0.4795) == "0.48x" and format_ratio(0.0421) == "0.042x"
    assert format_score(Score("accuracy", 0.9672, 0.0086, True)) == "96.7% ± 0.9"
    assert format_score(Score("loss", 3.2144, 0.0213, False)) == "3.214 ± 0.021"


def test_the_terminal_table_is_aligned():
    lines = text_table(sample_report()).splitlines()
    header, rule, *rows = lines[: lines.index("")]
    assert set(rule) == {"-", " "}
    gaps = [i for i, sign in enumerate(rule) if sign == " "]
    assert all(line.ljust(len(rule))[i] == " " for line in rows + [header] for i in gaps)
    assert all(len(line) <= len(rule) and line == line.rstrip() for line in lines[: lines.index("")])
    workload = "batch 1, 128 tokens, 2 threads, float32 on cpu; AMD EPYC, 6 cores"
    assert lines[lines.index("") + 1 :] == [workload, *sample_report().warnings]


def test_numbers_stand_right_and_names_left():
    assert align(("", "a"), [("x", "1"), ("long", "22")]) == "       a\n----  --\nx      1\nlong  22"


def test_markdown_cells_are_equally_wide_and_escaped():
    lines = markdown(("", "a"), [("x|y", "1"), ("z\nw", "22")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("|-") and lines[1].endswith("-:|")
    assert "x\\|y" in lines[2] and "z w" in lines[3]


def test_rows_show_teacher_and_student_apart():
    rows = {row[0]: row[1:] for row in _rows(sample_report())}
    assert rows["accuracy"] == ("96.7% ± 0.9", "95.5% ± 1.0", "-1.2 ± 0.7 points")
    assert rows["latency, median"] == ("19.4 ms", "10.6 ms", "1.84x speed-up")
    assert rows["MACs"] == ("1.44G", "688M", "0.48x")
    assert rows["on disk"] == ("90.9 MB", "67.3 MB", "")
    assert rows["same prediction"] == ("", "97.9%", "")
    assert "not zero" not in rows
    assert all(cell in markdown_table(sample_report()) for cell in rows["latency, median"])


def test_zeros_are_shown_when_there_are_many():
    sparse = replace(STUDENT, size=replace(STUDENT.size, nonzero_parameters=8_000_000))
    rows = {row[0]: row[1:] for row in _rows(sample_report(student=sparse))}
    assert rows["not zero"] == ("22.7M", "8.00M", "")


def test_a_student_alone_has_empty_cells_and_no_change():
    report = sample_report(teacher=None, comparison=None)
    assert all(row[1] == row[3] == "" and row[2] for row in _rows(report))


def test_losses_are_not_percent():
    quality = Quality("causal-lm", 20, 900, (Score("loss", 3.2144, 0.0213, False),))
    compared = replace(COMPARISON, quality_score="loss", quality_difference=0.0312, quality_difference_error=0.0081)
    report = sample_report(student=replace(STUDENT, quality=quality), comparison=compared)
    assert _rows(report)[0][2:] == ("3.214 ± 0.021", "+0.031 ± 0.008")


def test_images_are_described_in_pixels():
    work = replace(WORKLOAD, sequence_length=None, input_shape=(4, 3, 224, 192), batch_size=4, threads=1)
    text = describe_workload(replace(STUDENT, workload=work))
    assert text == "batch 4, 224x192 pixels, 1 thread, float32 on cpu"


def test_structure():
    assert "8 of 12" in markdown_structure(sample_report()) and "removed" in markdown_structure(sample_report())
    assert markdown_structure(sample_report(structure=())) == ""
    assert "encoder" not in markdown_structure(sample_report())
    both = tuple(LayerStructure(0, 2, 4, 8, 16, "full", stack) for stack in ("encoder", "decoder"))
    assert "encoder 0" in markdown_structure(sample_report(structure=both))
    assert "decoder 0" in markdown_structure(sample_report(structure=both))
