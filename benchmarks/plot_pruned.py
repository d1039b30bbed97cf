"""Curves of `pruning_distillation.py` (accuracy over measured speed) and `pruning_decoder.py` (perplexity over MACs).

python benchmarks/plot_pruned.py benchmarks/results/pruning_distillation_cpu.json docs/images/pruning_distillation.png
python benchmarks/plot_pruned.py benchmarks/results/pruning_decoder_cpu.json docs/images/pruning_decoder.png
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

COLORS = {"default": "#c2410c", "heads": "#3b82c4", "neurons": "#2f9e8f", "layers": "#6d3fc0"}
COLORS |= {"magnitude": "#d6336c", "taylor": "#3f8f3f", "activation": "#a07fe0"}
INK, CONTROL = "#1a1a1a", "#999999"


def distillation(axes: Axes, cells: list[dict[str, Any]]) -> None:
    """Means over seeds; bars are the paired standard error of the difference to the dense model."""
    ratios = sorted({cell["ratio"] for cell in cells})
    own = [[cell for cell in cells if cell["ratio"] == ratio] for ratio in ratios]

    def mean(name: str) -> list[float]:
        return [statistics.fmean(cell[name] for cell in group) for group in own]

    speeds = mean("speedup")
    axes.errorbar(
        speeds,
        mean("accuracy"),
        mean("difference_error"),
        color="#c2410c",
        linewidth=2.6,
        marker="o",
        capsize=2,
        label="pruned, then distilled",
    )
    axes.plot(speeds, mean("pruned"), color="#3b82c4", marker="o", label="pruned, no training")
    axes.axhline(mean("dense_accuracy")[0], color=INK, linestyle="--", linewidth=1.2, label="dense")
    axes.set(xlabel="times as fast as the dense model, 8 x 128 tokens on a CPU", ylabel="test accuracy", xscale="log")
    axes.set_xticks(speeds, [f"{speed:.1f}x" for speed in speeds])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def decoder(axes: Axes, cells: list[dict[str, Any]]) -> None:
    dense = next(cell["perplexity"] for cell in cells if cell["method"] == "dense")
    for method in dict.fromkeys(cell["method"] for cell in cells if cell["method"] != "dense"):
        base = method.split()[0]
        points = sorted((cell["removed"], cell["perplexity"] / dense) for cell in cells if cell["method"] == method)
        style = {"color": COLORS.get(base, CONTROL), "linestyle": "-" if method in COLORS else ":"}
        axes.plot(*zip(*points, strict=True), **style, marker="o", markersize=3, label=method)
    axes.axhline(1, color=INK, linestyle="--", linewidth=1.2, label=f"dense: {dense:.0f}")
    axes.set(xlabel="MACs of the layers removed", ylabel="perplexity, times that of the dense model", yscale="log")
    axes.set_yticks([1, 1.5, 2, 4, 8], ["1", "1.5", "2", "4", "8"])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


DRAWN = {"pruning_distillation": distillation, "pruning_decoder": decoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    figure, axes = plt.subplots(figsize=(7, 5))
    DRAWN[report["benchmark"]](axes, report["cells"])
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(report["model"], fontsize=10, color="#555555")
    figure.savefig(options.output, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
