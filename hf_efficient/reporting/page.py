"""The report as one self-contained page: no script, no font, no picture is fetched, so it works offline and by mail.

save_page(report, "out/model")                           # out/model/report.html
report_page([one, two, three])                           # several results: a common plot, then each
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.disk import write_atomic
from ..io.text import for_terminal
from .card import recipe_text
from .exported import (
    SERVING_HEADER,
    best_export,
    describe_exports,
    describe_serving,
    export_header,
    export_rows,
    headline,
    name_export,
    serving_rows,
)
from .ladder_tables import LADDER_HEADER, advice, describe_ladder, ladder_chart, ladder_rows
from .language_tables import describe_generation, language_rows, samples
from .numbers import (
    format_bytes,
    format_count,
    format_ms,
    format_ratio,
    format_score,
    format_seconds,
    format_speedup,
    is_fraction,
    scale_of,
)
from .schema import Latency, Report, Score, StageRecord
from .svg import COLOURS, Line, Point, drawable, lines, scatter
from .tables import (
    HEADER,
    RESULTS_HEADER,
    comparison_rows,
    describe_energy,
    describe_footprint,
    describe_machine,
    describe_workload,
    format_difference,
    kept,
    layer_names,
    listed,
    result_rows,
)
from .usage import loading_snippet

PAGE = "report.html"
TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"
CURVES, POINTS = 12, 1000  # at most so many losses of a stage are drawn, and so many steps of each


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
    names = [str(each.recipe.get("name") or each.base_model) for each in reports] if names is None else list(names)
    if not reports or len(names) != len(reports):
        raise ConfigError(f"Give at least one report and one name for each, got {len(reports)} and {len(names)}.")
    page = Environment(
        autoescape=True,
        # Text without controls, such as those that turn it around; what is HTML already stays. Then it is escaped.
        finalize=lambda value: for_terminal(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = page.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=names[0] if len(names) == 1 else f"{len(names)} results",
        results=[_result(report, name, repo_id) for report, name in zip(reports, names, strict=True)],
        pareto=_pareto(reports, names) if len(reports) > 1 else "",
        summary_header=RESULTS_HEADER,
        summary=[row for each, name in zip(reports, names, strict=True) for row in result_rows({name: each})],
    )


def save_page(report: Report, folder: str | Path, repo_id: str = "path/to/this/model") -> Path:
    """Write `report.html` into a folder; complete or not at all."""
    return write_atomic(Path(folder) / PAGE, report_page(report, repo_id=repo_id))


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
        "language": language_rows(report),
        "generation": describe_generation(report),
        "samples": samples(report),
        "advice": advice(report),
        "ladder_header": LADDER_HEADER,
        "ladder": ladder_rows(report),
        "ladder_chart": ladder_chart(report),
        "ladder_note": describe_ladder(report),
        "export_header": export_header(report),
        "exports": export_rows(report),
        "export_words": describe_exports(report),
        "serving_header": SERVING_HEADER,
        "serving": serving_rows(report),
        "serving_words": describe_serving(report),
        "pareto": _pareto([report], [name]),
        "lengths": _lengths(report),
        "layers": [
            {
                "name": name,
                "heads": kept(layer.heads, layer.original_heads),
                "head_part": _percent(layer.heads, layer.original_heads),
                "neurons": kept(layer.neurons, layer.original_neurons),
                "neuron_part": _percent(layer.neurons, layer.original_neurons),
                "attention": layer.attention,
            }
            for name, layer in zip(layer_names(report.structure), report.structure, strict=True)
        ],
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
        tiles.append((format_speedup(compared.speedup), f"as fast: {now} instead of {before}"))
    if student.quality is not None:
        main = student.quality.main
        change = format_difference(compared) if compared is not None else ""
        tiles.insert(1, (format_score(main).split(" ±")[0], main.name.replace("_", " ") + (change and f", {change}")))
    if compared is not None:
        tiles.append((small, f"of weights, {format_ratio(compared.weight_bytes_ratio)} the teacher's"))
        tiles.append((format_count(student.size.macs), f"MACs, {format_ratio(compared.mac_ratio)} the teacher's"))
    best = best_export(report)
    if best is not None:
        tiles.append(headline(best))
    return tiles


def _pareto(reports: Sequence[Report], names: Sequence[str]) -> str:
    points: list[Point] = []
    teachers = set()
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        colour, teacher = COLOURS[number % len(COLOURS)], report.teacher
        if teacher is not None and teacher.quality is not None:
            label = report.base_model.split("/")[-1]
            points.append(
                _point(teacher.latency, teacher.quality.main, "" if label in teachers else label, "teacher", False)
            )
            teachers.add(label)
        if report.student.quality is not None:
            points.append(_point(report.student.latency, report.student.quality.main, name, colour))
        for each in report.exports:
            main, what, there = each.quality.main, name_export(each), each.teacher
            points.append(_point(each.latency, main, what, colour, False))
            if there is not None:
                score = replace(main, value=there.score, standard_error=there.standard_error)
                points.append(_point(there.latency, score, f"teacher, {what}", "teacher", False))
    quality = reports[0].student.quality
    if quality is None:
        return ""
    name = quality.main.name.replace("_", " ") + (", %" if is_fraction(quality.main.name) else "")
    return scatter(points, "median latency, ms", name, "high" if quality.main.higher_is_better else "low")


def _point(latency: Latency, main: Score, label: str, colour: str, filled: bool = True) -> Point:
    scale = scale_of(main.name)
    return Point(latency.median_ms, scale * main.value, label, colour, scale * main.standard_error, filled)


def _lengths(report: Report) -> str:
    if len(report.lengths) < 2:
        return ""
    student = [(_float(point.sequence_length), point.student_ms) for point in report.lengths]
    teacher = [(_float(p.sequence_length), p.teacher_ms) for p in report.lengths if p.teacher_ms is not None]
    return lines([Line("teacher", "teacher", teacher), Line("student", "student", student)], "tokens", "median, ms")


def _percent(count: float, original: float) -> float:
    """For a bar: from 0 to 100 whatever the report says."""
    return 0.0 if count <= 0 or original <= 0 else 100.0 if count >= original else 100 * (count / original)


def _curve(stage: StageRecord) -> str:
    """The losses that a stage logged while it trained."""
    logged = stage.facts.get("curve")
    rows = [row for row in logged if isinstance(row, dict)] if isinstance(logged, list) else []
    if len(rows) < 2:
        return ""
    names = [name for name in rows[0] if name != "step"][:CURVES]
    series = []
    for number, name in enumerate(names):
        points = [(_float(row.get("step")), _float(row.get(name))) for row in rows[:: 1 + len(rows) // POINTS]]
        series.append(Line(name.replace("_", " "), COLOURS[number % len(COLOURS)], points))
    return lines(series, "optimizer step", "loss")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and drawable(value) else math.nan


def _timeline(stages: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Where each stage begins and how long it is, in percent of all; and what it was told to do."""
    seconds = [stage.seconds if drawable(stage.seconds) and stage.seconds > 0 else 0.0 for stage in stages]
    total = sum(seconds) or 1.0
    rows: list[dict[str, Any]] = []
    start = 0.0
    for stage, length in zip(stages, seconds, strict=True):
        rows.append(
            {
                "name": stage.name,
                "time": format_seconds(stage.seconds, 0),
                "start": min(100 * start / total, 99.0),
                "length": max(100 * length / total, 1.0),
                "settings": listed(stage.settings),
            }
        )
        start += length
    return rows
