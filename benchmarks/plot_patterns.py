"""The attention patterns: one picture for every kind that has weights, and one of all for the page that compares.

    python benchmarks/plot_patterns.py docs/images

The weights are those of the real modules, `AttentionVariant.weights`, with learned parts at their starting values, but
for the kernel, whose width is set as training might leave it. The tokens are made up: passages on a few topics that
come back later, and a smooth part that makes near tokens alike. Every row is divided by its largest weight; white is
no weight at all.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from hf_efficient import AttentionConfig
from hf_efficient.attention.engines.parts import full_weights
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.variant import HeadShape

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

LENGTH, DIM = 192, 64
CONFIGS = {  # small, so that the pattern shows at this length
    "full": AttentionConfig("full"),
    "local": AttentionConfig("local", window=12, global_tokens=3),
    "strided": AttentionConfig("strided", block_size=8, num_blocks=5),
    "topk": AttentionConfig("topk", block_size=8, top_k=5),
    "lsh": AttentionConfig("lsh", block_size=12, num_buckets=8, num_hashes=2),
    "linear": AttentionConfig("linear", feature_map="elu"),
    "local_linear": AttentionConfig("local_linear", window=16, feature_map="hedgehog"),
    "kernel": AttentionConfig("kernel", feature_dim=128),
}
LEARNED = {"kernel": {"log_width": math.log(30), "log_temperature": math.log(1.5)}}
COLORS = LinearSegmentedColormap.from_list("ink", ["#ffffff", "#d6e4f2", "#74a7d8", "#2264ab", "#0b2a5b"])
FAINTEST = 0.16  # the shade of the smallest weight that is not 0


def make_tokens() -> tuple[Tensor, Tensor]:
    """Query and key [1, 1, LENGTH, DIM]."""
    generator = torch.Generator().manual_seed(3)
    topics = torch.randn(4, DIM, generator=generator)
    lengths = torch.randint(14, 34, (LENGTH // 14,), generator=generator)
    order = torch.arange(len(lengths)) * 3 % 4  # neighbours differ
    topic = topics[order.repeat_interleave(lengths)[:LENGTH]]
    position = torch.arange(LENGTH)[:, None] / 12
    waves = position * torch.randn(1, DIM, generator=generator) + 6.28 * torch.rand(1, DIM, generator=generator)
    shared = 0.6 * topic + 0.6 * waves.cos()
    query, key = (shared + 0.4 * torch.randn(LENGTH, DIM, generator=generator) for _ in range(2))
    return query[None, None], key[None, None]


def pattern(kind: str, causal: bool) -> Tensor:
    """[LENGTH, LENGTH] weights, the largest of each row 1."""
    query, key = make_tokens()
    options = {"causal": causal, "scaling": DIM**-0.5, "dropout": 0.0, "bias": None}
    if kind == "full":
        weights = full_weights(query, key, None, **options)
    else:
        variant = ATTENTIONS[kind](CONFIGS[kind], HeadShape(1, 1, DIM))
        variant.reset_parameters()
        with torch.no_grad():
            for name, value in LEARNED.get(kind, {}).items():
                variant.get_parameter(name).fill_(value)
            weights = variant.weights(query, key, None, **options)
    return weights[0, 0] / weights[0, 0].amax(-1, keepdim=True)


def draw(axes: Axes, weights: Tensor, title: str, labels: bool = True) -> None:
    shade = torch.where(weights > 0, FAINTEST + (1 - FAINTEST) * weights.clamp(min=0) ** 0.7, 0)
    axes.imshow(shade, cmap=COLORS, vmin=0, vmax=1, interpolation="nearest", extent=(0, LENGTH, LENGTH, 0))
    axes.set_title(title, fontsize=11)
    ticks = [0, LENGTH // 2, LENGTH]
    axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), xticks=ticks, yticks=ticks)
    if labels:
        axes.set(xlabel="key", ylabel="query")
    else:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, labelsize=8, colors="#666666")
    for spine in axes.spines.values():
        spine.set(color="#c8c8c8", linewidth=0.8)


def draw_kind(kind: str, output: Path) -> None:
    """Bidirectional and causal, side by side."""
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.1)
    for axes, causal in zip(panels, (False, True), strict=True):
        draw(axes, pattern(kind, causal), "causal" if causal else "bidirectional")
    figure.suptitle(describe(kind), fontsize=10, color="#555555")
    figure.savefig(output / f"pattern_{kind}.png", dpi=110)
    plt.close(figure)


def describe(kind: str) -> str:
    settings = {
        name: value for name, value in CONFIGS[kind].to_dict().items() if name not in ("kind", "seed") and value
    }
    return ", ".join((f'"{kind}"', *(f"{name}={value!r}" for name, value in settings.items())))


def draw_all(kinds: list[str], output: Path) -> None:
    columns = -(-len(kinds) // 2)
    figure, panels = plt.subplots(2, columns, figsize=(2.9 * columns, 6.2), layout="constrained")
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        axes.set_visible(True)
        draw(axes, pattern(kind, False), kind, labels=False)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.savefig(output / "patterns.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in CONFIGS if kind == "full" or (kind in ATTENTIONS and ATTENTIONS[kind].has_weights)]
    for kind in kinds:
        draw_kind(kind, options.output)
    draw_all(kinds, options.output)


if __name__ == "__main__":
    main()
