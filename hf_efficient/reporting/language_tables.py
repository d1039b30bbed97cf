"""Teacher and student as language models: further rows for the table of both, and what they write side by side.

language_rows(report)          # perplexity on other texts, reading and writing, the cache
samples(report)                # (prompt, teacher, student)
"""

from .exported import name_export
from .numbers import format_bytes, format_ms, format_ratio, format_speedup, is_fraction, scale_of
from .schema import Report

SHOWN = 600  # characters of a text


def language_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, teacher, student, change), as `comparison_rows`; none for a report without these measurements."""
    rows = []
    for each in report.domains:
        scale, unit = scale_of(each.score), " points" if is_fraction(each.score) else ""
        old, new = (f"{scale * value:.4g}" for value in (each.teacher, each.student))
        change = f"{scale * each.difference:+.3g} ± {scale * each.standard_error:.2g}{unit}"
        rows.append((f"{each.score.replace('_', ' ')} on {each.dataset}", old, new, change))
    made = report.generation
    if made is None:
        return rows
    times = {
        f"reading {made.prompt_tokens} tokens": (made.teacher.prefill_ms, made.student.prefill_ms),
        "each token written": (made.teacher.token_ms, made.student.token_ms),
    }
    for what, (before, after) in times.items():
        change = f"{format_speedup(before / after)} speed-up" if after > 0 else ""
        rows.append((what, format_ms(before), format_ms(after), change))
    for export in report.exports:
        if export.writing is not None and export.writing_speedup is not None:
            change, dense, there = f"{format_speedup(export.writing_speedup)} speed-up", "", export.teacher
            if there is not None and there.writing is not None and export.writing.token_ms > 0:
                over = f"{format_speedup(export.writing_speedup)} over PyTorch"
                dense = format_ms(there.writing.token_ms)
                change = f"{format_speedup(there.writing.token_ms / export.writing.token_ms)} speed-up, {over}"
            what = f"each token written, {name_export(export)}"
            rows.append((what, dense, format_ms(export.writing.token_ms), change))
    old_bytes, new_bytes = made.teacher.cache_bytes, made.student.cache_bytes
    change = format_ratio(new_bytes / old_bytes) if old_bytes > 0 else ""
    rows.append(("cache", format_bytes(old_bytes), format_bytes(new_bytes), change))
    if made.acceptance is not None:
        rows.append(("drafts that the teacher takes", "", f"{100 * made.acceptance:.1f}%", ""))
    return rows


def describe_generation(report: Report) -> str:
    """How reading and writing were timed; an empty text where they were not."""
    made = report.generation
    if made is None:
        return ""
    how = (
        f"Writing: batch {made.batch_size}, {made.new_tokens} tokens after {made.prompt_tokens}; median of "
        f"{made.rounds} rounds, teacher and student in turn; the cache at the end."
    )
    if made.acceptance is None:
        return how
    return (
        f"{how} Drafts: of the tokens that the teacher writes in the samples, those that the student would have "
        "written too (assisted decoding keeps them)."
    )


def samples(report: Report) -> list[tuple[str, str, str]]:
    """(prompt, teacher, student), each cut where it is long."""
    made = report.generation
    texts = [(each.prompt, each.teacher, each.student) for each in (made.samples if made else ())]
    return [tuple(text if len(text) <= SHOWN else f"{text[:SHOWN]} ..." for text in each) for each in texts]  # type: ignore[misc]
