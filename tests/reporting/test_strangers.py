"""A report that was edited by hand: what can be read can be shown in every way, and nothing of it is obeyed."""

import json
import math
import os
import re
import struct
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.io.codec import clean
from hf_efficient.reporting import plots
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.exported import best_export
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.plots import save_plots
from hf_efficient.reporting.schema import MAX_ITEMS, Quality, Report, Score, StageRecord
from hf_efficient.reporting.tables import format_ratio, format_speedup, markdown_results, text_table

from .pages import full_report, parsed
from .samples import COMPARISON, STUDENT, TEACHER, sample_report

EVIL = "\x1b[2J\u202e$\\frac{$ **b** [l](http://evil) ![i](http://evil/x.png) <img src=x> `c` | d\n# head\n---\nx: y"


def edited(**changes):
    """The report with values put at dotted places."""
    data = json.loads(full_report().to_json())
    for place, value in changes.items():
        *inside, last = place.split("__")
        at = data
        for key in inside:
            at = at[int(key) if key.isdigit() else key]
        at[int(last) if last.isdigit() else last] = value
    return Report.from_json(json.dumps(data))


def shown(report, folder):
    """In every way; of each text it is checked that it can be written."""
    texts = [text_table(report), report_page([report, report]), str(model_card(report))]
    save_plots(report, folder)
    for text in texts:
        text.encode("utf-8")
    return texts


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__quality__scores": []},
        {"exports__0__quality__scores": [], "exports__0__speedup": math.inf},
        {"teacher__size__parameters": 0, "teacher__size__nonzero_parameters": 5},
        {"student__size__peak_memory_bytes": 10**350, "student__size__bytes_on_disk": -(10**350)},
        {"student__latency__p95_ms": -5.0, "student__latency__min_ms": 1e300, "teacher__latency__median_ms": 1e-320},
        {"student__quality__scores__0__standard_error": -1.0, "exports__0__quality_difference": 1e306},
        {"comparison__speedup": 1e300, "comparison__mac_ratio": -1.0, "comparison__agreement": 1e308},
        {"stages__2__facts__curve": {"step": 1}},
        {"stages__2__facts__curve": [{"step": 1, "loss": "x" * 10}, {"step": 10**350, "loss": True}, None]},
        {"stages__2__facts__curve": [{"step": i, **{f"l{n}": 1.0 for n in range(40)}} for i in range(3000)]},
        {"auto_class": "AutoModel", "stages__0__settings": {"pooling": {"a": 1}}},
        {"stages__0__seconds": 1.7e308, "stages__1__seconds": -1.0},
        {"structure__0__neurons": 10**350, "structure__1__original_heads": -(10**350)},
        {"lengths__1__sequence_length": -(10**350), "lengths__0__teacher_ms": 1e305},
        {"student__workload__batch_size": 10**350, "student__workload__sequence_length": None},
        {"dataset__sizes": {"": 10**350}, "seed": -(10**350)},
        {
            "stages": [
                {
                    "name": "a",
                    "seconds": 1.0,
                    "settings": {},
                    "facts": {"energy": {"kwh": 1e300, "co2_grams": 1.0, "country": []}},
                }
            ]
        },
        {"warnings": ["\x00" * 1000, "y" * 300_000], "base_model": "z" * 300_000},
    ],
)
def test_whatever_can_be_read_can_be_shown(changes, tmp_path):
    table, page, _ = shown(edited(**changes), tmp_path)
    parsed(page)
    assert max(map(len, table.splitlines())) < 2100 and "nan%" not in page
    assert table != text_table(full_report()) or page != report_page([full_report(), full_report()])


def test_a_thousand_layers_and_hundreds_of_stages(tmp_path, monkeypatch):
    assert plots.LAYERS == 200
    monkeypatch.setattr(plots, "LAYERS", 20)  # of which a picture is drawn sooner
    layers = [{**json.loads(full_report().to_json())["structure"][0], "layer": n} for n in range(1200)]
    stages = [{"name": f"s{n}", "seconds": 1.0, "settings": {}, "facts": {}} for n in range(400)]
    _, page, card = shown(edited(structure=layers, stages=stages), tmp_path)
    assert "1199" in card and "s399" in card and "1199" in page
    width, height = struct.unpack(">II", (tmp_path / plots.STRUCTURE).read_bytes()[16:24])
    assert height < 2 * width  # of 20 layers; all of them would be 40 times as high as wide
    with pytest.raises(CheckpointError, match="warnings has 20,001 entries, at most 20,000"):
        edited(warnings=["x"] * (MAX_ITEMS + 1))


def everywhere(value):
    """The report with a text in each field that takes any."""
    data = json.loads(full_report().to_json())

    def put(at):
        for key, old in at.items() if isinstance(at, dict) else enumerate(at):
            if isinstance(old, (dict, list)):
                put(old)
            elif isinstance(old, str) and key not in ("auto_class", "processor_class", "loads_with"):
                at[key] = f"{value}{old}" if key in ("name", "quality_score") else value

    put(data)
    data["recipe"] |= {value: value, "text": "\x85 \u2028 ```"}
    return Report.from_json(json.dumps(data))


def test_no_field_is_obeyed_in_the_card():
    text = str(model_card(everywhere(EVIL), repo_id=EVIL, images=("structure.png",)))
    assert "\x1b" not in text and "\u202e" not in text and "\x85" not in text
    front, body = text.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n")) == ModelCard(text).data.to_dict()
    assert "license" not in front and "base_model" not in front
    fences = [line for line in body.splitlines() if line.startswith("```")]
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert len(fences) == 6 and len(outside) < len(body)
    assert not re.search(r"(?<!\\)\]\((?!structure.png)|<img|(?<!\\)\*\*b|^# head|^---", outside, re.MULTILINE)
    assert outside.count("\n# ") == 1
    for code in re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE):
        compile(code, "card", "exec")


def test_no_field_is_obeyed_in_page_table_and_plots(tmp_path):
    report = everywhere(EVIL)
    table, page, _ = shown(report, tmp_path)
    parsed(page)
    for text in (table, page):
        assert "\x1b" not in text and "\u202e" not in text and "\n# head" not in table
    assert "<img" not in page and "&lt;img" in page
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy_latency.png", "structure.png"}


def test_tex_never_reads_a_name(tmp_path):
    from matplotlib import rc_context, rcParams

    report = sample_report(recipe={"name": r"\input{/etc/hostname} $x$"})
    plain = [path.read_bytes() for path in save_plots(report, tmp_path)]
    with rc_context({"text.usetex": True}):
        assert [path.read_bytes() for path in save_plots(report, tmp_path)] == plain and rcParams["text.usetex"]


@pytest.mark.parametrize("name", ["AutoModel\nimport os", "os.system", "AutoModel()", "Model", "", "AutoModelÜ"])
def test_a_class_in_the_snippet_is_one_that_transformers_could_have(name):
    with pytest.raises(CheckpointError, match="auto_class must be as"):
        edited(auto_class=name)
    with pytest.raises(CheckpointError, match="processor_class must be as"):
        edited(processor_class=name.replace("AutoModel", "AutoTokenizer"))
    with pytest.raises(ConfigError, match="auto_class"):
        sample_report(auto_class=name)
    assert (
        edited(auto_class="AutoModelForNewThings", processor_class="AutoProcessor").processor_class == "AutoProcessor"
    )


def test_half_a_character_of_an_old_report_is_shown_escaped():
    text = full_report().to_json().replace("Calibration", "\\udce9 Calibration")
    report = Report.from_json(text)
    assert report.warnings[0].startswith("\\udce9 Cal") and Report.from_json(report.to_json()) == report


def test_secrets_leave_from_every_field():
    secret = "glpat-" + "aB3d" * 6
    report = replace(
        sample_report(
            stages=(StageRecord(secret, 1.0, {"wandbApiKey": "x", "pad_token": "[PAD]"}, {secret: secret}),)
        ),
        licence=secret,
        commit=secret,
        student=replace(STUDENT, model=f"https://me:pw@host/{secret}"),
        environment=replace(sample_report().environment, cpu=secret),
    )
    text = report.to_json()
    assert secret not in text and "pw@" not in text and "wandbApiKey" not in text and "[PAD]" in text
    assert clean({"a": secret}, [secret]) == {"a": "[removed]"} and clean("my word", ["my word"]) == "[removed]"
    assert sample_report().commit in sample_report().to_json()


@pytest.mark.parametrize(
    ("value", "ratio", "speedup"),
    [
        (0.96, "0.96x", "0.96x"),
        (0.9996, "0.9996x", "0.9996x"),
        (0.04, "0.040x", "0.040x"),
        (0.0042, "0.0042x", "0.0042x"),
    ]
    + [(1.04, "1.04x", "1.04x"), (8.224, "8.22x", "8.2x"), (13.56, "13.56x", "13.6x"), (1e300, "1e+300x", "1e+300x")],
)
def test_ratios_have_digits_enough(value, ratio, speedup):
    assert (format_ratio(value), format_speedup(value)) == (ratio, speedup)


def exports(*given):
    """(speed-up, difference in accuracy, its error) of each."""
    [one] = full_report().exports
    return tuple(
        replace(one, folder=f"f{n}", format=f"f{n}", speedup=a, quality_difference=b, quality_difference_error=c)
        for n, (a, b, c) in enumerate(given)
    )


@pytest.mark.parametrize(
    ("given", "best"),
    [
        (((3.0, -0.012, 0.001), (9.0, -0.40, 0.02)), "f0"),  # the student itself loses 0.0117
        (((3.0, -0.012, 0.001), (9.0, -0.013, 0.006)), "f1"),
        (((9.0, -0.40, 0.02), (3.0, 0.0, math.nan)), "f1"),
        (((9.0, -0.40, 0.02), (8.0, math.nan, 0.1)), None),
        ((), None),
    ],
)
def test_a_bad_export_is_no_headline(given, best):
    report = sample_report(exports=exports(*given))
    found = best_export(report)
    assert (found and found.format) == best
    page = report_page(report)
    tiles = page[page.index('class="tiles"') : page.index("</ul>")]
    assert ("in PyTorch, as f" in tiles) == (best is not None) and (best is None or f"as {best}, int8" not in tiles)


def test_the_export_that_is_worse_in_a_loss_is_no_headline():
    score = Score("loss", 3.2, 0.02, False)
    quality = Quality("causal-lm", 20, 900, (score,))
    compared = replace(COMPARISON, quality_score="loss", quality_difference=0.03)
    made = [replace(each, quality=quality) for each in exports((9.0, 0.5, 0.01), (4.0, 0.03, 0.01))]
    report = sample_report(exports=tuple(made), comparison=compared, student=replace(STUDENT, quality=quality))
    assert best_export(report) == made[1]


def test_the_readme_tells_what_an_export_lost():
    report = sample_report(exports=exports((9.0, -0.40, 0.02)), comparison=replace(COMPARISON, speedup=0.96))
    text = markdown_results({"bbc-news": report})
    assert "f0 9.0x (-40.0 ± 2.0 points)" in text and "0.96x" in text and "1.0x" not in text
    assert TEACHER.model not in text and os.sep in text
