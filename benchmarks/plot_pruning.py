"""Accuracy over removed MACs, one line for each method, from the JSON of `pruning.py`.

    python benchmarks/plot_pruning.py benchmarks/results/pruning_cpu.json docs/images/pruning_quality.png

Means over seeds; bars are one standard error of the difference to the dense model, paired over test rows (between
methods it is the one that counts), and the dashed line is the dense model.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from pruning import DENSE, summarize

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

COLORS = {  # drawn unless --methods says otherwise; one hue for each family
    "default": "#c2410c",
    "fisher": "#3b82c4",
    "fisher x4 +r": "#1c4f9c",
    "kwon 2022": "#2f9e8f",
    "torch-pruning taylor": "#6d3fc0",
    "torch-pruning l2": "#a07fe0",
    "layers loss": "#3f8f3f",
    "magnitude +r": "#d6336c",
    "random": "#999999",
}
GAP = 0.041  # between two labels, as part of the height of the axes


def draw(axes: Axes, summary: dict, job: str, methods: list[str], colors: dict[str, str]) -> None:
    """One panel: lines with their names at the right."""
    ends = []
    for method in methods:
        points = [entry for (own, name, _), entry in sorted(summary.items()) if (own, name) == (job, method)]
        if not points:
            continue
        removed, accuracy, error = zip(
            *((p["removed"], p["accuracy"], p["difference_error"]) for p in points), strict=True
        )
        width = 2.6 if method == "default" else 1.6
        axes.errorbar(
            removed, accuracy, error, color=colors[method], linewidth=width, marker="o", markersize=3, capsize=2
        )
        ends.append((accuracy[-1], method, colors[method]))
    dense = summary[job, DENSE, 0.0]["accuracy"]
    axes.axhline(dense, color="#1a1a1a", linewidth=1.2, linestyle="--")
    ends.append((dense, DENSE, "#1a1a1a"))
    axes.set(xlabel="MACs of the encoder removed", title=job)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, sorted(ends))


def _label(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names at the height of their last points, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    heights = [(accuracy - low) / (high - low) for accuracy, _, _ in ends]
    for _ in range(200):
        for lower in range(len(heights) - 1):
            overlap = GAP - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    for height, (_, name, color) in zip(heights, ends, strict=True):
        weight = "bold" if name in (DENSE, "default") else "normal"
        axes.text(1.02, height, name, transform=axes.transAxes, color=color, va="center", fontsize=9, weight=weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--methods", nargs="+", help=f"default: {', '.join(COLORS)}")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    methods = options.methods or list(COLORS)
    palette = plt.get_cmap("tab20")
    colors = COLORS | {name: palette(i % 20) for i, name in enumerate(methods) if name not in COLORS}
    summary = summarize(report["cells"])
    jobs = list(dict.fromkeys(job for job, _, _ in summary))
    figure, panels = plt.subplots(
        1, len(jobs), figsize=(6.25 * len(jobs), 6), gridspec_kw={"wspace": 0.45}, squeeze=False
    )
    for axes, job in zip(panels[0], jobs, strict=True):
        draw(axes, summary, job, methods, colors)
    panels[0][0].set_ylabel("test accuracy")
    seeds = len({cell["seed"] for cell in report["cells"]})
    about = f"{report['model']}; no training after pruning; {seeds} seed{'s' * (seeds > 1)}"
    figure.suptitle(about, fontsize=10, color="#555555", y=0.99)
    figure.savefig(options.output, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
