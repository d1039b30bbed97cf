"""Pictures of a sweep: what is left of the quality over how much was removed, and how importance is spread.

Needs matplotlib (`pip install "hf-efficient[plots]"`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io.text import for_plot
from ...pruning.score.units import Scores
from ...reporting.plots import new_figure, save_figure, without_tex


@without_tex
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
    axes.set(xlabel="MACs of the layers removed", ylabel=for_plot(dense["metric"]), xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color="#eceff3")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)


@without_tex
def plot_importance(scores: Scores, path: str | Path) -> Path:
    """A panel for each stack and kind of unit, a box for each layer: the middle half of the scores and all others as
    dots. Scores of zero or below have no place on the logarithmic axis."""
    panels: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for group, values in scores.items():
        name = ", ".join(str(layer) for layer in group.layers) if len(group.layers) < 3 else "all"
        panels.setdefault((group.stack, group.kind), []).append((name, values[values > 0].tolist()))
    figure = new_figure(1 + 4.5 * len(panels), 4)
    for number, ((stack, kind), boxes) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        drawn = axes.boxplot([values for _, values in boxes], widths=0.6, whis=(5, 95), flierprops={"markersize": 2})
        for median in drawn["medians"]:
            median.set_color("#0072b2")
        axes.set_xticks(range(1, len(boxes) + 1), [name for name, _ in boxes])
        axes.set(xlabel=f"layer ({for_plot(stack)})", yscale="log", title=for_plot(kind.replace("_", " ")))
        axes.set_ylabel("importance of a unit" if number == 1 else "")
        axes.grid(color="#eceff3", axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
