"""Teacher against student as a table, for the terminal and for Markdown.

print(text_table(report))
print(markdown_table(report))          # README, model card

Text of others is shown as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..io.text import Markup, for_line, for_markdown
from .doubts import describe_waiting
from .exported import SERVING_HEADER, describe_serving, export_header, export_rows, serving_rows, short_export
from .numbers import (
    fixed,
    format_bytes,
    format_change,
    format_count,
    format_ms,
    format_ratio,
    format_score,
    format_speedup,
)
from .schema import Comparison, LayerStructure, Measurement, Report

CELL, NOTE = 60, 2000  # at most so many characters of a cell, and of a note below a table, in a terminal


def format_difference(comparison: Comparison) -> str:
    """`-0.4 ± 0.3 points` for accuracy, `+0.031 ± 0.008` for losses."""
    name, change, error = comparison.quality_score, comparison.quality_difference, comparison.quality_difference_error
    return "" if name is None or change is None or error is None else format_change(name, change, error)


def describe_workload(measurement: Measurement) -> str:
    """`batch 1, 128 tokens, 1 thread, float32 on cpu`."""
    work = measurement.workload
    if work.sequence_length is not None:
        size = f"{work.sequence_length} tokens"
    else:
        size = "x".join(map(str, work.input_shape[-2:])) + " pixels"
    threads = f"{work.threads} thread{'s' if work.threads != 1 else ''}"
    return f"batch {work.batch_size}, {size}, {threads}, {work.dtype} on {work.device}"


def describe_energy(measurement: Measurement) -> str:
    """How the energy was found, for a reader to judge: an empty text where it was not."""
    energy = measurement.energy
    if energy is None:
        return ""
    return (
        f"Energy of a thousand inputs, one batch after the other: {energy.source}, of processor, memory and GPU, by "
        f"{energy.tool} while {energy.inputs:,} inputs ran."
    )


def describe_footprint(report: Report) -> str:
    """What making the student took; an empty text where it was not tracked."""
    total = report.footprint
    if total is None:
        return ""
    co2 = "" if total.co2_grams is None else f", {total.co2_grams:.3g} g CO2eq with the power of {total.country}"
    return f"Energy of all stages: {total.kwh:.3g} kWh{co2}; {total.source}, by {total.tool}."


def describe_machine(report: Report) -> str:
    """The processor that the student was timed on: `AMD EPYC, 2 cores`, or the GPU's name."""
    machine = report.environment
    if report.student.workload.device == "cuda" and machine.gpu is not None:
        return machine.gpu
    return f"{machine.cpu}, {machine.cores} core{'s' if machine.cores != 1 else ''}"


def comparison_rows(
    teacher: Measurement | None, student: Measurement, compared: Comparison | None
) -> list[tuple[str, str, str, str]]:
    """(what, teacher, student, change); empty cells where there is nothing to say."""
    both = [teacher, student]
    rows = _quality_rows(both, compared)

    def add(what, value_of, change=None):
        teacher, student = (None if each is None else value_of(each) for each in both)
        if teacher is not None or student is not None:
            rows.append((what, teacher or "", student or "", change if compared and change else ""))

    def ratio(name):
        return format_ratio(getattr(compared, name)) if compared else None

    add("latency, median", lambda m: format_ms(m.latency.median_ms), f"{ratio('speedup')} speed-up")
    add("latency, p95", lambda m: format_ms(m.latency.p95_ms))
    add("MACs", lambda m: format_count(m.size.macs), ratio("mac_ratio"))
    add("parameters", lambda m: format_count(m.size.parameters), ratio("parameter_ratio"))
    add("without embeddings", lambda m: format_count(m.size.non_embedding_parameters))
    if any(m is not None and m.size.is_sparse for m in both):
        add("not zero", lambda m: format_count(m.size.nonzero_parameters))
    add("weights", lambda m: format_bytes(m.size.weight_bytes), ratio("weight_bytes_ratio"))
    add("on disk", lambda m: None if m.size.bytes_on_disk is None else format_bytes(m.size.bytes_on_disk))
    add("peak memory", lambda m: format_bytes(m.size.peak_memory_bytes), ratio("memory_ratio"))
    add("energy of a thousand", lambda m: None if m.energy is None else f"{m.energy.wh_per_1000:.3g} Wh")
    return rows


def _quality_rows(both: list[Measurement | None], compared: Comparison | None) -> list[tuple[str, str, str, str]]:
    scores = [{} if m is None or m.quality is None else {s.name: s for s in m.quality.scores} for m in both]
    rows: list[tuple[str, str, str, str]] = []
    for name in dict.fromkeys([*scores[1], *scores[0]]):
        teacher, student = (format_score(each[name]) if name in each else "" for each in scores)
        change = format_difference(compared) if compared is not None and compared.quality_score == name else ""
        rows.append((name.replace("_", " "), teacher, student, change))
    guessing = [m.quality.largest_class for m in both if m is not None and m.quality is not None]
    if guessing and guessing[-1] is not None:
        share = f"{fixed(100 * guessing[-1], 1)}%"
        rows.append(("the largest class alone", share, share, ""))
    if compared is not None and compared.agreement is not None:
        same = "same order" if (compared.quality_score or "").startswith("ndcg") else "same prediction"
        rows.append((same, "", f"{fixed(100 * compared.agreement, 1)}%", ""))
    if compared is not None and compared.similarity is not None:
        rows.append(("cosines, correlation with the teacher's", "", fixed(compared.similarity, 3), ""))
    return rows


def layer_names(layers: Sequence[LayerStructure]) -> list[str]:
    """`3`, or `decoder 3` where the model has more than one stack of layers."""
    several = len({each.stack for each in layers}) > 1
    return [f"{each.stack} {each.layer}" if several else str(each.layer) for each in layers]


def kept(count: int, original: int) -> str:
    """`8 of 12`."""
    return " of ".join(str(each) if abs(each) < 1e9 else format_count(each) for each in (count, original))


def align(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them left-aligned, a rule below the header, no trailing spaces.

    For a terminal: control characters are shown as escapes, long cells are cut.
    """
    names, *lines = _padded([[for_line(cell, CELL) for cell in row] for row in (header, *rows)], left)
    rule = ["-" * len(name) for name in names]
    return "\n".join("  ".join(cells).rstrip() for cells in (names, rule, *lines))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A Markdown table with aligned source text; cells are shown as they are, but for `Markup`."""
    names, *lines = _padded([[for_markdown(cell) for cell in row] for row in (header, *rows)], left=1, least=3)
    first, *others = ("-" * (len(name) + 2) for name in names)
    rule = "|".join(["", first, *(f"{dashes[:-1]}:" for dashes in others), ""])
    top, *body = (f"| {' | '.join(cells)} |" for cells in (names, *lines))
    return Markup("\n".join([top, rule, *body]))


def _padded(table: Sequence[Sequence[str]], left: int, least: int = 0) -> list[list[str]]:
    """Cells as wide as their column; in the first `left` columns the text is on the left."""
    widths = [max(least, *map(len, column)) for column in zip(*table, strict=True)]
    return [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    ]


HEADER = ("", "teacher", "student", "change")


def text_table(report: Report) -> str:
    """The comparison for a terminal, with the workload and machine below it."""
    table = align(HEADER, comparison_rows(report.teacher, report.student, report.comparison))
    if report.exports:
        table += "\n\n" + align(export_header(report), export_rows(report), left=2)
    if report.serving:
        table += "\n\n" + align(SERVING_HEADER, serving_rows(report), left=2)
    place = f"{describe_workload(report.student)}; {describe_machine(report)}"
    known = (describe_serving(report), describe_energy(report.student), describe_footprint(report))
    notes = (place, *known, *report.warnings)
    return f"{table}\n\n" + "\n".join(for_line(note, NOTE) for note in notes if note)


def measurement_table(measurement: Measurement) -> str:
    """What `measure` found, for a terminal: one column, or three with a baseline."""
    if measurement.baseline is None:
        alone = [(what, value) for what, _, value, _ in comparison_rows(None, measurement, None)]
        table = align(("", "model"), alone)
    else:
        compared = comparison_rows(measurement.baseline, measurement, measurement.comparison)
        table = align(("", "baseline", "model", "change"), compared)
    busy = describe_waiting(measurement, measurement.baseline)
    notes = (describe_workload(measurement), describe_energy(measurement), busy)
    return f"{table}\n\n" + "\n".join(for_line(note) for note in notes if note)


def markdown_table(report: Report) -> Markup:
    """The comparison as a Markdown table."""
    return markdown(HEADER, comparison_rows(report.teacher, report.student, report.comparison))


def markdown_exports(report: Report) -> Markup:
    """The other runtimes as a Markdown table; an empty text if there are none."""
    return markdown(export_header(report), export_rows(report)) if report.exports else Markup()


def markdown_serving(report: Report) -> Markup:
    """Texts as they come in as a Markdown table; an empty text if that was not measured."""
    return markdown(SERVING_HEADER, serving_rows(report)) if report.serving else Markup()


def markdown_structure(report: Report) -> Markup:
    """What is left of each layer, as a Markdown table; an empty text if the report does not say."""
    rows = [
        (name, kept(x.heads, x.original_heads), kept(x.neurons, x.original_neurons), x.attention)
        for name, x in zip(layer_names(report.structure), report.structure, strict=True)
    ]
    return markdown(("layer", "heads", "neurons", "attention"), rows) if rows else Markup()


RESULTS_HEADER = ("", "quality", "change", "speed-up", "parameters", "MACs")


def result_rows(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    """One line for each report: the same facts of all, to choose from."""
    rows: list[tuple[str, ...]] = []
    for label, report in reports.items():
        student, compared = report.student, report.comparison
        rows.append(
            (
                label,
                "" if student.quality is None else f"{student.quality.main.name} {format_score(student.quality.main)}",
                "" if compared is None else format_difference(compared),
                "" if compared is None else format_speedup(compared.speedup),
                format_count(student.size.parameters),
                format_count(student.size.macs),
            )
        )
    return rows


def text_results(reports: Mapping[str, Report]) -> str:
    """`result_rows` for a terminal."""
    return align(RESULTS_HEADER, result_rows(reports))


def listed(values: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """`ratio 0.55, metric macs`; what is not set is not said. `shown` makes each name and value fit for its place."""

    def one(value: Any) -> str:
        if isinstance(value, dict):
            return f"({listed(value, shown)})"
        if isinstance(value, list):
            return f"[{', '.join(map(one, value))}]"
        return shown((f"{value:.4g}" if isinstance(value, float) else str(value)).replace("\n", " "))

    return ", ".join(f"{shown(name)} {one(value)}" for name, value in values.items() if value is not None)


def markdown_results(reports: Mapping[str, Report]) -> str:
    """One line for each finished recipe, for the README: quality, speed and size, and where they were measured."""
    header = ("recipe", "teacher", "student", "speed-up", "other runtimes, change", "weights", "MACs", "loads as")
    rows, places = [_result(name, report) for name, report in reports.items()], []
    for name, report in reports.items():
        commit = f"commit {report.commit[:7]}" if report.commit else "installed package"
        machine = f"{describe_workload(report.student)}; {describe_machine(report)}"
        places.append(for_markdown(f"{name}: {machine}; {commit}, {report.created}."))
    return markdown(header, rows) + "\n\n" + "\n".join(places)


def _result(name: str, report: Report) -> tuple[str, ...]:
    teacher, student, compared = report.teacher, report.student, report.comparison
    if teacher is None or compared is None or teacher.quality is None or student.quality is None:
        raise DataError(f"The report of {name} has no teacher or no quality to compare with. Run the recipe again.")
    return (
        Markup(f"[{for_markdown(name)}](model_cards/{name}/README.md)"),  # a shipped recipe
        f"{teacher.quality.main.name} {format_score(teacher.quality.main)}",
        format_score(student.quality.main),
        format_speedup(compared.speedup),
        ", ".join(map(short_export, report.exports)),
        f"{format_bytes(teacher.size.weight_bytes)} → {format_bytes(student.size.weight_bytes)}",
        f"{format_count(teacher.size.macs)} → {format_count(student.size.macs)}",
        report.loads_with,
    )
