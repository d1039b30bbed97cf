"""Time over length of every bidirectional kind and of dense attention, from the JSON of `attention.py`.

python benchmarks/plot_attention.py benchmarks/results/attention_cpu.json docs/images/attention_speed.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
from attention_summary import BACKWARD, CAUSAL, FORWARD, index

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

COLORS = {  # one hue for each family
    "dense": "#1a1a1a",
    "local": "#c2410c",
    "strided": "#ea7317",
    "topk": "#d6336c",
    "lsh": "#a61e4d",
    "linear": "#1c4f9c",
    "linear_relu": "#3b82c4",
    "linear_favor": "#0e7490",
    "linear_hedgehog": "#5b9bd5",
    "local_linear": "#2f9e8f",
    "additive": "#3f8f3f",
    "kernel": "#6d3fc0",
    "kernel_positions": "#a07fe0",
}
SHORTEST = 256
GAP = 0.041  # between two labels, as part of the height of the axes


def draw(axes: Axes, report: dict, mode: str) -> None:
    """One panel: lines with their names at the right ends."""
    cells = index(report)
    ends = []
    for name, color in COLORS.items():
        points = sorted((n, cell["seconds"]) for (other, at, n), cell in cells.items() if (other, at) == (name, mode))
        points = [(n, seconds) for n, seconds in points if n >= SHORTEST]
        if points:
            width = 2.6 if name == "dense" else 1.6
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, marker="o", markersize=3)
            ends.append((name, color, *points[-1]))
    lengths = sorted({n for name, at, n in cells if at == mode and n >= SHORTEST and not name.endswith(CAUSAL)})
    axes.set(xscale="log", yscale="log", xlabel="tokens", title=mode, xlim=(lengths[0] * 0.9, lengths[-1] * 1.12))
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FixedFormatter([str(n) if n < 1024 else f"{n // 1024}k" for n in lengths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_duration))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for name, color, length, seconds in ends:
        if length < lengths[-1]:  # it ends before the edge
            axes.annotate(name, (length, seconds), (0, 6), textcoords="offset points", color=color, weight="bold")
    _label(axes, [end for end in ends if end[2] == lengths[-1]])


def _duration(seconds: float, _: object) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"


def _label(axes: Axes, ends: list[tuple]) -> None:
    """Names at the ends of their lines, moved apart where they would cover each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((to_axes.transform((length, seconds))[1], name, color) for name, color, length, seconds in ends)
    heights = [height for height, _, _ in placed]
    for _ in range(200):
        for lower in range(len(heights) - 1):
            overlap = GAP - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    for height, (_, name, color) in zip(heights, placed, strict=True):
        text = name.replace("_", " ")
        weight = "bold" if name == "dense" else "normal"
        axes.text(1.01, height, text, transform=axes.transAxes, color=color, va="center", fontsize=9, weight=weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    figure, panels = plt.subplots(1, 2, figsize=(12.5, 6), gridspec_kw={"wspace": 0.4})
    for axes, mode in zip(panels, (FORWARD, BACKWARD), strict=True):
        draw(axes, report, mode)
    panels[0].set_ylabel("time of one layer's attention")
    machine, setting = report["machine"], report["setting"]
    where = f"{machine['cpu']}, {machine['threads']} threads"
    shape = f"batch {setting['batch']}, {setting['heads']} heads of {setting['head_dim']}, {setting['dtype']}"
    figure.suptitle(f"{shape}; {where}; torch {machine['torch']}", fontsize=10, color="#555555", y=0.99)
    figure.savefig(options.output, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
