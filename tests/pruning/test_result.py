"""What comes out: a smaller Hugging Face model that saves, loads in a fresh process and generates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_efficient import AttentionConfig, convert_attention, prune
from hf_efficient.models.building import is_portable
from hf_efficient.pruning.groups import find_groups, unit_cost
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.surgery import apply_plan

from .tiny import CASES, HEADS, HIDDEN, WIDTH, batch, batches, config, logits, make, sizes

ROOT = Path(__file__).parents[2]
AUTO = {
    "bert": ("AutoModelForSequenceClassification", "BertForSequenceClassification"),
    "vit": ("AutoModelForImageClassification", "ViTForImageClassification"),
    "llama": ("AutoModelForCausalLM", "LlamaForCausalLM"),
    "t5": ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration"),
    "gated-t5": ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration"),
}
KINDS = {
    "neurons-uniform": config(ratio=0.2, granularity="neuron", allocation="uniform"),
    "heads-uniform": config(ratio=0.15, granularity="head", allocation="uniform"),
    "layers": config(ratio=0.3, granularity="layer"),
    "global": config(ratio=0.5, importance="random"),
    "everything": config(ratio=0.5, granularity=("layer", "head", "neuron"), importance="random"),
}
# Which results the stock class can hold: BERT has no config field for fewer heads of the same width.
PORTABLE = {
    (kind, case): kind in ("neurons-uniform", "layers") or (kind == "heads-uniform" and case != "bert")
    for kind in ("neurons-uniform", "heads-uniform", "layers")
    for case in CASES
}
JOBS = [(kind, case) for kind in KINDS for case in CASES]


def pruned(kind: str, case: str):
    return prune(make(case), KINDS[kind], batches(case))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every result saved, and a converted and pruned one, then all opened by one fresh process."""
    root, jobs = tmp_path_factory.mktemp("pruned"), []
    converted = {case: convert_attention(make(case), AttentionConfig("local", window=2)) for case in CASES}
    models = {(kind, case): pruned(kind, case) for kind, case in JOBS}
    models |= {("converted", c): prune(m, KINDS["global"], batches(c)) for c, m in converted.items()}
    for (kind, case), model in models.items():
        folder = root / f"{kind}-{case}"
        model.save_pretrained(folder)
        save_file({key: value.contiguous() for key, value in batch(case).items()}, folder / "inputs.safetensors")
        save_file({"logits": logits(model, batch(case)).contiguous()}, folder / "logits.safetensors")
        auto, stock = AUTO[case]
        jobs.append({"name": f"{kind}-{case}", "folder": str(folder), "auto": auto, "stock": stock})
    (root / "jobs.json").write_text(json.dumps(jobs))
    code = "import hf_efficient, sys; from tests.pruning.reload_driver import main; main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(root / "jobs.json"), str(root / "out.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads((root / "out.json").read_text()), models


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "case"), [*JOBS, *(("converted", case) for case in CASES)])
def test_a_fresh_process_computes_the_same(folders, kind, case):
    _, reports, models = folders
    report, model = reports[f"{kind}-{case}"], models[kind, case]
    assert report["equal"] is True
    assert report["missing"] == report["unexpected"] == report["mismatched"] == []
    assert report["class"] == type(model).__name__
    assert report["module"].startswith("transformers." if is_portable(model) else "hf_efficient.")


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "case"), [*JOBS, *(("converted", case) for case in CASES)])
def test_portable_results_open_with_the_stock_class_and_others_fail_loudly(folders, kind, case):
    root, reports, models = folders
    stock, portable = reports[f"{kind}-{case}"]["stock"], is_portable(models[kind, case])
    assert portable == PORTABLE.get((kind, case), False)
    settings = json.loads((root / f"{kind}-{case}" / "config.json").read_text())
    assert settings["model_type"].startswith("efficient_") != portable
    assert (root / f"{kind}-{case}" / "modeling_hf_efficient.py").exists() != portable
    assert (stock == "ok") == portable, stock


@pytest.mark.parametrize(("kind", "case"), JOBS)
def test_parameters_fall_by_what_the_units_cost(kind, case):
    """For heads and neurons: exactly the parameters of the units that left; the table shapes follow."""
    dense, small = make(case), pruned(kind, case)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, small))
    assert after < before
    if kind in ("layers", "everything"):
        return
    gone = {
        group: group.units - other.units for group, other in zip(find_groups(dense), find_groups(small), strict=True)
    }
    assert before - after == sum(n * unit_cost(dense, group, "parameters", 1) for group, n in gone.items())


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_bytes_on_disk_fall(folders, case):
    root, _, models = folders
    size = (root / f"global-{case}" / "model.safetensors").stat().st_size
    stored = {id(p): p.numel() for p in models["global", case].parameters()}
    assert 0 <= size - 4 * sum(stored.values()) < 12000  # the rest is the header
    dense = {id(p): p.numel() for p in make(case).parameters()}
    assert size < 4 * sum(dense.values())


def test_state_dict_shapes_of_a_layer():
    dense = make("llama")
    groups = {(g.kind, g.layers[0]): g for g in find_groups(dense)}
    plan = PruningPlan(units={groups["heads", 1]: (1,), groups["neurons", 1]: tuple(range(16))})
    shapes = {k.rpartition("layers.1.")[2]: tuple(v.shape) for k, v in apply_plan(dense, plan).state_dict().items()}
    assert shapes["self_attn.q_proj.weight"] == (2 * WIDTH, HIDDEN)
    assert shapes["self_attn.k_proj.weight"] == shapes["self_attn.v_proj.weight"] == (WIDTH, HIDDEN)
    assert shapes["self_attn.o_proj.weight"] == (HIDDEN, 2 * WIDTH)
    assert shapes["mlp.gate_proj.weight"] == shapes["mlp.up_proj.weight"] == (16, HIDDEN)
    assert shapes["mlp.down_proj.weight"] == (HIDDEN, 16)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (HEADS * WIDTH, HIDDEN)


def test_grouped_queries_leave_with_their_key_and_value():
    dense = make("llama")
    small = prune(dense, config(ratio=0.1, granularity="head", importance="random"), batches("llama"))
    queries = small.config.efficient["stacks"]["decoder"]
    assert [heads // kv for heads, kv in zip(queries["heads"], queries["kv_heads"], strict=True)] == [2, 2, 2]
    assert {units for (_, kind, _), units in sizes(small).items() if kind == "heads"} == {1, 2}


def test_uniform_fields_of_the_stock_config():
    small = pruned("heads-uniform", "llama")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, WIDTH)
    small = pruned("heads-uniform", "t5")
    assert (small.config.d_kv, type(small).__name__) == (WIDTH, "T5ForConditionalGeneration")
    assert small.config.num_heads < HEADS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama", "t5", "gated-t5"])
def test_generation_with_every_cache(case, kind):
    """Cached decoding gives the tokens of decoding without a cache."""
    small = pruned(kind, case)
    inputs = {key: value for key, value in batch(case).items() if key != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = small.generate(**inputs, **options, use_cache=False)
    dynamic = small.generate(**inputs, **options)
    static = small.generate(**inputs, **options, cache_implementation="static")
    assert plain.shape[1] > 1
    assert torch.equal(dynamic, plain)
    assert torch.equal(static, plain)
