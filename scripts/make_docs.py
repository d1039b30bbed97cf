"""Bring `benchmarks/results` into the tables of the pages and of the README, from the JSON alone.

python scripts/make_docs.py             # what lies between `<!-- measured: ... -->` and `<!-- end -->`
python scripts/make_docs.py --check     # fail if a table is not what the results say
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention_summary as summary  # noqa: E402
import distillation_memory  # noqa: E402
import distillation_quality  # noqa: E402
import llm  # noqa: E402
import pruning  # noqa: E402
import pruning_embeddings  # noqa: E402
import pruning_folder  # noqa: E402
from attention_methods import CONFIGS  # noqa: E402

from hf_efficient import AttentionConfig  # noqa: E402
from hf_efficient.attention.config import KINDS as SETTINGS  # noqa: E402
from hf_efficient.attention.registry import ATTENTIONS  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(report: dict) -> str:
    """On what the numbers were taken."""
    machine = report["machine"]
    return (
        f"Batch 1, {report['setting']['heads']} heads of {report['setting']['head_dim']}, float32, "
        f"{machine['cpu'].split(' 64')[0]}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit'][:7]}, {machine['date'][:10]}."
    )


def methods_of(kind: str, report: dict) -> list[str]:
    measured = {cell["method"] for cell in report["cells"]}
    names = [name for name, config in CONFIGS.items() if config["kind"] == kind]
    return [name for base in names for name in (base, base + summary.CAUSAL) if name in measured]


def table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    if value < 1:  # 0.96 is not 1.0, and 0.04 is not 0.0
        return f"{value:.2g}{unit}" if float(f"{value:.2g}") < 1 else f"{value:.4g}{unit}"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.1f}") + unit


def cost_row(name: str, report: dict) -> tuple[str, ...]:
    """Times, speed-ups and memory of one method at the target length, its slope and its break-even length."""
    cells = summary.index(report)
    row = [f"`{name}`"]
    for mode in (summary.FORWARD, summary.BACKWARD):
        cell = cells.get((name, mode, summary.LENGTH), {})
        peak = cell.get("peak_bytes")
        row += [
            number(cell["seconds"] * 1e3 if cell else None),
            number(summary.speedup(cells, name, mode), "x"),
            number(peak / 2**20 if peak else None),
        ]
    slope = summary.slope(cells, name, summary.FORWARD)
    row += ["-" if slope is None else f"{slope:.2f}", number(summary.break_even(cells, name, summary.FORWARD))]
    return tuple(row)


COST = (
    *("8,192 tokens", "forward, ms", "dense / this", "MiB", "with backward, ms", "dense / this", "MiB"),
    *("slope 2k-32k", "faster from, tokens"),
)


def cost_table(kind: str, report: dict) -> str:
    return table(COST, [cost_row(name, report) for name in methods_of(kind, report)]) + f"\n{where(report)}\n"


def chooser(report: dict) -> str:
    """One row for each kind: what it costs and from which length it pays."""
    cells = summary.index(report)
    rows = []
    for kind, (sees, decoding) in KINDS.items():
        name = next(iter(methods_of(kind, report)), kind)
        rows.append(
            (
                f"[`{kind}`](LINK/{kind}.md)",
                sees,
                number(summary.speedup(cells, name, summary.FORWARD), "x"),
                number(summary.speedup(cells, name, summary.BACKWARD), "x"),
                number(summary.break_even(cells, name, summary.FORWARD)),
                decoding,
                "yes" if ATTENTIONS[kind].needs_training else "little or none",
            )
        )
    headers = (
        "kind",
        "a token sees",
        "forward at 8k",
        "with backward",
        "faster from, tokens",
        "while decoding, keeps",
    )
    note = "`merging` makes whole layers faster, not attention alone: its page has a table of its own."
    return table((*headers, "needs training"), rows) + f"\nTimes as fast as dense SDPA. {note} {where(report)}\n"


KINDS = {
    "local": ("a window, and a few global tokens", "the window"),
    "strided": ("blocks spread over the text", "all keys"),
    "topk": ("the blocks that fit its content", "all keys, block sums"),
    "lsh": ("keys that hash alike", "all keys"),
    "linear": ("everything, through a feature map", "a fixed state"),
    "local_linear": ("a window exactly, the rest through a feature map", "window and state"),
    "additive": ("a learned summary of everything", "a fixed state"),
    "kernel": ("everything, weighted by distance", "all keys"),
    "merging": ("everything, of fewer tokens from layer to layer (images, sound)", "not in decoders"),
}


def settings(report: dict) -> str:
    """What each kind can be told, and what it was told for the tables of speed."""
    measured = report["setting"]["configs"]
    defaults = {entry.name: entry.default for entry in fields(AttentionConfig)}
    rows = []
    for kind in KINDS:
        own = ", ".join(f"`{name}={_shown(kind, name, defaults[name])}`" for name in SETTINGS[kind].fields)
        told = [
            ", ".join(f"{key} {value}" for key, value in config.items() if key != "kind") or "-"
            for config in measured.values()
            if config["kind"] == kind
        ]
        rows.append((f"`{kind}`", own or "none", "; ".join(told) or "-"))
    return table(("kind", "settings and their defaults", "in the tables of speed"), rows)


def _shown(kind: str, name: str, default: object) -> object:
    """A default of None in words."""
    if name == "global_tokens":
        sinks = AttentionConfig(kind).resolve(causal=True).global_tokens
        return f"0, in decoders {sinks}" if sinks else 0
    if name == "protected_tokens":
        return "those that are no part of the image"
    if default is None:
        return "16" if kind == "kernel" else "head dimension"
    return default


def decoding(report: dict) -> str:
    """Time per token and size of the cache, methods down and contexts across."""
    cells = {(cell["method"], cell["context"]): cell for cell in report["cells"]}
    contexts = sorted({context for _, context in cells})
    rows = []
    for method in dict.fromkeys(method for method, _ in cells):
        found = [cells[method, context] for context in contexts]
        times = [number(cell["seconds"] * 1e3) for cell in found]
        rows.append((f"`{method}`", *times, *(f"{cell['cache_bytes'] / 2**20:.2f}" for cell in (found[0], found[-1]))))
    headers = ("ms per token after", *(f"{context:,}" for context in contexts))
    machine, setting = report["machine"], report["setting"]
    note = (
        f"\nA Llama of {setting['num_hidden_layers']} layers, batch 1, float32, {machine['cpu'].split(' 64')[0]}, "
        f"{machine['threads']} threads, commit {machine['commit'][:7]}, {machine['date'][:10]}; window "
        f"{setting['window']}.\n"
    )
    sizes = tuple(f"MiB of cache at {context:,}" for context in (contexts[0], contexts[-1]))
    return table((*headers, *sizes), rows) + note


def quality(report: dict) -> str:
    """What each kind costs in quality: kinds down, jobs and stages across."""
    cells = {(cell["job"], cell["kind"], cell["stage"]): cell for cell in report["cells"]}
    score_of = {cell["job"]: cell["score"] for cell in report["cells"]}  # in the order in which the jobs were run
    columns = [(job, stage) for job in score_of for stage in ("converted", "transferred", "distilled")]
    rows = []
    for kind in dict.fromkeys(kind for _, kind, _ in cells):
        found = [cells.get((job, kind, stage)) for job, stage in columns]
        rows.append((f"`{kind}`", *(_score(cell) for cell in found)))
    headers = ("", *(f"{job}: {score_of[job]}, {stage}" for job, stage in columns))
    steps = report["settings"]
    note = (
        f"\n{steps['transfer_steps']} steps of transfer (kinds with learned parts), {steps['steps']} of "
        "distillation; ± one standard error, one seed: differences within two of them may be chance.\n"
    )
    return table(headers, rows) + note


def _score(cell: dict | None) -> str:
    if cell is None:
        return ""
    if cell["score"] == "accuracy":
        return f"{cell['value']:.1%} ± {cell['standard_error'] * 100:.1f}"
    return f"{cell['value']:.1f}"


def pruned(job: str, report: dict) -> str:
    """Points lost without training: methods down, ratios across."""
    found = pruning.summarize(report["cells"])
    ratios = sorted({ratio for _, _, ratio in found if ratio})
    methods = [method for _, method, _ in found if method != pruning.DENSE]
    rows = []
    for method in dict.fromkeys(methods):
        own = [found.get((job, method, ratio)) for ratio in ratios]
        seeds = sorted({entry["seeds"] for entry in own if entry})
        shown = [
            f"{100 * entry['difference']:+.1f} ± {100 * entry['difference_error']:.1f}" + _overshot(entry, ratio)
            if entry
            else ""
            for ratio, entry in zip(ratios, own, strict=True)
        ]
        rows.append((f"`{method}`", *shown, " or ".join(str(number) for number in seeds)))
    dense = found[job, pruning.DENSE, 0.0]["accuracy"]
    note = (
        f"\nPoints of accuracy against the dense {dense:.1%}, ± the standard error over test rows; "
        f"{report['settings']['calibration']:,} training rows, commit {report['cells'][-1]['commit'][:7]}.\n"
    )
    return table(("MACs removed", *(f"{ratio:.0%}" for ratio in ratios), "seeds"), rows) + note


def distilled(report: dict) -> str:
    """Before and after training: a row for each ratio, the mean of its seeds."""
    rows = []
    for ratio in sorted({cell["ratio"] for cell in report["cells"]}):
        own = [cell for cell in report["cells"] if cell["ratio"] == ratio]
        removed, speedup, dense, cut, after, difference = (
            statistics.fmean(cell[name] for cell in own)
            for name in ("removed", "speedup", "dense_accuracy", "pruned", "accuracy", "difference")
        )
        error = math.hypot(*(cell["difference_error"] for cell in own)) / len(own)
        accuracy = (f"{value:.1%}" for value in (dense, cut, after))
        lost = f"{100 * difference:+.1f} ± {100 * error:.1f}"
        rows.append((f"{removed:.0%}" if ratio else "none", number(speedup, "x"), *accuracy, lost, str(len(own))))
    headers = ("MACs removed", "speed-up", "dense", "pruned", "then distilled", "difference", "seeds")
    training = report["settings"]
    note = (
        f"\n{training['epochs']:g} epochs; timed at 8 x 128 tokens, {report['environment']['cpu']}, "
        f"{report['threads']} threads, commit {report['cells'][-1]['commit'][:7]}.\n"
    )
    return table(headers, rows) + note


def decoder(report: dict) -> str:
    """Perplexity as a multiple of the dense model's: methods down, ratios across."""
    cells = {(cell["method"], cell["ratio"]): cell for cell in report["cells"]}
    dense = cells["dense", 0.0]["perplexity"]
    ratios = sorted({ratio for _, ratio in cells if ratio})
    rows = []
    for method in dict.fromkeys(method for method, ratio in cells if ratio):
        own = [cells.get((method, ratio)) for ratio in ratios]
        shown = [f"{cell['perplexity'] / dense:.2f}" + _overshot(cell, cell["ratio"]) if cell else "" for cell in own]
        rows.append((f"`{method}`", *shown))
    headers = ("MACs removed", *(f"{ratio:.0%}" for ratio in ratios))
    return table(headers, rows) + f"\nTimes the perplexity of the dense model, {dense:.1f}.\n"


def _overshot(cell: dict, ratio: float) -> str:
    """What has left, where it is much more than was asked for: whole layers."""
    return f" ({cell['removed']:.0%})" if cell["removed"] > ratio + 0.02 else ""


def pruned_speed(report: dict) -> str:
    """What becomes of removed MACs: ways to remove them down, ratios across."""
    cells = {(cell["variant"], cell["ratio"]): cell for cell in report["results"] if cell["ratio"]}
    ratios = sorted({ratio for _, ratio in cells})
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in cells):
        own = [cells.get((variant, ratio)) for ratio in ratios]
        shown = [f"{cell['speedup']:.2f}x of {cell['mac_ratio']:.2f}x" if cell else "" for cell in own]
        rows.append((f"`{variant}`", *shown))
    headers = ("asked for", *(f"ratio {ratio}" for ratio in ratios))
    return table(headers, rows) + _timed(report)


def latency(report: dict) -> str:
    """Speed-ups asked for and reached."""
    found = report["results"]
    headers = ("asked for", *(f"{entry['target']}x" for entry in found))
    return table(headers, [("reached", *(f"{entry['reached']:.2f}x" for entry in found))]) + _timed(report)


def _timed(report: dict) -> str:
    used, machine = report["settings"], report["environment"]
    return (
        f"\nMiniLM at {used['batch']} x {used['length']} tokens, {used['dtype']}, {machine['cpu']}, {used['threads']} "
        f"threads, medians of {used['rounds']} rounds in turns, commit {report['commit'][:7]}.\n"
    )


def losses(report: dict) -> str:
    """What each mix of losses gives, by job, over the seeds that have all mixes."""
    mixes = [distillation_quality.UNTRAINED, *distillation_quality.MIXES]
    runs = Counter((cell["job"], cell["seed"]) for cell in report["cells"])
    cells = [cell for cell in report["cells"] if runs[cell["job"], cell["seed"]] == len(mixes)]
    found = distillation_quality.summary(cells)
    metrics = {cell["job"]: cell["metric"] for cell in cells}
    rows = []
    for job in (job for job in distillation_quality.JOBS if job in metrics):
        scale, digits = (100, 1) if metrics[job] == "accuracy" else (1, 2)
        cells = [found[job, mix] for mix in mixes]
        values = [f"{scale * cell['value']:.{digits}f} ± {scale * cell['spread']:.{digits}f}" for cell in cells]
        seeds = int(min(cell["seeds"] for cell in cells))
        name, teacher = f"{job} ({seeds} seed{'s' * (seeds > 1)})", f"{scale * cells[0]['teacher']:.{digits}f}"
        rows.append((name, metrics[job], teacher, *values))
        rows.append(("", "agreement, %", "", *(f"{100 * cell['agreement']:.1f}" for cell in cells)))
    machine = report["environment"]
    return table(("job", "", "teacher", *mixes), rows) + (
        f"\nMean ± standard deviation over the seeds, {machine['cpu']}, commit {report['commit'][:7]}.\n"
    )


def distillation_cost(report: dict) -> str:
    """What a step costs beside its parts and beside peers."""
    names = {"live / (teacher + plain)": "live teacher / (teacher's forward + plain step)"}
    names |= {"cached / plain": "cached teacher / plain step"}
    rows = [
        (pair, names.get(name, name), f"{value:.2f}", "{:.2f} to {:.2f}".format(*entry["quartiles"][name]))
        for pair, entry in report["pairs"].items()
        for name, value in entry["ratios"].items()
    ]
    machine = report["environment"]
    return table(("pair", "time of a step", "ratio", "middle half"), rows) + (
        f"\nMedians of {report['rounds']} rounds in turns, {machine['cpu']}, {report['threads']} threads, commit "
        f"{report['commit'][:7]}.\n"
    )


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {  # name in a page: the results, and what makes a table of them
    "chooser": ("attention_cpu", chooser),
    "settings": ("attention_cpu", settings),
    "decoding": ("decode_cpu", decoding),
    "quality": ("quality_cpu", quality),
    "pruned": ("pruning_cpu", partial(pruned, "reviews")),
    "pruned_news": ("pruning_bbc_cpu", partial(pruned, "bbc-news")),
    "distilled": ("pruning_distillation_cpu", distilled),
    "decoder": ("pruning_decoder_cpu", decoder),
    "losses": ("distillation_quality_cpu", losses),
    "distillation_cost": ("distillation_cpu", distillation_cost),
    "distillation_memory": ("distillation_memory_cpu", distillation_memory.page_table),
    "pruned_speed": ("pruning_speed_cpu", pruned_speed),
    "embeddings": ("pruning_embeddings_cpu", pruning_embeddings.page_table),
    "latency": ("pruning_latency_cpu", latency),
    "folder": ("pruning_folder_cpu", pruning_folder.page_table),
    "llm": ("llm_cpu", partial(llm.page_table, domain="in domain")),
    "llm_off_domain": ("llm_cpu", partial(llm.page_table, domain="off domain")),
    **{kind: ("attention_cpu", partial(cost_table, kind)) for kind in KINDS},
}


def filled(path: Path) -> str:
    """The page with its tables as the results say."""
    link = "docs/attention" if path.name == "README.md" else "attention"

    def fill(match: re.Match) -> str:
        return match[1] + TABLES[match[2]][1](load(TABLES[match[2]][0])).replace("LINK", link) + match[3]

    return MARKED.sub(fill, path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something has drifted")
    options = parser.parse_args()
    drifted = [path for path in PAGES if filled(path) != path.read_text(encoding="utf-8")]
    if options.check and drifted:
        print("Not what the results say, run `make cards`:", *(p.relative_to(ROOT) for p in drifted), file=sys.stderr)
        return 1
    for path in drifted:
        path.write_text(filled(path), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
