"""What `attention.py` measured, against the targets: speed-ups, slopes, break-even lengths and peers.

    python benchmarks/attention_summary.py benchmarks/results/attention_cpu.json --markdown

Pure arithmetic on the cells of a report. A causal method is compared with causal dense attention, which is 1.7 times
as fast as the bidirectional one; the speed-up over the latter is stored in the cells as well.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "forward+backward"
LENGTH = 8192  # of the targets
SLOPE_RANGE = (2048, 32768)
CAUSAL = "_causal"


class Target(NamedTuple):
    """`method` is at least `factor` times as fast as dense SDPA at `LENGTH`."""

    method: str
    mode: str
    factor: float


TARGETS = (
    Target("local", FORWARD, 25),
    Target("local", BACKWARD, 18),
    Target("strided", FORWARD, 7),
    Target("lsh", FORWARD, 4),
    Target("topk", FORWARD, 5),
    Target("linear", FORWARD, 25),
    Target("linear", BACKWARD, 45),
    Target("linear_causal", FORWARD, 8),
    Target("additive", FORWARD, 100),
    Target("kernel", FORWARD, 3),
    Target("kernel_positions", FORWARD, 8),
)
SLOPES = {  # forward time grows at most with this power of the length
    "local": 1.05,
    "strided": 1.05,
    "linear": 1.05,
    "additive": 1.05,
    "lsh": 1.2,
    "kernel": 1.2,
    "kernel_positions": 1.2,
}

Cells = dict[tuple[str, str, int], dict]


def index(report: dict) -> Cells:
    """The cells with a time, by (method, mode, length)."""
    cells = report["cells"]
    return {(cell["method"], cell["mode"], cell["length"]): cell for cell in cells if "seconds" in cell}


def dense_for(method: str, cells: Cells) -> str:
    """Dense attention of the same causality; old reports hold the bidirectional one alone."""
    known = {name for name, _, _ in cells}
    return "dense" + CAUSAL if method.endswith(CAUSAL) and "dense" + CAUSAL in known else "dense"


def speedup(cells: Cells, method: str, mode: str, length: int = LENGTH, over: str | None = None) -> float | None:
    """Time of dense attention (or of `over`) divided by the method's; None where one was not measured.

    That over dense attention stands in the cell since they were measured together, even where a later run replaced
    the dense cell.
    """
    cell = cells.get((method, mode, length))
    dense = dense_for(method, cells)
    stored = "speedup_over_" + dense
    if cell and over is None and stored in cell:
        return cell[stored]
    other = cells.get((over or dense, mode, length))
    return other["seconds"] / cell["seconds"] if cell and other else None


def slope(cells: Cells, method: str, mode: str) -> float | None:
    """Least-squares slope of log time over log length in `SLOPE_RANGE`; None with fewer than three lengths.

    Measured times hold more than the operations: below some 4,096 tokens the data fit into the last cache and the
    time per token is smaller, which adds about 0.05 to a slope that is 1 by counting.
    """
    low, high = SLOPE_RANGE
    points = [
        (math.log(length), math.log(cell["seconds"]))
        for (name, at, length), cell in cells.items()
        if (name, at) == (method, mode) and low <= length <= high
    ]
    if len(points) < 3:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def break_even(cells: Cells, method: str, mode: str) -> int | None:
    """The length from which on the method is faster than dense attention, interpolated between measured lengths on
    logarithmic scales; the shortest measured length if it always is, None if it is not at the longest."""
    lengths = sorted(length for name, at, length in cells if (name, at) == (method, mode))
    ratios = [(length, speedup(cells, method, mode, length)) for length in lengths]
    measured = [(length, math.log(ratio)) for length, ratio in ratios if ratio]
    if not measured or measured[-1][1] <= 0:
        return None
    losing = [place for place, (_, gain) in enumerate(measured) if gain <= 0]
    if not losing:
        return measured[0][0]
    (before, loss), (after, gain) = measured[losing[-1]], measured[losing[-1] + 1]
    return round(before * (after / before) ** (-loss / (gain - loss)))


def summarize(report: dict) -> dict:
    """Everything above for every method of ours, the targets with what was measured, and the peers."""
    cells = index(report)
    peers = report.get("peers", {})
    ours = [name for name in dict.fromkeys(cell["method"] for cell in report["cells"]) if name not in peers]
    modes = (FORWARD, BACKWARD)
    return {
        "targets": [_target_row(cells, target) for target in TARGETS],
        "slopes": {name: {mode: _rounded(slope(cells, name, mode), 3) for mode in modes} for name in ours},
        "break_even": {
            name: {mode: break_even(cells, name, mode) for mode in modes}
            for name in ours
            if not name.startswith("dense")
        },
        "peers": [row for name in peers for row in _peer_rows(cells, name, peers[name])],
    }


def _target_row(cells: Cells, target: Target) -> dict:
    measured = speedup(cells, target.method, target.mode)
    passed = None if measured is None else measured >= target.factor
    return {**target._asdict(), "measured": _rounded(measured, 2), "passed": passed}


def _peer_rows(cells: Cells, name: str, peer: dict) -> list[dict]:
    """How many times as fast as the peer our method is, at the target length or the longest below it."""
    rows = []
    for mode in (FORWARD, BACKWARD):
        both = [
            length
            for other, at, length in cells
            if (other, at) == (name, mode) and length <= LENGTH and (peer["of"], mode, length) in cells
        ]
        if both:
            ratio = speedup(cells, peer["of"], mode, max(both), over=name)
            rows.append(
                {
                    "peer": name,
                    "of": peer["of"],
                    "mode": mode,
                    "length": max(both),
                    "times_as_fast": _rounded(ratio, 2),
                    "passed": ratio > 1,
                }
            )
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def tables(report: dict, markdown: bool = False) -> str:
    """Targets, methods and peers as three tables, aligned or in Markdown."""
    summary = summarize(report)
    parts = (
        (f"Times as fast as dense SDPA, n = {LENGTH}", *_target_table(summary)),
        (f"Every method, times and memory at n = {LENGTH}", *_method_table(index(report), summary)),
        ("Times as fast as others", *_peer_table(summary)),
    )
    return "\n\n".join(_table(title, headers, rows, markdown) for title, headers, rows in parts)


def _target_table(summary: dict) -> tuple[tuple, list[tuple]]:
    rows = [
        (row["method"], row["mode"], _number(row["factor"]), _number(row["measured"]), _verdict(row["passed"]))
        for row in summary["targets"]
    ]
    return ("method", "mode", "target", "measured", "met"), rows


def _method_table(cells: Cells, summary: dict) -> tuple[tuple, list[tuple]]:
    headers = (
        "method",
        "ms",
        "x dense",
        "MiB",
        "ms f+b",
        "x dense",
        "MiB",
        "slope",
        "met",
        "f+b",
        "faster from",
        "f+b",
    )
    rows = []
    for name, slopes in summary["slopes"].items():
        row = [name]
        for mode in (FORWARD, BACKWARD):
            cell = cells.get((name, mode, LENGTH), {})
            milliseconds = cell["seconds"] * 1e3 if cell else None
            mebibytes = cell["peak_bytes"] / 2**20 if cell.get("peak_bytes") else None
            row += [_number(milliseconds), _number(speedup(cells, name, mode)), _number(mebibytes)]
        steepest = SLOPES.get(name)
        met = None if steepest is None or slopes[FORWARD] is None else slopes[FORWARD] <= steepest
        row += [_number(slopes[FORWARD], 2), _verdict(met), _number(slopes[BACKWARD], 2)]
        starts = summary["break_even"].get(name, {FORWARD: None, BACKWARD: None})
        row += [_from(cells, length) for length in starts.values()]
        rows.append(tuple(row))
    return headers, rows


def _peer_table(summary: dict) -> tuple[tuple, list[tuple]]:
    rows = [
        (
            row["peer"],
            row["of"],
            row["mode"],
            str(row["length"]),
            _number(row["times_as_fast"]),
            _verdict(row["passed"]),
        )
        for row in summary["peers"]
    ]
    return ("peer", "ours", "mode", "n", "times as fast", "faster"), rows


def _table(title: str, headers: tuple, rows: list[tuple], markdown: bool) -> str:
    widths = [max(len(line[column]) for line in (headers, *rows)) for column in range(len(headers))]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (headers, *rows)]
    if not markdown:
        return "\n".join((title, *("  ".join(line).rstrip() for line in lines)))
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join((f"**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines)))


def _from(cells: Cells, length: int | None) -> str:
    return ("<= " if length == min(n for _, _, n in cells) else "") + _number(length)


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.{digits}f}"


def _verdict(passed: bool | None) -> str:
    return {True: "yes", False: "NO", None: "-"}[passed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(tables(json.loads(options.report.read_text()), options.markdown))


if __name__ == "__main__":
    main()
