"""The pictures of a report: quality against latency, the ladder, and what is left of each layer.

    plot_accuracy_latency([report_a, report_b], "accuracy_latency.png")    # several reports: one Pareto picture
    plot_ladder(report, "ladder.png")                                      # beside what is cheap to try
    plot_structure(report, "structure.png")

Needs matplotlib (`pip install "hf-efficient[plots]"`). Only Figure objects are used, never pyplot, so a caller's
backend and open figures stay as they are. No name is read as mathematics or TeX, whatever it holds.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ..errors import ConfigError, DataError
from ..io.disk import write_atomic
from ..io.text import for_plot
from .labels import Box, place_labels
from .ladder import Ladder
from .numbers import is_fraction, scale_of
from .schema import Latency, Quality, Report, Score
from .svg import SMALLEST, drawable
from .tables import describe_machine, describe_workload, kept, layer_names

ACCURACY_LATENCY = "accuracy_latency.png"
STRUCTURE = "structure.png"
LADDER = "ladder.png"
LAYERS, RUNGS = 200, 20  # at most so many rows of a picture, and so many ways
Draw = TypeVar("Draw", bound=Callable[..., Any])

_TEACHER, _TEXT, _FAINT, _GRID = "#6b7280", "#1f2937", "#d5dae1", "#eceff3"
# Okabe and Ito's palette: told apart by colour-blind readers too.
_STUDENTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Where a label may stand: at the dot (0) or an end of its error bar (1, -1), how many points from there, alignment.
_PLACES = (
    *((0, 12, 12, "left", "bottom"), (0, 12, -12, "left", "top")),
    *((0, -12, 12, "right", "bottom"), (0, -12, -12, "right", "top")),
    *((1, 0, 8, "center", "bottom"), (-1, 0, -8, "center", "top")),
    *((1, 0, 22, "center", "bottom"), (-1, 0, -22, "center", "top")),
    *((1, 0, 36, "center", "bottom"), (-1, 0, -36, "center", "top")),
)


def save_plots(report: Report, folder: str | Path) -> list[Path]:
    """Draw into `folder` what the report has the data for, under the names that the model card looks for."""
    folder, written = Path(folder), []
    if report.student.quality is not None:
        with contextlib.suppress(DataError):  # teacher and student that cannot share a picture
            written.append(plot_accuracy_latency(report, folder / ACCURACY_LATENCY))
    if report.ladder is not None:
        with contextlib.suppress(DataError):  # not one finite number
            written.append(plot_ladder(report, folder / LADDER))
    if report.structure:
        written.append(plot_structure(report, folder / STRUCTURE))
    return written


def without_tex(draw: Draw) -> Draw:
    """The same function, where a user's matplotlibrc has `text.usetex` too: TeX would run what a name says."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        try:
            from matplotlib import rc_context
        except ImportError:
            raise ConfigError('Plots need matplotlib. Run `pip install "hf-efficient[plots]"`.') from None
        with rc_context({"text.usetex": False, "text.parse_math": True}):
            return draw(*arguments, **options)

    return cast(Draw, drawn)


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError('Plots need matplotlib. Run `pip install "hf-efficient[plots]"`.') from None
    figure = Figure(
        figsize=(width, height), dpi=150, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    )
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    path, picture = Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in letters that it lacks
        figure.savefig(picture, format="png")
    return write_atomic(path, picture.getvalue())


@dataclass(frozen=True)
class _Point:
    label: str
    color: str
    filled: bool
    latency: Latency
    quality: Quality

    @property
    def x(self) -> float:
        return self.latency.median_ms

    @property
    def y(self) -> float:
        return scale_of(self.quality.main.name) * self.quality.main.value

    @property
    def error(self) -> float:
        return _length(scale_of(self.quality.main.name) * self.quality.main.standard_error)  # one sample has none


def _length(value: float) -> float:
    """Of an error bar: none where it is negative or no number."""
    return value if drawable(value) and value > 0 else 0.0


@without_tex
def plot_accuracy_latency(
    reports: Report | Sequence[Report], path: str | Path, labels: Sequence[str] | None = None
) -> Path:
    """Main score against median latency; bars: standard error, and fastest to 95th percentile time.

    Parameters:
        reports: each gives its teacher (hollow) and its student (filled); all must have the same main score.
        labels: names of the students, one per report; default: the recipe's name, else the stages.

    Raises:
        DataError: a report without quality or without finite numbers, or reports with different scores, workloads or
            machines.
        ConfigError: matplotlib is missing, or not one label per report.
    """
    reports = [reports] if isinstance(reports, Report) else list(reports)
    points = _points(reports, labels)
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for point in points:
        _draw_point(axes, point)
    axes.margins(x=0.22, y=0.25)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    name = points[0].quality.main
    better = "higher is better" if name.higher_is_better else "lower is better"
    unit = " (%)" if is_fraction(name.name) else ""
    workload = for_plot(describe_workload(reports[0].student), 90)
    _dress(axes, f"median latency (ms), {workload}", f"{for_plot(name.name, 30)}{unit}, {better}")
    axes.set_title("Quality and latency", loc="left", fontsize=12, fontweight="bold", color=_TEXT, pad=22)
    machine, samples = for_plot(describe_machine(reports[0]), 60), for_plot(str(points[0].quality.samples))
    note = f"{machine}; {samples} samples, bars: ±1 standard error, fastest to p95 time"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8, color=_TEACHER)
    _label_points(figure, axes, points)
    return save_figure(figure, path)


def _points(reports: list[Report], labels: Sequence[str] | None) -> list[_Point]:
    if not reports or (labels is not None and len(labels) != len(reports)):
        raise ConfigError(f"Give at least one report and one label per report, got {len(reports)} and {labels!r}.")
    points: list[_Point] = []
    for number, report in enumerate(reports):
        usual = str(report.recipe.get("name") or " + ".join(stage.name for stage in report.stages) or "student")
        names = (report.base_model.split("/")[-1], usual if labels is None else labels[number])
        colors = (_TEACHER, _STUDENTS[number % len(_STUDENTS)])
        for filled, measured in enumerate((report.teacher, report.student)):
            if measured is None:
                continue
            if measured.quality is None:
                raise DataError("A report has no quality to plot. Measure it with a data set.")
            # A teacher that several reports share is named once.
            named = any(not filled and not p.filled and p.label == for_plot(names[0]) for p in points)
            label = "" if named else names[filled]
            point = _Point(for_plot(label), colors[filled], bool(filled), measured.latency, measured.quality)
            points += [point] * drawable(point.x, point.y)
    if not points:
        raise DataError("No time and score of the reports are finite numbers, so there is nothing to draw.")
    scores = {point.quality.main.name for point in points}
    if len(scores) > 1:
        raise DataError(f"Reports with different scores cannot share a plot: {', '.join(sorted(scores))}.")
    all_measured = [m for report in reports for m in (report.teacher, report.student) if m is not None]
    if (
        len({describe_workload(m) for m in all_measured}) > 1
        or len({describe_machine(report) for report in reports}) > 1
    ):
        raise DataError("Latencies of different workloads or machines cannot share a plot. Measure all the same way.")
    return points


def _draw_point(axes: Any, point: _Point) -> None:
    latency = point.latency
    axes.errorbar(
        point.x,
        point.y,
        xerr=[[_length(point.x - latency.min_ms)], [_length(latency.p95_ms - point.x)]],
        yerr=point.error,
        fmt="o",
        markersize=8,
        color=point.color,
        markerfacecolor=point.color if point.filled else "white",
        markeredgewidth=1.6,
        elinewidth=1.1,
        capsize=2.5,
        zorder=3,
    )


def _label_points(figure: Any, axes: Any, points: list[_Point]) -> None:
    """Put each name where it covers neither a dot, nor an error bar, nor another name, nor leaves the axes."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = [box for point in points for box in _bars(axes, point)]
    named = [point for point in points if point.label]
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "zorder": 4}
    choices = []
    for point in named:
        text = axes.annotate(point.label, (point.x, point.y), (0, 0), **style)
        width, height = text.get_window_extent(renderer).size
        text.remove()
        choices.append([_box(axes, point, place, width, height, figure.dpi / 72) for place in _PLACES])
    chosen = place_labels(choices, taken, tuple(axes.get_window_extent(renderer).extents))
    for point, number in zip(named, chosen, strict=True):
        end, dx, dy, ha, va = _PLACES[number]
        at = (point.x, point.y + end * point.error)
        axes.annotate(point.label, at, (dx, dy), ha=ha, va=va, color=point.color, **style)


def _box(axes: Any, point: _Point, place: tuple, width: float, height: float, scale: float) -> Box:
    """Where a name of that size would be, in pixels."""
    end, dx, dy, ha, va = place
    x, y = axes.transData.transform((point.x, point.y + end * point.error)) + (dx * scale, dy * scale)
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[ha] * width
    low = y if va == "bottom" else y - height
    return left, low, left + width, low + height


def _bars(axes: Any, point: _Point) -> list[Box]:
    """The boxes of a point's two error bars, in pixels."""
    latency = point.latency
    low, high = _length(point.x - latency.min_ms), _length(latency.p95_ms - point.x)
    across = [(point.x - low, point.y), (point.x + high, point.y)]
    along = [(point.x, point.y - point.error), (point.x, point.y + point.error)]
    return [(x0 - 8, y0 - 8, x1 + 8, y1 + 8) for (x0, y0), (x1, y1) in map(axes.transData.transform, (across, along))]


@without_tex
def plot_ladder(report: Report, path: str | Path) -> Path:
    """Main score against the time of a batch, in powers of ten, of all rungs of the ladder; filled: the result.

    Of more than 20 rungs the first 20 are drawn. The dashed line joins what no other beats in both.

    Raises:
        DataError: the report has no ladder, or no finite numbers in it. ConfigError: matplotlib is missing.
    """
    ladder = report.ladder
    points = [] if ladder is None else _rungs(ladder)
    if ladder is None or not points:
        raise DataError("The report has no ladder with finite numbers, so there is nothing to draw.")
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for point in points:
        _draw_point(axes, point)
    sign, front = (1 if ladder.higher_is_better else -1), list[_Point]()
    for point in sorted(points, key=lambda each: (each.x, -sign * each.y)):
        front += [point] * (not front or sign * point.y > sign * front[-1].y)
    axes.plot([point.x for point in front], [point.y for point in front], "--", color=_FAINT, zorder=1)
    axes.margins(x=0.22, y=0.25)
    axes.xaxis.set_major_formatter("{x:g}")
    unit = " (%)" if is_fraction(ladder.score) else ""
    batch = for_plot(f"a batch of {ladder.batch_size}, from text to answer (ms)", 60)
    _dress(axes, batch, f"{for_plot(ladder.score, 30)}{unit}")
    axes.set_title("Beside what is cheap to try", loc="left", fontsize=12, fontweight="bold", color=_TEXT, pad=22)
    note = f"{for_plot(describe_machine(report), 60)}; filled: the result; bars: ±1 standard error"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8, color=_TEACHER)
    _label_points(figure, axes, points)
    return save_figure(figure, path)


def _rungs(ladder: Ladder) -> list[_Point]:
    """Of those that have a time and a score."""
    points = []
    for rung in ladder.rungs[:RUNGS]:
        latency = Latency(rung.median_ms, rung.median_ms, rung.median_ms, 0, 0)
        score = Score(ladder.score, rung.score, rung.standard_error, ladder.higher_is_better)
        ours = rung.kind in ("student", "export")
        color = _STUDENTS[0] if ours else _TEACHER if rung.kind == "teacher" else _STUDENTS[1]
        point = _Point(for_plot(rung.name), color, ours, latency, Quality("", 0, 0, (score,)))
        points += [point] * (drawable(point.x, point.y) and point.x > SMALLEST)
    return points


@without_tex
def plot_structure(report: Report, path: str | Path) -> Path:
    """Heads and neurons kept in each layer (dark) of those it had (light), and the attention each layer uses.

    Of more than 200 layers the first 200 are drawn.

    Raises:
        DataError: the report has no structure. ConfigError: matplotlib missing.
    """
    every, layers = report.structure, report.structure[:LAYERS]
    if not layers:
        raise DataError("The report does not say what is left of each layer, so there is nothing to draw.")
    figure = new_figure(8.4, 1.2 + 0.3 * max(len(layers), 4))
    heads, neurons, attention = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 0.6))
    _draw_kept(heads, [(x.heads, x.original_heads) for x in layers], "heads", _STUDENTS[0])
    _draw_kept(neurons, [(x.neurons, x.original_neurons) for x in layers], "neurons", _STUDENTS[2])
    heads.set_yticks(range(len(layers)), [for_plot(name, 30) for name in layer_names(every)[:LAYERS]])
    heads.set_ylabel("layer", fontsize=9.5, color=_TEXT)
    heads.set_ylim(len(layers) - 0.5, -0.5)
    attention.set_axis_off()
    attention.set_title("attention", loc="left", fontsize=9.5, color=_TEXT, pad=4)
    for row, layer in enumerate(layers):
        color = _TEACHER if layer.attention in ("full", "removed") else _STUDENTS[1]
        attention.text(0, row, for_plot(layer.attention, 20), va="center", fontsize=8.5, color=color)
    total = sum(x.original_heads > 0 and x.heads == 0 and x.neurons == 0 for x in every)
    removed = f", {total} of {len(every)} layers removed" if total else ""
    first = f" (the first {LAYERS} of {len(every):,})" if len(every) > LAYERS else ""
    title = f"What is left of each layer of {for_plot(report.base_model.split('/')[-1])}{removed}{first}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_TEXT)
    return save_figure(figure, path)


def _draw_kept(axes: Any, counts: list[tuple[int, int]], what: str, color: str) -> None:
    rows = range(len(counts))
    # As lengths of bars: from 0 to a number that a float holds.
    bars = [tuple(float(max(0, min(count, 10**12))) for count in pair) for pair in counts]
    axes.barh(rows, [original for _, original in bars], height=0.66, color=_FAINT)
    axes.barh(rows, [left for left, _ in bars], height=0.66, color=color)
    widest = max(1.0, *(original for _, original in bars))
    for row, (pair, (_, original)) in enumerate(zip(counts, bars, strict=True)):
        axes.text(original + 0.02 * widest, row, kept(*pair), va="center", fontsize=8, color=_TEXT)
    _dress(axes, "", "")
    axes.set_xlim(0, 1.42 * widest)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(what, loc="left", fontsize=9.5, color=_TEXT, pad=4)


def _dress(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=9.5, color=_TEXT)
    axes.set_ylabel(ylabel, fontsize=9.5, color=_TEXT)
    axes.tick_params(labelsize=8.5, colors=_TEXT)
    axes.grid(True, color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
