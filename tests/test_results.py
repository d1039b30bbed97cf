"""The committed results are what the README and the cards promise; each comes from a program that anyone can run."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.attention_summary import (
    BACKWARD,
    FORWARD,
    SLOPES,
    TARGETS,
    break_even,
    index,
    slope,
    speedup,
    summarize,
)
from hf_efficient import load_report
from hf_efficient.recipes.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

sys.path.insert(0, str(ROOT / "benchmarks"))  # its programs import each other
import pruning  # noqa: E402


def test_the_main_job_keeps_its_promise():
    report = load_report(ROOT / "model_cards" / "bbc-news")
    teacher, student, compared = report.teacher, report.student, report.comparison
    assert teacher.quality.main.value >= 0.96
    assert compared.quality_difference >= -0.01
    assert student.workload.batch_size == 1 and student.workload.sequence_length == 512
    assert compared.speedup >= 8
    assert student.size.bytes_on_disk <= 0.2 * teacher.size.bytes_on_disk
    assert report.commit and not report.commit.endswith("dirty")


def test_the_main_job_is_faster_still_in_8_bits():
    exports = {each.folder: each for each in load_report(ROOT / "model_cards" / "bbc-news").exports}
    small = exports["onnx-int8"]
    assert small.speedup > exports["onnx"].speedup and small.speedup >= 12 and small.quality_difference >= -0.01
    assert small.bytes_on_disk < 0.5 * exports["onnx"].bytes_on_disk


def test_whole_articles_are_read_four_times_as_fast_and_no_worse_than_their_beginnings():
    report = load_report(ROOT / "model_cards" / "bbc-news-long")
    assert report.student.workload.sequence_length == 2048
    assert report.comparison.speedup >= 4 and report.comparison.quality_difference >= 0


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_has_a_card_of_its_present_settings(recipe):
    from hf_efficient import Recipe

    report = load_report(ROOT / "model_cards" / recipe)
    assert report.recipe == Recipe.from_yaml(recipe).to_dict()


# Targets of benchmarks/attention_summary.py that the committed run does not reach, with what was measured: the number
# of times as fast as dense SDPA, or the slope. The docs say the same.
KNOWN_MISSES: dict[tuple[str, str], float] = {("local", "forward"): 23.87, ("additive", "forward"): 92.73}
# Memory that the allocator gives back and gets again page by page; see the test of the memory that is kept.
KNOWN_SLOPE_MISSES: dict[str, float] = {"local": 1.19, "strided": 1.09, "linear": 1.21, "additive": 1.13}
# (peer, mode): times as fast as the peer, where it is below 1.
SLOWER_THAN_PEER: dict[tuple[str, str], float] = {}

ATTENTION = json.loads((RESULTS / "attention_cpu.json").read_text())
CELLS = index(ATTENTION)


def assert_met(key, passed: bool, measured: float, misses: dict) -> None:
    """Met, or a known miss with the number that stands in the results; a known miss that is met is out of date."""
    if passed:
        assert key not in misses, f"{key} is met: take it out of the known misses"
    else:
        assert misses.get(key) == pytest.approx(measured, abs=0.01), f"{key}: measured {measured:.2f}"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.method}-{target.mode}")
def test_attention_is_as_fast_as_promised(target):
    measured = speedup(CELLS, target.method, target.mode)
    assert_met((target.method, target.mode), measured >= target.factor, measured, KNOWN_MISSES)


@pytest.mark.parametrize("method", SLOPES)
def test_attention_time_grows_as_promised(method):
    measured = slope(CELLS, method, FORWARD)
    assert_met(method, measured <= SLOPES[method], measured, KNOWN_SLOPE_MISSES)


@pytest.mark.parametrize("method", KNOWN_SLOPE_MISSES)
def test_attention_time_is_linear_where_memory_is_kept(method):
    kept = json.loads((RESULTS / "attention_cpu_kept_memory.json").read_text())
    assert slope(index(kept), method, FORWARD) <= SLOPES[method]


def test_attention_memory_is_linear():
    others = ATTENTION.get("peers", {"transformers_window": None, "flex_window": None})
    measured = {key for key in CELLS if key[2] == 16384 and key[0] not in others and "peak_bytes" in CELLS[key]}
    assert ("local", FORWARD, 16384) in measured and ("linear", BACKWARD, 16384) in measured
    for name, mode, length in measured:
        growth = CELLS[name, mode, length]["peak_bytes"] / CELLS[name, mode, length // 4]["peak_bytes"]
        assert 2 < growth < 6, (name, mode)  # 4 times the length, about 4 times the memory


def test_attention_is_faster_than_its_peers():
    rows = summarize(ATTENTION)["peers"]
    assert {row["of"].removesuffix("_causal") for row in rows} >= {"local", "strided", "lsh", "linear", "additive"}
    for row in rows:
        assert_met((row["peer"], row["mode"]), row["passed"], row["times_as_fast"], SLOWER_THAN_PEER)


def test_every_attention_kind_is_measured():
    from hf_efficient.attention.registry import ATTENTIONS

    configs = ATTENTION["setting"]["configs"]
    measured = {configs[base]["kind"] for base in configs if (base, FORWARD, 32768) in CELLS}
    ours = {kind for kind, variant in ATTENTIONS.items() if variant.__module__.startswith("hf_efficient.")}
    assert measured | {"merging"} == ours  # which is of a whole model: `benchmarks/merging.py`
    assert ("dense", FORWARD, 32768) in CELLS and ("dense", BACKWARD, 16384) in CELLS
    assert not ATTENTION["not_measured"]
    assert not [cell for cell in ATTENTION["cells"] if "error" in cell]
    assert not ATTENTION["machine"]["uncommitted_changes"]


def test_the_summary_is_that_of_the_cells():
    assert ATTENTION["summary"] == json.loads(json.dumps(summarize(ATTENTION)))


DECODING = json.loads((RESULTS / "decode_cpu.json").read_text())
FLAT = ("local", "local_global", "linear", "local_linear", "additive")


@pytest.mark.parametrize("method", FLAT)
def test_decoding_costs_the_same_after_any_context(method):
    cells = {cell["context"]: cell for cell in DECODING["cells"] if cell["method"] == method}
    assert min(cells) == 2048 and max(cells) == 32768
    assert len({cell["cache_bytes"] for cell in cells.values()}) == 1
    assert max(cell["seconds"] for cell in cells.values()) < 1.2 * cells[2048]["seconds"]


def test_dense_decoding_is_not_flat():
    cells = {cell["context"]: cell for cell in DECODING["cells"] if cell["method"] == "full_static"}
    assert cells[32768]["seconds"] > 2 * cells[2048]["seconds"]
    assert cells[32768]["cache_bytes"] > 15 * cells[2048]["cache_bytes"]


def test_break_even_and_slope_of_made_up_times():
    times = {"dense": lambda n: n**2, "ours": lambda n: 1000 * n, "never": lambda n: 2 * n**2, "always": lambda n: n}
    cells = {
        (name, FORWARD, length): {"seconds": float(seconds(length))}
        for name, seconds in times.items()
        for length in (64, 512, 2048, 8192, 32768)
    }
    assert break_even(cells, "ours", FORWARD) == pytest.approx(1000, rel=0.01)
    assert break_even(cells, "never", FORWARD) is None and break_even(cells, "always", FORWARD) == 64
    assert slope(cells, "ours", FORWARD) == pytest.approx(1) and slope(cells, "dense", FORWARD) == pytest.approx(2)
    assert speedup(cells, "ours", FORWARD) == pytest.approx(8.192)


def test_pruned_models_are_as_fast_as_their_macs_say():
    variants = json.loads((RESULTS / "pruning_speed_cpu.json").read_text())["results"]
    assert len(variants) > 10 and all(variant["efficiency"] >= 0.9 for variant in variants)


def test_a_speed_up_that_is_asked_for_is_met():
    targets = json.loads((RESULTS / "pruning_latency_cpu.json").read_text())["results"]
    asked = [entry["target"] for entry in targets]
    assert len(asked) == 5 and min(asked) == 1.3 and max(asked) == 4
    assert all(entry["reached"] == pytest.approx(entry["target"], rel=0.1) for entry in targets)


PRUNING = json.loads((RESULTS / "pruning_cpu.json").read_text())
PRUNED = pruning.summarize(PRUNING["cells"])
# Of the encoder's MACs -> points that the default may lose without training, mean of three seeds.
MAY_LOSE = {0.4: 0.3, 0.5: 0.4, 0.6: 1.0, 0.7: 2.5, 0.8: 6.0}
# The difference is -0.32, its standard error over test rows 0.3.
KNOWN_LOSSES: dict[float, float] = {0.4: 0.317}


@pytest.mark.parametrize("ratio", MAY_LOSE)
def test_pruning_without_training_loses_as_little_as_promised(ratio):
    found = PRUNED["reviews", "default", ratio]
    assert found["seeds"] == 3 and found["removed"] >= ratio - 0.005
    lost = -100 * found["difference"]
    assert_met(ratio, lost <= MAY_LOSE[ratio], lost, KNOWN_LOSSES)


@pytest.mark.parametrize("ratio", MAY_LOSE)
@pytest.mark.parametrize("peer", pruning.PEERS)
def test_the_default_is_better_than_every_peer(peer, ratio):
    """Below 40% nothing is lost that could be told from chance: Kwon 2022 stands 0.1 point higher at 20%."""
    ours, other = PRUNED["reviews", "default", ratio], PRUNED["reviews", peer, ratio]
    assert other["seeds"] == 3 and other["removed"] == pytest.approx(ratio, abs=0.01)
    assert ours["accuracy"] >= other["accuracy"]


# Times as fast, measured -> points that may be lost after at most three epochs of distillation.
DISTILLED = {2: 0.3, 4: 1.0, 8: 2.5}


@pytest.mark.parametrize("speedup", DISTILLED)
def test_what_is_distilled_after_pruning_loses_as_little_as_promised(speedup):
    report = json.loads((RESULTS / "pruning_distillation_cpu.json").read_text())
    assert report["settings"]["epochs"] <= 3
    reached = [cell for cell in report["cells"] if speedup <= cell["speedup"] < 1.5 * speedup]
    assert reached and all(100 * cell["difference"] >= -DISTILLED[speedup] for cell in reached)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_the_default_is_better_than_every_peer_on_news(ratio):
    report = json.loads((RESULTS / "pruning_bbc_cpu.json").read_text())
    found = pruning.summarize(report["cells"])
    ours = found["bbc-news", "default", ratio]
    assert ours["seeds"] == 3
    for method in (*pruning.PEERS, "random"):
        other = found.get(("bbc-news", method, ratio))
        assert other is not None and ours["accuracy"] > other["accuracy"]


@pytest.mark.parametrize("ratio", [0.2, 0.3])
def test_a_little_pruning_loses_nothing_that_can_be_measured(ratio):
    found = PRUNED["reviews", "default", ratio]
    assert found["seeds"] == 3 and abs(found["difference"]) < found["difference_error"]


def test_a_decoder_keeps_its_perplexity():
    report = json.loads((RESULTS / "pruning_decoder_cpu.json").read_text())
    cells = {(cell["method"], cell["ratio"]): cell["perplexity"] for cell in report["cells"]}
    assert cells["default", 0.3] <= 2 * cells["dense", 0.0]
    assert cells["default", 0.3] < cells["default without reconstruction", 0.3] < cells["random", 0.3]


# Ratios of benchmarks/distillation.py above their target of 1.05, with what was measured. The pair `language` is so
# small that the arithmetic of its 16,384 logits is most of a step; docs/distillation.md says the same.
KNOWN_STEPS: dict[tuple[str, str], float] = {
    ("language", "live / (teacher + plain)"): 1.09,
    ("language", "cached / plain"): 1.12,
}


@pytest.mark.parametrize("ratio", ["live / (teacher + plain)", "cached / plain"])
@pytest.mark.parametrize("pair", ["classifier", "language"])
def test_a_step_of_distillation_costs_its_parts(pair, ratio):
    found = json.loads((RESULTS / "distillation_cpu.json").read_text())["pairs"][pair]["ratios"][ratio]
    if (pair, ratio) in KNOWN_STEPS:
        assert 1.05 < found <= KNOWN_STEPS[pair, ratio]
    else:
        assert found <= 1.05


def test_distillation_is_as_fast_as_its_peers_and_computes_the_same():
    report = json.loads((RESULTS / "distillation_cpu.json").read_text())
    assert report["pairs"]["classifier"]["ratios"]["TextBrewer / ours"] >= 1
    assert report["pairs"]["language"]["ratios"]["TRL / ours"] >= 1
    assert len(report["values"]) == 5 and max(report["values"].values()) < 1e-12
    assert all(count <= 2 for name, count in report["copies"].items() if name.startswith("ours"))
    assert not report["commit"].endswith("dirty")


def test_the_package_and_its_command_start_fast():
    report = json.loads((RESULTS / "startup_cpu.json").read_text())
    assert report["on_top_of_transformers_s"] <= 0.3 and report["medians_s"]["hf-efficient --help"] <= 0.5


def test_the_memory_of_distillation_is_what_the_page_counts():
    for case in json.loads((RESULTS / "distillation_memory_cpu.json").read_text())["cases"].values():
        assert case["measured"] == pytest.approx(case["arithmetic"], rel=0.15)
