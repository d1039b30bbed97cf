"""The benchmark programs run, and the peers that they compare with do the work that is said of them."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.attention_methods import CAUSAL, CONFIGS, DIM, HEADS, PEERS, installed, make_method, our_names
from benchmarks.coverage import summary, try_type
from benchmarks.coverage_page import write_page
from benchmarks.pruning_embeddings import PARTS
from benchmarks.pruning_peers import PEERS as PRUNING_PEERS
from benchmarks.pruning_peers import (
    Calibration,
    OutOfReach,
    normal_equations,
    rearrange_mask,
    search_masks,
    solve_scales,
)
from hf_efficient.pruning.price.costs import total_cost

from .helpers import assert_close
from .processes import python

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name in PEERS if name != "flex_window"])  # needs a compiler
def test_a_peer_does_the_same_work(name):
    peer = PEERS[name]
    if not installed(name):
        pytest.skip(f"needs {peer.package}")
    assert peer.of.removesuffix(CAUSAL) in CONFIGS
    inputs = torch.randn(3, 1, HEADS, 512, DIM)
    method = make_method(name, 512)
    leaves = [tensor.detach().requires_grad_() for tensor in method.lay_out(*inputs)]
    out = method.call(*leaves)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert method.read(out).shape == inputs[0].shape
    if peer.exact:
        assert_close(method.read(out), make_method(peer.of, 512).call(*inputs), 1e-5)


def test_our_methods_take_the_inputs_of_dense_attention():
    inputs = torch.randn(3, 1, HEADS, 128, DIM)
    for name in our_names():
        out = make_method(name, 128).call(*inputs)
        assert out.shape == inputs[0].shape and out.isfinite().all(), name


@pytest.mark.thorough
@pytest.mark.processes
def test_attention_benchmark_runs_and_resumes(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks/attention.py"), "--repeats", "1", "--output", str(output)]

    def run(*arguments: str) -> dict:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "faster from" in done.stdout
        return {
            (cell["method"], cell["mode"], cell["length"]): cell for cell in json.loads(output.read_text())["cells"]
        }

    first = run("--kinds", "local", "--lengths", "64", "128", "--memory-lengths", "128")
    assert {key for key in first if key[0] == "local"} == {
        ("local", mode, length) for mode in ("forward", "forward+backward") for length in (64, 128)
    }
    assert first["local", "forward", 128]["speedup_over_dense"] > 0
    assert first["local", "forward+backward", 128]["peak_bytes"] > 0
    second = run("--kinds", "local", "linear", "--lengths", "128", "--resume", "--skip-memory")
    assert second["local", "forward", 128] == first["local", "forward", 128]  # kept, not measured again
    assert ("linear", "forward", 128) in second and ("linear", "forward", 64) not in second


@pytest.mark.thorough
@pytest.mark.processes
def test_quality_benchmark_runs_and_resumes(tmp_path):
    output = tmp_path / "quality.json"
    steps = ["--teacher-steps", "1", "--steps", "1", "--transfer-steps", "1"]
    files = ["--work", str(tmp_path / "work"), "--output", str(output)]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benchmarks/quality.py"), "--jobs", "language", "--threads", "1"]
        return subprocess.run([*command, *steps, *files, *arguments], capture_output=True, text=True, check=False)

    def cells() -> dict:
        return {(cell["kind"], cell["stage"]): cell for cell in json.loads(output.read_text())["cells"]}

    done = run("--kinds", "local", "hedgehog", "--limit", "30")
    assert done.returncode == 0, done.stderr
    assert "Need training after conversion: hedgehog. Usable as converted" in done.stdout
    first = cells()
    stages = ("converted", "transferred", "distilled")
    assert set(first) == {("local", "converted"), ("local", "distilled"), *(("hedgehog", stage) for stage in stages)}
    assert all(cell["score"] == "perplexity" and cell["standard_error"] > 0 for cell in first.values())
    assert run("--kinds", "local", "dense", "--limit", "30").returncode == 0
    second = cells()
    assert all(second[key] == cell for key, cell in first.items())  # kept, not measured again
    assert second["dense", "converted"]["difference_from_teacher"] == 0
    refused = run("--kinds", "local", "--limit", "40")
    assert refused.returncode != 0 and "other settings" in refused.stderr


def test_kwon_search_is_the_best_of_all_choices():
    heads = [torch.tensor([5.0, 1.0]), torch.tensor([3.0, 0.5])]
    neurons = [torch.tensor([2.0, 0.1, 0.3]), torch.tensor([0.9, 1.5, 0.2])]
    for budget in (4.0, 5.0, 7.5, 9.0, 18.0):
        found = search_masks(heads, neurons, head_cost=3.0, neuron_cost=1.0, budget=budget)
        flat = torch.cat(found[0]), torch.cat(found[1])
        assert 3 * flat[0].sum() + flat[1].sum() <= budget
        kept = sum(float((mask * torch.cat(own)).sum()) for mask, own in zip(flat, (heads, neurons), strict=True))
        assert kept == pytest.approx(_best_score(torch.cat(heads), torch.cat(neurons), budget))


def _best_score(heads: torch.Tensor, neurons: torch.Tensor, budget: float) -> float:
    """Over all subsets with at least one head."""
    best = 0.0
    for bits in product((0.0, 1.0), repeat=len(heads) + len(neurons)):
        chosen = torch.tensor(bits)
        kept, others = chosen.split([len(heads), len(neurons)])
        if kept.any() and 3 * kept.sum() + others.sum() <= budget:
            best = max(best, float((kept * heads).sum() + (others * neurons).sum()))
    return best


def test_kwon_rearrangement_sees_that_two_units_do_the_same():
    same = torch.tensor([1.0, 0.0, 0.0])
    gradients = torch.stack([same, same, -same, 2 * torch.eye(3)[1]], 1)  # units 0, 1, 2 score 1, unit 3 scores 4
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0])  # the loss would rise by |1 + 1|^2 = 4
    new = rearrange_mask(mask, gradients)
    assert new.sum() == 2 and new[3] == 1
    assert (gradients * (1 - new)).sum(1).norm() == 0  # 1 and -1 cancel
    assert torch.equal(rearrange_mask(torch.ones(4), gradients), torch.ones(4))


def test_kwon_tuning_is_least_squares_on_what_the_units_add():
    tokens, out, width = 50, 6, 2
    units, weight = torch.randn(tokens, 3 * width), torch.randn(out, 3 * width)
    mask = torch.tensor([1.0, 0.0, 1.0])
    added = torch.stack([units[:, i : i + width] @ weight[:, i : i + width].T for i in (0, 4)], -1)  # [T, out, 2]
    goal = added @ torch.tensor([1.5, 0.5])
    gram, moment = normal_equations(units, goal, weight, mask)
    columns = added.flatten(0, 1).double()
    assert_close(gram, columns.T @ columns, 1e-3)
    assert_close(moment, columns.T @ goal.flatten().double(), 1e-3)
    scales = solve_scales(gram, moment)
    assert_close(scales, torch.tensor([1.5, 0.5]), 1e-2)  # damping 1 is little against 50 tokens
    assert solve_scales(gram, 100 * moment) is None  # a scale beyond 10


@pytest.mark.parametrize("name", PRUNING_PEERS)
def test_a_pruning_peer_gives_what_it_says(name):
    if name.startswith("torch-pruning"):
        pytest.importorskip("torch_pruning")
    model, calibration = _tiny_bert()
    dense = total_cost(model, "macs", calibration.length)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = PRUNING_PEERS[name](model, 0.4, calibration, 0)
    assert 0.4 <= 1 - found.macs / dense < 0.6
    assert found.parameters < sum(parameter.numel() for parameter in model.parameters())
    inputs = calibration.without_labels()[0]
    with torch.no_grad():
        assert not torch.allclose(found.model(**inputs).logits, model(**inputs).logits, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_torch_pruning_says_what_it_cannot_reach():
    pytest.importorskip("torch_pruning")
    model, calibration = _tiny_bert()
    with pytest.raises(OutOfReach, match="of the MACs"):
        PRUNING_PEERS["torch-pruning l2"](model, 0.999, calibration, 0)


def _tiny_bert() -> tuple[transformers.PreTrainedModel, Calibration]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64, vocab_size=50, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[4:, 9:] = 0
    batches = [
        {
            "input_ids": torch.randint(1, 50, (8, 12)),
            "attention_mask": mask,
            "labels": torch.randint(2, (8,)),
        }
        for _ in range(4)
    ]
    return model, Calibration(batches, 10)


@pytest.mark.thorough
@pytest.mark.processes
def test_pruning_benchmark_runs_and_resumes(tmp_path):
    output = tmp_path / "pruning.json"
    few = ["--jobs", "bbc-news", "--seeds", "0", "--teacher-steps", "1", "--calibration", "8", "--limit", "10"]
    files = ["--work", str(tmp_path / "work"), "--output", str(output), "--threads", "1"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benchmarks/pruning.py"), *few, *files, "--ratios", "0.5"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    def cells() -> dict:
        return {cell["method"]: cell for cell in json.loads(output.read_text())["cells"]}

    done = run("--methods", "fisher")
    assert done.returncode == 0, done.stderr
    first = cells()
    assert set(first) == {"dense", "fisher"} and first["dense"]["difference"] == first["dense"]["removed"] == 0
    assert 0.5 <= first["fisher"]["removed"] < 0.52
    assert run("--methods", "magnitude", "random", "--all").returncode == 0
    second = cells()
    assert all(second[key] == cell for key, cell in first.items())  # kept, not measured again
    assert set(second) == {"dense", "fisher", "magnitude", "random"}
    refused = run("--limit", "20")
    assert refused.returncode != 0 and "other settings" in refused.stderr
    image = tmp_path / "pruning.png"
    plot = [sys.executable, str(ROOT / "benchmarks/plot_pruning.py"), str(output), str(image)]
    assert subprocess.run(plot, capture_output=True, check=False).returncode == 0 and image.stat().st_size > 10_000


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "few", "measured"),
    [
        pytest.param("pruning_speed", ["--ratios", "0.5"], "speedup", marks=pytest.mark.thorough),
        pytest.param("pruning_latency", ["--targets", "2.0"], "reached", marks=pytest.mark.thorough),
    ],
)
def test_benchmarks_of_pruned_speed_run(program, few, measured, tmp_path, pytestconfig):
    """With the bundled model with --thorough, else with a tiny one."""
    output = tmp_path / "speed.json"
    command = [str(ROOT / f"benchmarks/{program}.py")]
    if not pytestconfig.getoption("--thorough"):
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 512}
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path / "bert")
        tiny = f"import benchmarks.{program} as it; it.bundled_model = lambda _: {str(tmp_path / 'bert')!r}; it.main()"
        command = ["-c", tiny]
    command += [*few, "--rounds", "2", "--output", str(output)]
    done = python(*command, env=os.environ | {"HF_EFFICIENT_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["results"]
    assert rows and all(row[measured] > 0 and row["heads"] and row["neurons"] for row in rows)


@pytest.mark.thorough
@pytest.mark.processes
def test_decoder_benchmark_runs_resumes_and_is_drawn(tmp_path):
    output, picture = tmp_path / "decoder.json", tmp_path / "decoder.png"
    command = [sys.executable, str(ROOT / "benchmarks/pruning_decoder.py"), "--threads", "1", "--calibration", "8"]
    command += ["--teacher-steps", "1", "--limit", "30", "--work", str(tmp_path / "work"), "--output", str(output)]

    def run(*arguments: str) -> dict:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {(cell["method"], cell["ratio"]): cell for cell in json.loads(output.read_text())["cells"]}

    first = run("--methods", "default", "--ratios", "0.3")
    assert set(first) == {("dense", 0.0), ("default", 0.3)}
    second = run("--methods", "default", "layers", "random", "--ratios", "0.3")
    assert set(second) == {*first, ("layers", 0.3), ("random", 0.3)}
    assert all(second[key] == cell for key, cell in first.items())  # kept, not measured again
    assert all(cell["removed"] >= 0.3 and cell["perplexity"] > 1 for key, cell in second.items() if key[1])
    _draw(output, picture)


@pytest.mark.thorough
@pytest.mark.processes
def test_distillation_after_pruning_runs_resumes_and_is_drawn(tmp_path):
    reviews, output = tmp_path / "reviews.tsv", tmp_path / "distilled.json"
    rows = [f"{i}\t{i % 2 * 2 - 1}\t{('bad', 'good')[i % 2]} film number {i}" for i in range(60)]
    reviews.write_text("\n".join(rows))
    command = [sys.executable, str(ROOT / "benchmarks/pruning_distillation.py"), "--threads", "1", "--rounds", "2"]
    command += ["--calibration", "16", "--limit", "12", "--steps", "1", "--teacher-steps", "1", "--seeds", "0"]
    command += ["--reviews", str(reviews), "--work", str(tmp_path / "work"), "--output", str(output), "--ratios"]

    def run(*ratios: str) -> dict:
        done = subprocess.run([*command, *ratios], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {cell["ratio"]: cell for cell in json.loads(output.read_text())["cells"]}

    first = run("0.5", "0.6")
    second = run("0.5", "0.8")
    assert set(second) == {0.5, 0.6, 0.8}
    assert all(cell["speedup"] > 1 and 0 <= cell["accuracy"] <= 1 for cell in second.values())
    assert second[0.5]["accuracy"] == first[0.5]["accuracy"]
    assert second[0.5]["seconds_of_training"] == first[0.5]["seconds_of_training"]  # kept, not made again
    _draw(output, tmp_path / "distilled.png")


def _draw(report: Path, picture: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks/plot_pruned.py"), str(report), str(picture)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
@pytest.mark.parametrize(
    "works",
    [["import hf_efficient"], pytest.param(["pruned forward", "import hf_efficient"], marks=pytest.mark.thorough)],
    ids=len,
)
def test_two_trees_are_compared_in_turns(works, tmp_path):
    output = tmp_path / "trees.json"
    command = [str(ROOT / "benchmarks/before_after.py"), str(ROOT), str(ROOT), "--only", *works, "--rounds", "2"]
    done = python(*command, "--output", str(output), env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    cells = json.loads(output.read_text())["cells"]
    assert set(cells) == set(works) and all(cell["before_s"] > 0 < cell["after_s"] for cell in cells.values())


def test_coverage_tries_a_type_and_the_page_says_what_it_can():
    row = try_type("opt")
    assert row["abilities"] == dict.fromkeys(("convert", "heads", "neurons", "layers"), True) and not row["why"]


def test_the_page_of_model_types_is_that_of_the_results(tmp_path):
    results = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
    write_page(results, tmp_path / "models.md")
    assert (tmp_path / "models.md").read_text() == (ROOT / "docs/models.md").read_text()
    counts = results["counts"]
    assert counts == summary(results["rows"]) and counts["silently wrong"] == 0
    said = f"{counts['convert']} model types convert ({counts['converted whole']} of them whole), "
    said += f"{counts['heads or neurons']} lose heads or neurons"
    assert f"{said}, {counts['layers']} lose layers" in (ROOT / "README.md").read_text()


@pytest.mark.thorough
@pytest.mark.processes
def test_merging_is_measured(tmp_path):
    """Of 16 patches one is merged in each layer; the original is as fast as itself."""
    options = ["--image", "64", "--batch", "1", "--rounds", "1", "--output", str(tmp_path / "merging.json")]
    done = python(str(ROOT / "benchmarks" / "merging.py"), *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "merging.json").read_text())["rows"]
    assert [row["method"] for row in rows][:3] == ["original", "merging 0", "merging 1"]
    assert rows[0]["forward_speedup"] == rows[0]["train_speedup"] == 1
    assert all(row["forward_ms"] > 0 and row["train_ms"] > 0 and row["train_bytes"] >= 0 for row in rows)
    assert rows[0]["macs"] > rows[2]["macs"] > 0.5 * rows[0]["macs"]


@pytest.mark.thorough
@pytest.mark.processes
def test_a_sentence_encoder_finds_its_articles_by_half_of_the_work(tmp_path):
    """all-mpnet-base-v2 without training, as `benchmarks/results` says; half an hour."""
    for part in PARTS:
        try:
            distribution(part)
        except PackageNotFoundError:
            pytest.skip(f"needs {part}")
    done = python(str(ROOT / "benchmarks/pruning_embeddings.py"), "--output", str(tmp_path / "embeddings.json"))
    assert done.returncode == 0, done.stderr
    committed = json.loads((ROOT / "benchmarks/results/pruning_embeddings_cpu.json").read_text())["rows"]
    for row, said in zip(json.loads((tmp_path / "embeddings.json").read_text())["rows"], committed, strict=True):
        assert row["parameters"] == pytest.approx(said["parameters"], rel=0.01)
        assert row["retrieval@1"] >= said["retrieval@1"] - 0.5, "two pairs of 400, for another machine's rounding"


@pytest.mark.thorough
@pytest.mark.processes
def test_long_contexts_run_and_resume(tmp_path):
    folder, output = tmp_path / "llama", tmp_path / "long.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=300)).save_pretrained(folder)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    lines = ["text,label", *(f"{'the cat sat on the mat ' * 8}{i},{'ab'[i % 2]}" for i in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    options = ["--data", str(tmp_path / "rows.csv"), "--window", "16", "--piece", "32", "--last", "16", "--steps", "2"]
    options += ["--transfer-steps", "2", "--transfer-length", "32", "--lengths", "64", "128", "--output", str(output)]
    program = str(ROOT / "benchmarks/long_contexts.py")
    done = python(program, str(folder), *options, "--methods", "full", "streaming")
    assert done.returncode == 0, done.stderr
    first = json.loads(output.read_text())["cells"]
    assert python(program, str(folder), *options).returncode == 0
    cells = json.loads(output.read_text())["cells"]
    assert cells[: len(first)] == first  # kept, not measured again
    assert len({cell["method"] for cell in cells}) == 7 and len(cells) == 7 * 2 * 2
    at = {(cell["method"], cell["document"], cell["length"]): cell for cell in cells}
    topic = cells[0]["document"]
    assert at["full", topic, 128]["cache_bytes"] > 1.5 * at["full", topic, 64]["cache_bytes"]
    assert at["streaming", topic, 128]["cache_bytes"] == at["streaming", topic, 64]["cache_bytes"]
    assert at["transferred", topic, 128]["loss"] != at["local_linear", topic, 128]["loss"]
