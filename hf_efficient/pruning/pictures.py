"""The picture of a sweep: what is left of the quality, over how much was removed.

Needs matplotlib (`pip install "hf-efficient[plots]"`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reporting.plots import new_figure, save_figure


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """One point for each ratio with one standard error; the dense model, the first row, is the dashed line."""
    dense, *pruned = sorted(rows, key=lambda row: row["removed_macs"])
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    axes.axhline(dense["score"], color="#6b7280", linestyle="--", linewidth=1.2, label="dense")
    axes.errorbar(
        [row["removed_macs"] for row in pruned],
        [row["score"] for row in pruned],
        [row["error"] for row in pruned],
        color="#0072b2",
        marker="o",
        capsize=3,
        label="pruned",
    )
    axes.set(xlabel="MACs of the layers removed", ylabel=dense["metric"], xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color="#eceff3")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)
