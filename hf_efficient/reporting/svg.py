"""Small charts as SVG text for the report page. Colours come from the page's style sheet, so light and dark both work.

    scatter([Point(12.1, 98.8, "student", "student")], "latency, ms", "accuracy, %")
    lines([Line("student", "student", [(128, 3.1), (256, 6.0)])], "tokens", "ms")

Classes used: `teacher`, `student`, `other`, `grid`, `axis`, `label`, `front`; every mark has a title that a browser
shows on touch or hover, and a reader who cannot see the chart hears its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from ..io.text import for_line
from .labels import Box, place_labels

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 18, 14, 48
LABEL, DOTS = 40, 200  # at most so many characters of a name, and so many dots with names
LARGEST = 1e100  # beyond it differences of floats are no floats
SMALLEST = 1 / LARGEST  # on an axis of powers of ten
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


def drawable(*values: float) -> bool:
    """Whether all of them have a place in a chart."""
    return all(abs(value) < LARGEST for value in values)  # nan is not below anything


def _label(text: str) -> str:
    return escape(for_line(text, LABEL))


def scatter(points: Sequence[Point], x_label: str, y_label: str, best: str | None = None, powers: bool = False) -> str:
    """Dots with names beside them, of the first 200; nothing for no finite point.

    Parameters:
        best: `"high"` or `"low"`: joins the points to which no other is better in y and as low in x.
        powers: x in powers of ten; what is not above 0 has no place there.
    """
    placed = [each for each in points if drawable(each.x, each.y) and (not powers or each.x > SMALLEST)]
    shown = [replace(point, label=for_line(point.label, LABEL)) for point in placed[:DOTS]]
    if not shown:
        return ""
    shown = [point if drawable(point.error) else replace(point, error=0.0) for point in shown]
    ends = [value for point in shown for value in (point.y - point.error, point.y + point.error)]
    said = [_said(point) for point in shown]
    if powers:
        shown = [replace(point, x=math.log10(point.x)) for point in shown]
    axes = _Axes([*([] if powers else [0.0]), *(point.x for point in shown)], ends)
    labels = _labels(axes, shown)
    marks = [_front(axes, shown, best)] if best else []
    for point, told, (x, y, anchor) in zip(shown, said, labels, strict=True):
        at_x, at_y = axes.at(point.x, point.y)
        low, high = axes.at(point.x, point.y - point.error)[1], axes.at(point.x, point.y + point.error)[1]
        marks.append(
            f'<g class="{point.colour}"><title>{escape(told)}</title>'
            f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{low:.1f}" y2="{high:.1f}" class="error"/>'
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="6" class="{"dot" if point.filled else "dot hollow"}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(point.label)}</text></g>'
        )
    named = [told for point, told in zip(shown, said, strict=True) if point.label]
    return _frame(axes, x_label, y_label, marks, named, powers)


def _said(point: Point) -> str:
    return f"{point.label}: {_number(point.x)}, {_number(point.y)}"


def _front(axes: "_Axes", points: Sequence[Point], best: str) -> str:
    """The line through what nothing else beats in both."""
    sign = 1 if best == "high" else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.x, -sign * each.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    path = " ".join("{:.1f},{:.1f}".format(*axes.at(point.x, point.y)) for point in front)
    return f'<polyline points="{path}" class="front"/>' if len(front) > 1 else ""


def _labels(axes: "_Axes", points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """Where each name stands, and how it is aligned."""
    taken: list[Box] = []
    ways: list[list[tuple[float, float, str]]] = []
    for point in points:
        x, y = axes.at(point.x, point.y)
        low, high = axes.at(point.x, point.y - point.error)[1], axes.at(point.x, point.y + point.error)[1]
        taken += [(x - 8, y - 8, x + 8, y + 8), (x - 2, high, x + 2, low)]
        near = [(x + 12, y + 5, "start"), (x - 12, y + 5, "end")]
        near += [(x, high - 6 - row, "middle") for row in (0, 17)] + [(x, low + 16 + row, "middle") for row in (0, 17)]
        near += [(x + 12, y + 5 + row, "start") for row in (-18, 18, -36, 36)]
        ways.append(near + [(x - 12, y + 5 + row, "end") for row in (-18, 18, -36, 36)])
    boxes = [[_box(way, 7.6 * len(point.label)) for way in near] for near, point in zip(ways, points, strict=True)]
    chosen = place_labels(boxes, taken, (LEFT, TOP - 10, WIDTH - 4, HEIGHT - BOTTOM))
    return [near[place] for near, place in zip(ways, chosen, strict=True)]


def _box(way: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = way
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - 12, left + width, y + 3


def lines(series: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves with a legend; nothing for no finite point."""
    cleaned = [Line(line.label, line.colour, [(x, y) for x, y in line.points if drawable(x, y)]) for line in series]
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
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot"><title>{_label(line.label)}: {_number(a)}, '
            f"{_number(b)}</title></circle>"
            for (x, y), (a, b) in zip(places, line.points, strict=True)
        )
        marks.append(
            f'<g class="{line.colour}"><polyline points="{path}" class="curve"/>{dots if few else ""}'
            f'<text x="{legend}" y="{TOP + 14 + 19 * number}" text-anchor="{anchor}">{_label(line.label)}</text></g>'
        )
    said = [
        f"{for_line(line.label, LABEL)}: {_number(line.points[0][1])} to {_number(line.points[-1][1])}"
        for line in cleaned
    ]
    return _frame(axes, x_label, y_label, marks, said)


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
    flat = high - low <= 1e-12 * max(abs(high), abs(low), 1e-6)  # too near for a float to tell apart
    room = max(abs(high) * 0.05, 1e-9) if flat else 0.12 * (high - low)
    return (0.0 if low == 0 else low - room), high + room


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: 1, 2, 5 and 10 where there is room, else some of them."""
    steps = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 4 else (1,)
    every = max(1, math.ceil((high - low) / 8))
    numbers = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1, every) for step in steps]
    return [number for number in numbers if low <= math.log10(number) <= high]


def _frame(
    axes: _Axes, x_label: str, y_label: str, marks: Sequence[str], said: Sequence[str], powers: bool = False
) -> str:
    grid = []
    for value in ticks(*axes.y):
        _, y = axes.at(axes.x[0], value)
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        grid.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" class="label">{_number(value)}</text>')
    for value in _powers(*axes.x) if powers else ticks(*axes.x):
        x, _ = axes.at(math.log10(value) if powers else value, axes.y[0])
        base = HEIGHT - BOTTOM
        grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}" class="axis"/>')
        grid.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle" class="label">{_number(value)}</text>')
    names = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle" class="label">'
        f"{_label(x_label)}</text>"
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle" '
        f'class="label">{_label(y_label)}</text>'
    )
    name = for_line(f"{y_label} against {x_label}. {'; '.join(said)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">'
        f"{''.join(grid)}{names}{''.join(marks)}</svg>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
