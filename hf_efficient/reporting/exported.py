"""The result in other runtimes, beside the teacher there and the teacher in PyTorch: rows of tables, and the headline.

export_header(report), export_rows(report)
best_export(report), describe_export(best)        # "4.1x", "as fast, both onnx int8: ..."
serving_rows(report)                              # short and long texts one by one, and many at once
"""

import math
from dataclasses import replace

from .numbers import (
    format_bytes,
    format_change,
    format_ms,
    format_ratio,
    format_score,
    format_speedup,
    is_fraction,
    scale_of,
)
from .schema import ExportRecord, Report
from .timing import Latency, ServedProgram

# Where no teacher was exported, as in reports of older versions.
ALONE = ("exported as", "runs in", "latency, median", "speed-up", "quality", "change", "on disk", "difference")
BESIDE = (
    *ALONE[:3],
    "teacher there",
    "same runtime",
    "over PyTorch",
    *ALONE[4:],
)
SERVING_HEADER = (
    "texts come in",
    "runs in",
    "teacher, median",
    "p95",
    "texts/s",
    "student, median",
    "p95",
    "texts/s",
    "same runtime",
    "over PyTorch",
)
LOADS = {"short": "short, one by one", "long": "long, one by one", "mixed": "all sorts, {} at once"}


def is_beside(report: Report) -> bool:
    """Whether the teacher was exported too, so that both can be compared in the same runtime."""
    return any(each.teacher is not None for each in report.exports)


def export_header(report: Report) -> tuple[str, ...]:
    return BESIDE if is_beside(report) else ALONE


def export_rows(report: Report) -> list[tuple[str, ...]]:
    """One row for each other runtime; change is against the teacher in PyTorch, as is the speed-up where the report
    knows no other."""
    rows: list[tuple[str, ...]] = []
    for each in report.exports:
        name = each.quality.main.name
        scale, unit = scale_of(name), " points" if is_fraction(name) else ""
        change = f"{scale * each.quality_difference:+.3g} ± {scale * each.quality_difference_error:.2g}{unit}"
        rows.append(
            (
                name_export(each),
                each.runtime,
                format_ms(each.latency.median_ms),
                *(_teacher_there(each) if is_beside(report) else ()),
                format_ratio(each.speedup),
                f"{name.replace('_', ' ')} {format_score(each.quality.main)}" if each.quality.scores else "",
                change,
                format_bytes(each.bytes_on_disk),
                f"{each.difference:.1g}",
            )
        )
    return rows


def _teacher_there(export: ExportRecord) -> tuple[str, str]:
    """`6.10 ms, 98.4% ± 0.6` and `2.82x`; its score only where 8 bits may have changed it."""
    there = export.teacher
    if there is None:
        return "", ""
    main = replace(export.quality.main, value=there.score, standard_error=there.standard_error)
    score = f", {format_score(main)}" if export.quantize and export.quality.scores else ""
    return format_ms(there.latency.median_ms) + score, format_ratio(there.speedup)


def describe_exports(report: Report) -> str:
    """What is compared with what; an empty text where the teacher was not exported."""
    if not is_beside(report):
        return ""
    return (
        "Same runtime: against the teacher there, exported and quantised in the same way. Over PyTorch and change: "
        f"against the teacher in PyTorch, {report.student.workload.dtype}. All in turn and on the same samples. "
        "Difference: the largest to the student in PyTorch on real inputs, as a part of the largest output."
    )


def name_export(export: ExportRecord, between: str = ", ") -> str:
    """`onnx`, or `onnx, cache, int8`."""
    return between.join(
        [export.format, *["cache"] * bool(export.cache), *([export.quantize] if export.quantize else [])]
    )


def format_export_change(export: ExportRecord) -> str:
    """What the exported student gains or loses to the teacher: `-0.9 ± 0.6 points`."""
    name = export.quality.main.name
    return format_change(name, export.quality_difference, export.quality_difference_error)


def best_export(report: Report) -> ExportRecord | None:
    """The fastest of those that lose no more to the teacher than the student itself does, within a standard error.

    None where each is known to be worse, or nothing is known.
    """
    compared = report.comparison

    def loss(change: float | None, higher_is_better: bool) -> float:
        return 0.0 if change is None else -change if higher_is_better else change

    def good(export: ExportRecord) -> bool:
        better = export.quality.main.higher_is_better
        usual = loss(None if compared is None else compared.quality_difference, better)
        error = export.quality_difference_error
        allowed = (usual if usual > 0 else 0.0) + (error if error > 0 else 0.0)  # one sample has no error: nan
        return bool(export.quality.scores) and loss(export.quality_difference, better) <= allowed < math.inf

    return max(filter(good, report.exports), key=lambda each: each.speedup, default=None)


def headline(export: ExportRecord) -> tuple[str, str]:
    """(speed-up, what it compares): in the same runtime and precision, where the teacher was measured there."""
    change = format_export_change(export)
    if export.teacher is None:
        return (
            format_speedup(export.speedup),
            f"the speed of the teacher in PyTorch, as {name_export(export, ' ')}: {change}",
        )
    over = f"{format_speedup(export.speedup)} the teacher in PyTorch"
    return format_speedup(export.teacher.speedup), f"as fast, both {name_export(export, ' ')}: {change}; {over}"


def short_export(export: ExportRecord) -> str:
    """For one cell: `onnx-int8 3.8x, over PyTorch 13.6x (-0.9 ± 0.6 points)`."""
    over, change = format_speedup(export.speedup), format_export_change(export)
    if export.teacher is None:
        return f"{export.folder} {over} ({change})"
    return f"{export.folder} {format_speedup(export.teacher.speedup)}, over PyTorch {over} ({change})"


def serving_rows(report: Report) -> list[tuple[str, ...]]:
    """For each way in which texts come in one row for each runtime; none where it was not measured."""
    rows = []
    names = {each.folder: name_export(each) for each in report.exports}
    for serving in report.serving:
        load = LOADS[serving.load].format(serving.batch_size) if serving.load in LOADS else serving.load
        first = f"{load}, {serving.tokens:.3g} tokens"
        for number, each in enumerate(serving.programs):
            runtime = names.get(each.program, f"PyTorch {report.student.workload.dtype}")
            rows.append((first if number == 0 else "", runtime, *_served(each)))
    return rows


def _served(each: ServedProgram) -> tuple[str, ...]:
    def times(latency: Latency | None, per_second: float | None) -> tuple[str, str, str]:
        if latency is None or per_second is None:
            return "", "", ""
        return format_ms(latency.median_ms), format_ms(latency.p95_ms), f"{per_second:.3g}"

    return (
        *times(each.teacher, each.teacher_per_second),
        *times(each.student, each.student_per_second),
        "" if each.speedup is None else format_ratio(each.speedup),
        format_ratio(each.over_pytorch),
    )


def describe_serving(report: Report) -> str:
    """How texts came in; an empty text where that was not measured."""
    if not report.serving:
        return ""
    return (
        "Real texts of the test set: the shortest and the longest quarter of them one by one, and many at once, "
        "sorted by length and padded within each batch as a server does. Times are those of a batch, of all programs "
        "in turn on the same texts; a speed-up is the median over batches."
    )
