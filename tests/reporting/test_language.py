"""What a report says of a language model: further texts, writing, samples; in card and page, and back from JSON."""

import json
from dataclasses import replace

from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.exported import name_export
from hf_efficient.reporting.language import Decoding, Domain, Generation, Sample
from hf_efficient.reporting.language_tables import SHOWN, language_rows, samples
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.schema import Report

from .pages import full_report
from .samples import sample_report

GENERATION = Generation(
    batch_size=3,
    prompt_tokens=417,
    new_tokens=53,
    rounds=7,
    teacher=Decoding(812.0, 44.4, 9_600_000),
    student=Decoding(406.0, 33.3, 7_200_000),
    acceptance=0.731,
    samples=(Sample("Why?", "Because *it* is.", "<b>Because\nit was."),),
)
DOMAIN = Domain("bundled:film-plots", 96, "perplexity", 31.25, 36.5, 5.25, 0.42, 0.6543)


def told(**changes) -> Report:
    return sample_report(domains=(DOMAIN,), generation=GENERATION, **changes)


def test_the_rows():
    assert language_rows(told()) == [
        ("perplexity on bundled:film-plots", "31.25", "36.5", "+5.25 ± 0.42"),
        ("reading 417 tokens", "812 ms", "406 ms", "2.0x speed-up"),
        ("each token written", "44.4 ms", "33.3 ms", "1.3x speed-up"),
        ("cache", "9.60 MB", "7.20 MB", "0.75x"),
        ("drafts that the teacher takes", "", "73.1%", ""),
    ]
    assert language_rows(sample_report()) == []


def test_an_export_that_writes_has_a_row():
    [plain] = full_report().exports
    cached = replace(plain, cache=True, writing=Decoding(99.0, 11.1, 7_200_000), writing_speedup=4.0)
    report = told(exports=(plain, cached))
    rows = [row for row in language_rows(report) if "onnx" in row[0]]
    assert rows == [("each token written, onnx, cache, int8", "", "11.1 ms", "4.0x speed-up")]
    assert Report.from_json(report.to_json()) == report and name_export(plain) == "onnx, int8"
    assert "each token written, onnx, cache, int8" in str(model_card(report))


def test_a_report_comes_back_from_json_and_old_ones_have_none():
    assert Report.from_json(told().to_json()) == told()
    text = sample_report().to_dict()
    assert not {"domains", "generation"} & text.keys() and {"domains", "generation"} <= told().to_dict().keys()
    assert Report.from_json(json.dumps(text)) == sample_report()


def test_the_card_shows_all_and_obeys_nothing():
    card = str(model_card(told()))
    for fact in (
        "31.25",
        "+5.25 ± 0.42",
        "2.0x speed-up",
        "9.60 MB",
        "73.1%",
        "batch 3, 53 tokens after 417",
        "7 rounds",
    ):
        assert fact in card, fact
    assert "## What they write" in card and r"Because \*it\* is." in card
    assert "<b>" not in card and "&lt;b&gt;Because it was." in card
    plain = str(model_card(sample_report()))
    assert "What they write" not in plain and "Writing:" not in plain and "\n\n\n" not in card


def test_the_page_shows_them():
    page = report_page(told())
    assert "As a language model" in page and "&lt;b&gt;Because" in page and "<b>Because" not in page
    assert "As a language model" not in report_page(sample_report())


def test_long_texts_are_cut():
    long = replace(GENERATION, samples=(Sample("a", "b" * 5000, "c"),))
    [[_, text, _]] = samples(sample_report(generation=long))
    assert len(text) == SHOWN + 4 and text.endswith(" ...")
