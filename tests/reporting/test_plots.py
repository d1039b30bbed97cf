import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_efficient.errors import ConfigError, DataError
from hf_efficient.reporting.labels import place_labels
from hf_efficient.reporting.plots import plot_accuracy_latency, plot_structure, save_plots
from hf_efficient.reporting.schema import Latency, Quality, Score

from .samples import STUDENT, sample_report

pytest.importorskip("matplotlib")


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def colors(path):
    """How many pixels are neither white nor grey."""
    rgb = pixels(path)[..., :3]
    return int(((rgb.max(-1) - rgb.min(-1)) > 0.2).sum())


def test_both_are_written_and_show_something(tmp_path):
    written = save_plots(sample_report(), tmp_path)
    assert [path.name for path in written] == ["accuracy_latency.png", "structure.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        height, width = pixels(path).shape[:2]
        assert width > 900 and height > 400 and colors(path) > 500


def test_more_kept_is_more_colour(tmp_path):
    report = sample_report()
    half = tuple(replace(x, heads=x.heads // 2, neurons=x.neurons // 2) for x in report.structure)
    full, less = plot_structure(report, tmp_path / "a.png"), tmp_path / "b.png"
    plot_structure(replace(report, structure=half), less)
    assert colors(less) < 0.7 * colors(full)


def test_another_latency_is_another_picture_and_the_same_one_is_the_same(tmp_path):
    faster = replace(STUDENT, latency=Latency(4.0, 4.5, 3.9, 31, 4))
    for name, report in (("a", sample_report()), ("b", sample_report()), ("c", sample_report(student=faster))):
        plot_accuracy_latency(report, tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_labels_keep_clear_of_each_other_and_of_the_dots():
    from matplotlib.transforms import Bbox

    from hf_efficient.reporting.plots import _bars, _draw_point, _label_points, _points, new_figure

    reports = [
        sample_report(student=replace(STUDENT, latency=Latency(ms, 1.1 * ms, 0.95 * ms, 31, 4)))
        for ms in (6, 8, 10, 14)
    ]
    points = _points(reports, ["a recipe", "another recipe", "third recipe", "the last one"])
    assert [point.label for point in points if not point.filled] == ["all-MiniLM-L6-v2", "", "", ""]
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for point in points:
        _draw_point(axes, point)
    axes.margins(0.25)
    _label_points(figure, axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    bars = [Bbox.from_extents(*bar) for point in points for bar in _bars(axes, point)]
    assert not any(box.overlaps(bar) for box in boxes for bar in bars)


def test_a_name_takes_the_first_box_that_is_free_and_in_the_frame():
    left, right, above = (0, 0, 10, 5), (20, 0, 30, 5), (10, 8, 20, 13)
    frame = (0, 0, 25, 20)
    assert place_labels([[left, right, above]], [], frame) == [0]
    assert place_labels([[left, right, above]], [(5, 0, 6, 1)], frame) == [2]  # the right one leaves the frame
    assert place_labels([[left, above], [left, above]], [], frame) == [0, 1]  # a name is in the way of the next
    assert place_labels([[left, above]], [left, (10, 8, 20, 10)], frame) == [1]  # the least, where none is free


def test_several_reports_share_a_picture(tmp_path):
    reports = [sample_report(), sample_report(recipe={"name": "other"})]
    assert plot_accuracy_latency(reports, tmp_path / "pareto.png", labels=["a", "b"]).stat().st_size > 5000
    with pytest.raises(ConfigError, match="one label per report"):
        plot_accuracy_latency(reports, tmp_path / "x.png", labels=["a"])
    with pytest.raises(ConfigError, match="at least one report"):
        plot_accuracy_latency([], tmp_path / "x.png")


def test_reports_that_cannot_be_drawn_are_errors(tmp_path):
    nothing = sample_report(student=replace(STUDENT, quality=None), structure=())
    with pytest.raises(DataError, match="no quality"):
        plot_accuracy_latency(nothing, tmp_path / "x.png")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_structure(nothing, tmp_path / "x.png")
    assert save_plots(nothing, tmp_path) == []
    loss = Quality("causal-lm", 20, 900, (Score("loss", 3.2, 0.02, False),))
    with pytest.raises(DataError, match="accuracy, loss"):
        plot_accuracy_latency(sample_report(student=replace(STUDENT, quality=loss)), tmp_path / "x.png")
    longer = sample_report(student=replace(STUDENT, workload=replace(STUDENT.workload, sequence_length=512)))
    elsewhere = sample_report(environment=replace(sample_report().environment, cpu="another"))
    for other in (longer, elsewhere):
        with pytest.raises(DataError, match="workloads or machines"):
            plot_accuracy_latency([sample_report(), other], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "hf-efficient\[plots\]"'):
        plot_structure(sample_report(), tmp_path / "x.png")


@pytest.mark.processes
def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys; from tests.reporting.samples import sample_report as make; "
        "from hf_efficient.reporting.plots import save_plots; "
        f"n = len(save_plots(make(), {str(tmp_path)!r})); print(n, 'matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "2 False", done.stderr
