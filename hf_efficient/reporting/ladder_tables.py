"""The ladder in words: a table from fast to slow, and one sentence on what a user should take.

ladder_rows(report), advice(report)          # both empty where the report has no ladder
"""

from ..io.text import Markup, for_line
from .ladder import Ladder, Rung
from .numbers import (
    format_bytes,
    format_change,
    format_ms,
    format_score,
    format_seconds,
    format_speedup,
    is_fraction,
    scale_of,
)
from .schema import Report, Score
from .svg import Point, drawable, scatter
from .tables import NOTE, align, markdown

LADDER_HEADER = ("", "quality", "change", "time", "speed-up", "weights", "made in")
COLOURS = {"teacher": "teacher", "student": "student", "export": "student", "baseline": "other"}
SHOWN = 20  # rungs


def _rungs(ladder: Ladder) -> list[Rung]:
    """The fastest first."""
    return sorted(ladder.rungs[:SHOWN], key=lambda rung: (not drawable(rung.median_ms), rung.median_ms))


def ladder_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each rung, as `LADDER_HEADER`."""
    ladder = report.ladder
    if ladder is None:
        return []
    teacher = next((rung.median_ms for rung in ladder.rungs if rung.kind == "teacher"), None)
    rows: list[tuple[str, ...]] = []
    for rung in _rungs(ladder):
        rows.append(
            (
                f"{rung.name}: {rung.about}" if rung.about else rung.name,
                format_score(Score(ladder.score, rung.score, rung.standard_error, ladder.higher_is_better)),
                "" if rung.kind == "teacher" else format_change(ladder.score, rung.difference, rung.difference_error),
                format_ms(rung.median_ms),
                format_speedup(teacher / rung.median_ms) if teacher is not None and rung.median_ms > 0 else "",
                format_bytes(rung.weight_bytes),
                "" if rung.seconds is None else format_seconds(rung.seconds, 0),
            )
        )
    return rows


def describe_ladder(report: Report) -> str:
    """How it was measured; an empty text where it was not."""
    ladder = report.ladder
    if ladder is None:
        return ""
    return (
        f"All on the same test rows, from the text to the answer, tokenizer included: {ladder.texts} texts in batches "
        f"of {ladder.batch_size}, median of {ladder.rounds} rounds in turn, {ladder.threads} "
        f"thread{'s' * (ladder.threads != 1)}. Made in: the time beyond that of the teacher."
    )


def advice(report: Report) -> str:
    """Which one to take, and by which rule."""
    ladder = report.ladder
    if ladder is None:
        return ""
    allowed = f"{scale_of(ladder.score) * ladder.allowed_loss:g}"
    unit = f"point{'s' * (allowed != '1')}" if is_fraction(ladder.score) else f"of {ladder.score}"
    most, best = f"at most {allowed} {unit} to the teacher", ladder.best
    rule = f"of all that lose {most} it is the fastest (of those within 5 % of its time, the smallest)"
    if best is None:
        return f"Take none of these: nothing loses {most}."
    if best.kind == "teacher":
        return f"Take the teacher as it is: nothing faster loses {most}."
    if best.kind == "baseline":
        place = f" The run keeps it in {best.folder}." if best.folder else ""
        return f"Take {best.name} ({best.about}), and not our result: {rule}.{place}"
    return f"Take our result{'' if best.kind == 'student' else f' as {best.name}'}: {rule}."


def ladder_text(report: Report) -> str:
    """Sentence and table, to stand below others in a terminal; an empty text for a report without a ladder."""
    if report.ladder is None:
        return ""
    table = align(LADDER_HEADER, ladder_rows(report))
    return f"\n\n{table}\n\n{for_line(advice(report), NOTE)}\n{for_line(describe_ladder(report), NOTE)}"


def markdown_ladder(report: Report) -> Markup:
    """The table in Markdown; an empty text for a report without a ladder."""
    return markdown(LADDER_HEADER, ladder_rows(report)) if report.ladder is not None else Markup()


def ladder_chart(report: Report) -> str:
    """Quality against time as SVG, the time in powers of ten."""
    ladder = report.ladder
    if ladder is None:
        return ""
    scale = scale_of(ladder.score)
    points = [
        Point(
            rung.median_ms,
            scale * rung.score,
            rung.name,
            COLOURS.get(rung.kind, "other"),
            scale * rung.standard_error,
            filled=rung.kind in ("student", "export"),
        )
        for rung in _rungs(ladder)
    ]
    name = ladder.score.replace("_", " ") + (", %" if is_fraction(ladder.score) else "")
    best = "high" if ladder.higher_is_better else "low"
    return scatter(points, "a batch of texts, ms", name, best, powers=True)
