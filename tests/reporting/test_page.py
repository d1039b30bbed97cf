"""The report as a page: complete, self-contained, escaped; rendered by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import pytest

from hf_efficient import ConfigError
from hf_efficient.reporting.page import PAGE, report_page, save_page
from hf_efficient.reporting.svg import Line, Point, lines, scatter, ticks

from .pages import full_report, parsed
from .samples import STUDENT, sample_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_it_shows_all_that_was_measured():
    report, page = full_report(), report_page(full_report())
    for heading in (
        "Teacher and student",
        "In other runtimes",
        "Quality and latency",
        "Latency against length",
        "Training: distill",
        "What is left of each layer",
        "What was done",
        "How to load",
        "To know",
        "Where it was measured",
    ):
        assert f">{heading}" in page, heading
    assert "9.4x" in page and "onnx, int8" in page and report.warnings[0] in page
    assert page.count("<svg") == 3 and "import hf_efficient" in page


def test_several_results_are_compared_first():
    fast = replace(STUDENT, latency=replace(STUDENT.latency, median_ms=3.0))
    reports = [sample_report(), sample_report(student=fast)]
    page = report_page(reports, ["ratio=0.3", "ratio=0.7"])
    head = page[page.index("<h1") : page.index("<article")]
    assert "Quality and latency of all" in head and head.count("<svg") == 1 and head.count("<circle") == 4
    assert 'class="front"' in head and head.count('<th scope="row">ratio=0.') == 2
    assert page.count("<h1") == 1 and page.count('<h2 class="title">') == 2


def test_those_who_cannot_see_it_hear_it():
    page = report_page(full_report())
    charts = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', page)
    assert len(charts) == page.count("<svg") == 3
    assert any("bbc-fast: 10.58, 95.55" in each for each in charts)
    assert page.count("<table") == page.count('role="region" tabindex="0" aria-label="')
    assert '<html lang="en">' in page and page.count("<h1") == 1


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_background(scheme):
    """At least 4.5 to 1, as WCAG AA asks of text."""
    blocks = re.findall(r":root \{(.*?)\}", report_page(sample_report()), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[("light", "dark").index(scheme)]))
    texts = {name for name in colours if name not in ("page", "card", "rule", "bar")}
    assert len(texts) == 9
    for name in texts:
        for ground in ("page", "card"):
            low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_it_needs_nothing_but_itself():
    tree = parsed(report_page([full_report(), sample_report()], ["a", "b"]))
    assert all(link == "data:," or (link.startswith("#") and link[1:] in tree.ids) for link in tree.links)
    assert not re.search(r"https?://|<script|@import|url\(", report_page(full_report()))


def test_what_a_report_says_cannot_become_code():
    evil = '<script>alert("x")</script>'
    report = replace(full_report(), base_model=evil, warnings=(evil,), recipe={"name": evil})
    page = report_page(report, repo_id=evil)
    parsed(page)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_report_with_the_least_is_a_page_too():
    bare = replace(
        sample_report(),
        teacher=None,
        comparison=None,
        structure=(),
        stages=(),
        warnings=(),
        dataset=None,
        student=replace(STUDENT, quality=None),
    )
    page = report_page(bare)
    parsed(page)
    assert "<svg" not in page and "To know" not in page


def test_it_is_written_whole(tmp_path):
    path = save_page(sample_report(), tmp_path)
    assert path.name == PAGE and path.read_text(encoding="utf-8") == report_page(sample_report())
    assert [each.name for each in tmp_path.iterdir()] == [PAGE]
    with pytest.raises(ConfigError, match="one name for each"):
        report_page([sample_report()], ["a", "b"])


def test_charts_leave_out_what_is_not_finite():
    nan = float("nan")
    assert (
        scatter([Point(nan, 1, "a", "student")], "x", "y") == "" == lines([Line("a", "student", [(1, nan)])], "x", "y")
    )
    chart = scatter([Point(1, 2, "a <b>", "student", error=nan), Point(2, 2, "b", "teacher", filled=False)], "x", "y")
    assert "nan" not in chart and "a &lt;b&gt;" in chart and chart.count("<circle") == 2 and "hollow" in chart
    assert "nan" not in lines([Line("a", "student", [(1, 5.0), (2, nan), (3, 5.0)])], "x", "y")


def test_the_front_leaves_out_what_is_beaten():
    points = [Point(1, 5, "a", "s"), Point(2, 4, "beaten", "s"), Point(3, 9, "b", "s")]
    assert scatter(points, "x", "y").count('class="front"') == 0
    high, low = (scatter(points, "x", "y", best) for best in ("high", "low"))
    count = [len(re.search(r'points="([^"]+)" class="front"', chart)[1].split()) for chart in (high, low)]
    assert count == [2, 2] and high != low  # a and b; a and the one that is lower


def test_names_do_not_lie_on_each_other():
    points = [Point(10 + i, 98.8, f"name {i}", "student", error=0.5) for i in range(4)]
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="\w+">name', scatter(points, "x", "y"))
    assert len(set(places)) == 4


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.019), (3, 5300), (-2, 7), (96.1, 99.3)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


PROBE = """<script>
const links = [...document.querySelectorAll("a")];
links.forEach(link => link.click());
parent.postMessage(JSON.stringify({
  width: innerWidth,
  fits: document.documentElement.scrollWidth <= innerWidth,
  charts: document.querySelectorAll("svg").length,
  written: [...document.querySelectorAll("svg text")].every(
    each => !each.textContent || each.getBoundingClientRect().width > 0),
  inside: [...document.querySelectorAll("svg")].every(chart => [...chart.querySelectorAll("text")].every(each => {
    const [box, frame] = [each.getBoundingClientRect(), chart.getBoundingClientRect()];
    return box.left >= frame.left - 1 && box.right <= frame.right + 1;
  })),
  links: links.length,
  led: links.every(link => document.querySelector(link.hash) !== null)
    && (!links.length || location.hash === links.at(-1).hash),
  dark: getComputedStyle(document.body).backgroundColor === "rgb(18, 22, 28)",
  fetched: performance.getEntriesByType("resource").length,
}), "*");
</script></body>"""
# A window cannot be made as narrow as a phone, a frame can.
FRAME = """<meta name="color-scheme" content="light dark"><script>
addEventListener("message", event => document.title = event.data);
</script><iframe src="probe.html" style="border: 0; height: 900px; width: {width}px"></iframe>"""


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("width", "dark", "several"), [(390, False, False), (390, True, True), (1200, False, True), (1200, True, False)]
)
def test_a_browser_shows_it_without_errors(width, dark, several, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    flags += ["--v=0", "--window-size=1300,900", "--virtual-time-budget=3000"] + ["--force-dark-mode"] * dark
    page = report_page([full_report(), full_report()], ["ratio=0.3", "ratio=0.7"]) if several else None
    page = (page or report_page(full_report())).replace("</body>", PROBE)
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    target = tmp_path / "frame.html"
    target.write_text(FRAME.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", target.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    assert "CONSOLE" not in done.stderr
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found == {
        "width": width,
        "fits": True,
        "charts": 7 if several else 3,
        "written": True,
        "inside": True,
        "links": 2 * several,
        "led": True,
        "dark": dark,
        "fetched": 0,
    }
