"""The report as one self-contained page: no script, no font, no picture is fetched, so it works offline and by mail.

save_page(report, "out/model")                           # out/model/report.html
report_page([one, two, three])                           # several results: a common plot, then each
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .card import recipe_text
from .schema import Measurement, Report, StageRecord
from .svg import COLOURS, Line, Point, lines, scatter
from .tables import (
    EXPORT_HEADER,
    HEADER,
    RESULTS_HEADER,
    comparison_rows,
    describe_energy,
    describe_footprint,
    describe_machine,
    describe_workload,
    export_rows,
    format_bytes,
    format_count,
    format_difference,
    format_ms,
    format_ratio,
    format_score,
    is_fraction,
    listed,
    name_layer,
    result_rows,
)
from .usage import loading_snippet

PAGE = "report.html"
TEMPLATE = Path(__file__).resolve().parent.parent / "templates" / "report.html"


def report_page(
    reports: Report | Sequence[Report], names: Sequence[str] | None = None, repo_id: str = "path/to/this/model"
) -> str:
    """The page as text. Everything that comes from a report is escaped.

    Parameters:
        reports: one, or several: those get a common plot and table first.
        names: of the reports; default: their recipes' names.

    Raises:
        ConfigError: no report, or not one name for each.
    """
    from jinja2 import Environment

    reports = [reports] if isinstance(reports, Report) else list(reports)
    names = [_name(report) for report in reports] if names is None else list(names)
    if not reports or len(names) != len(reports):
        raise ConfigError(f"Give at least one report and one name for each, got {len(reports)} and {len(names)}.")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        title=names[0] if len(names) == 1 else f"{len(names)} results",
        results=[_result(report, name, repo_id) for report, name in zip(reports, names, strict=True)],
        pareto=_pareto(reports, names) if len(reports) > 1 else "",
        summary_header=RESULTS_HEADER,
        summary=[row for each, name in zip(reports, names, strict=True) for row in result_rows({name: each})],
    )


def save_page(report: Report, folder: str | Path, repo_id: str = "path/to/this/model") -> Path:
    """Write `report.html` into a folder; complete or not at all."""
    target = Path(folder) / PAGE
    part = target.with_name(f".{PAGE}.{os.getpid()}.part")
    try:
        part.write_text(report_page(report, repo_id=repo_id), encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _name(report: Report) -> str:
    return str(report.recipe.get("name") or report.base_model)


def _result(report: Report, name: str, repo_id: str) -> dict[str, Any]:
    return {
        "name": name,
        "report": report,
        "snippet": loading_snippet(report, repo_id),
        "recipe": recipe_text(report),
        "energy": describe_energy(report.student),
        "footprint": describe_footprint(report),
        "tiles": _tiles(report),
        "header": HEADER,
        "rows": comparison_rows(report.teacher, report.student, report.comparison),
        "export_header": EXPORT_HEADER,
        "exports": export_rows(report),
        "pareto": _pareto([report], [name]),
        "lengths": _lengths(report),
        "layers": _layers(report),
        "curves": [(stage.name, chart) for stage in report.stages if (chart := _curve(stage))],
        "timeline": _timeline(report.stages),
        "workload": describe_workload(report.student),
        "machine": describe_machine(report),
    }


def _tiles(report: Report) -> list[tuple[str, str]]:
    """What a reader wants to know first: (value, what it is)."""
    compared, student, teacher = report.comparison, report.student, report.teacher
    now, small = format_ms(student.latency.median_ms), format_bytes(student.size.weight_bytes)
    tiles = []
    if compared is None or teacher is None:
        tiles += [(now, "median latency"), (small, "of weights"), (format_count(student.size.macs), "MACs")]
    else:
        before = format_ms(teacher.latency.median_ms)
        tiles.append((f"{compared.speedup:.1f}x", f"as fast: {now} instead of {before}"))
    if student.quality is not None:
        main = student.quality.main
        change = format_difference(compared) if compared is not None else ""
        tiles.insert(1, (format_score(main).split(" ±")[0], main.name.replace("_", " ") + (change and f", {change}")))
    if compared is not None:
        tiles.append((small, f"of weights, {format_ratio(compared.weight_bytes_ratio)} the teacher's"))
        tiles.append((format_count(student.size.macs), f"MACs, {format_ratio(compared.mac_ratio)} the teacher's"))
    if report.exports:
        best = max(report.exports, key=lambda each: each.speedup)
        tiles.append(
            (f"{best.speedup:.1f}x", f"as fast as {best.format}{f', {best.quantize}' if best.quantize else ''}")
        )
    return tiles


def _pareto(reports: Sequence[Report], names: Sequence[str]) -> str:
    points: list[Point] = []
    teachers = set()
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        if report.teacher is not None:
            label = report.base_model.split("/")[-1]
            points += _points(report.teacher, "" if label in teachers else label, "teacher", filled=False)
            teachers.add(label)
        points += _points(report.student, name, colour)
        for each in report.exports:
            main = each.quality.main
            scale = 100 if is_fraction(main.name) else 1
            label = each.format if each.quantize is None else f"{each.format}, {each.quantize}"
            points.append(
                Point(each.latency.median_ms, scale * main.value, label, colour, scale * main.standard_error, False)
            )
    quality = reports[0].student.quality
    if quality is None:
        return ""
    name = quality.main.name.replace("_", " ") + (", %" if is_fraction(quality.main.name) else "")
    return scatter(points, "median latency, ms", name, "high" if quality.main.higher_is_better else "low")


def _points(measured: Measurement, label: str, colour: str, filled: bool = True) -> list[Point]:
    if measured.quality is None:
        return []
    main = measured.quality.main
    scale = 100 if is_fraction(main.name) else 1
    return [Point(measured.latency.median_ms, scale * main.value, label, colour, scale * main.standard_error, filled)]


def _lengths(report: Report) -> str:
    if len(report.lengths) < 2:
        return ""
    student = [(point.sequence_length, point.student_ms) for point in report.lengths]
    teacher = [(p.sequence_length, p.teacher_ms) for p in report.lengths if p.teacher_ms is not None]
    return lines([Line("teacher", "teacher", teacher), Line("student", "student", student)], "tokens", "median, ms")


def _layers(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "name": name_layer(layer, report.structure),
            "heads": layer.heads,
            "original_heads": layer.original_heads,
            "head_part": 100 * layer.heads / max(layer.original_heads, 1),
            "neurons": layer.neurons,
            "original_neurons": layer.original_neurons,
            "neuron_part": 100 * layer.neurons / max(layer.original_neurons, 1),
            "attention": layer.attention,
        }
        for layer in report.structure
    ]


def _curve(stage: StageRecord) -> str:
    """The losses that a stage logged while it trained."""
    logged = stage.facts.get("curve")
    if not isinstance(logged, list) or len(logged) < 2:
        return ""
    names = [name for name in logged[0] if name != "step"]
    series = []
    for number, name in enumerate(names):
        points = [(float(row["step"]), _float(row.get(name))) for row in logged]
        series.append(Line(name.replace("_", " "), COLOURS[number % len(COLOURS)], points))
    return lines(series, "optimizer step", "loss")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _timeline(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Where each stage begins and how long it is, in percent of all; and what it was told to do."""
    total = sum(stage.seconds for stage in stages) or 1.0
    rows: list[dict[str, Any]] = []
    start = 0.0
    for stage in stages:
        part = 100 * stage.seconds / total
        rows.append(
            {
                "name": stage.name,
                "seconds": stage.seconds,
                "start": min(100 * start / total, 99.0),
                "length": max(part, 1.0),
                "settings": listed(stage.settings),
            }
        )
        start += stage.seconds
    return rows
