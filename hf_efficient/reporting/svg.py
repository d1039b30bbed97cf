"""Small charts as SVG text for the report page. Colours come from the page's style sheet, so light and dark both work.

    scatter([Point(12.1, 98.8, "student", "student")], "latency, ms", "accuracy, %")
    lines([Line("student", "student", [(128, 3.1), (256, 6.0)])], "tokens", "ms")

Classes used: `teacher`, `student`, `other`, `grid`, `axis`, `label`; every mark has a title that a browser shows on
touch or hover.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 44
COLOURS = ("student", "other", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Point:
    """A dot: `error` is drawn up and down, `filled` False leaves it hollow."""

    x: float
    y: float
    label: str
    colour: str
    error: float = 0.0
    filled: bool = True


@dataclass(frozen=True)
class Line:
    """A curve of (x, y)."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Dots with names beside them; nothing for no finite point."""
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return ""
    errors = [point.error if math.isfinite(point.error) else 0.0 for point in shown]
    axes = _Axes(
        [0.0, *(point.x for point in shown)],
        [value for point, error in zip(shown, errors, strict=True) for value in (point.y - error, point.y + error)],
    )
    marks: list[str] = []
    taken: list[tuple[float, float]] = []
    for point, error in sorted(zip(shown, errors, strict=True), key=lambda pair: pair[0].y, reverse=True):
        x, y = axes.at(point.x, point.y)
        low, high = axes.at(point.x, point.y - error)[1], axes.at(point.x, point.y + error)[1]
        text_y = y + 4
        while any(abs(text_y - other) < 15 and abs(x - where) < 130 for where, other in taken):
            text_y += 15
        taken.append((x, text_y))
        right = x < LEFT + 0.7 * (WIDTH - LEFT - RIGHT)
        title = f"{point.label}: {_number(point.x)}, {_number(point.y)}"
        marks.append(
            f'<g class="{point.colour}"><title>{escape(title)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" class="error"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="{"dot" if point.filled else "dot hollow"}"/>'
            f'<text x="{x + (11 if right else -11):.1f}" y="{text_y:.1f}" '
            f'text-anchor="{"start" if right else "end"}">{escape(point.label)}</text></g>'
        )
    return _frame(axes, x_label, y_label, marks)


def lines(series: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves with a legend; nothing for no finite point."""
    cleaned = [
        Line(line.label, line.colour, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)])
        for line in series
    ]
    cleaned = [line for line in cleaned if line.points]
    if not cleaned:
        return ""
    every = [point for line in cleaned for point in line.points]
    axes = _Axes([x for x, _ in every], [0.0, *(y for _, y in every)])
    marks = []
    falls = sum(line.points[0][1] - line.points[-1][1] for line in cleaned) > 0  # the free corner is on the right
    legend, anchor = (WIDTH - RIGHT - 4, "end") if falls else (LEFT + 12, "start")
    for number, line in enumerate(cleaned):
        places = [axes.at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        few = len(places) <= 12
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot"><title>{escape(line.label)}: {_number(a)}, '
            f"{_number(b)}</title></circle>"
            for (x, y), (a, b) in zip(places, line.points, strict=True)
        )
        marks.append(
            f'<g class="{line.colour}"><polyline points="{path}" class="curve"/>{dots if few else ""}'
            f'<text x="{legend}" y="{TOP + 14 + 17 * number}" text-anchor="{anchor}">{escape(line.label)}</text></g>'
        )
    return _frame(axes, x_label, y_label, marks)


class _Axes:
    """Where values lie on the picture, with a little room around them, and the round numbers between."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]):
        self.x, self.y = _span(xs), _span(ys)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x, self.y
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or max(abs(high) * 0.05, 1e-9)
    return (0.0 if low == 0 else low - room), high + room


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _frame(axes: _Axes, x_label: str, y_label: str, marks: Sequence[str]) -> str:
    grid = []
    for value in ticks(*axes.y):
        _, y = axes.at(axes.x[0], value)
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        grid.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" class="label">{_number(value)}</text>')
    for value in ticks(*axes.x):
        x, _ = axes.at(value, axes.y[0])
        base = HEIGHT - BOTTOM
        grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}" class="axis"/>')
        grid.append(f'<text x="{x:.1f}" y="{base + 19}" text-anchor="middle" class="label">{_number(value)}</text>')
    names = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle" class="label">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle" '
        f'class="label">{escape(y_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">'
        f"{''.join(grid)}{names}{''.join(marks)}</svg>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
