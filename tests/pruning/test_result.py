"""What comes out: a smaller Hugging Face model that saves, loads in a fresh process and generates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_efficient import AttentionConfig, convert_attention, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.families import FAMILIES
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.costs import unit_cost
from tests.families import CASES, PAD, real_logits
from tests.helpers import selected
from tests.processes import python

from .forms import FORMS, GENERATING, form_batches, form_inputs, make_form
from .tiny import HEADS, HIDDEN, WIDTH, batches, config, make, sizes

ROOT = Path(__file__).parents[2]
KINDS = {
    "neurons-uniform": config(ratio=0.2, granularity="neuron", allocation="uniform"),
    "heads-uniform": config(ratio=0.15, granularity="head", allocation="uniform"),
    "layers": config(ratio=0.3, granularity="layer"),
    "global": config(ratio=0.5, importance="random"),
    "everything": config(ratio=0.5, granularity=("layer", "head", "neuron"), importance="random"),
}
JOBS = [(kind, form) for kind in KINDS for form in FORMS]
SOME = ("global", "layers")  # of the kinds, where all families are generated with
CONVERTED = [("converted", form) for form in FORMS]
# Without --thorough every form is saved with one kind, and every kind with several forms.
CHOSEN = {(kind, form) for i, form in enumerate(FORMS) for j, kind in enumerate([*KINDS, "converted"]) if i % 6 == j}
SAVED = selected([*JOBS, *CONVERTED], lambda *job: job in CHOSEN)


def portable(kind: str, form: str) -> bool:
    """Which results the stock class can hold: DINOv2 has no field for neurons, BERT none for fewer heads as wide."""
    if kind in ("neurons-uniform", "heads-uniform"):
        field = {"neurons-uniform": "neurons", "heads-uniform": "head_dim"}[kind]
        return all(getattr(stack, field) for stack in FAMILIES[FORMS[form][0]].stacks)
    return kind == "layers"


def pruned(kind: str, form: str):
    return prune(make_form(form), KINDS[kind], form_batches(form))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pytestconfig):
    """Every result saved, and a converted and pruned one, then all opened by one other process."""
    root, jobs = tmp_path_factory.mktemp("pruned"), []
    rows = [job for job in (*JOBS, *CONVERTED) if job in CHOSEN or pytestconfig.getoption("--thorough")]
    models = {(kind, form): pruned(kind, form) for kind, form in rows if kind != "converted"}
    for kind, form in (job for job in rows if job[0] == "converted"):
        converted = convert_attention(make_form(form), AttentionConfig("local", window=2))
        models[kind, form] = prune(converted, KINDS["global"], form_batches(form))
    for (kind, form), model in models.items():
        folder, inputs = root / f"{kind}-{form}", form_inputs(form)
        model.save_pretrained(folder)
        save_file({key: value.contiguous() for key, value in inputs.items()}, folder / "inputs.safetensors")
        with torch.no_grad():  # another kernel of SDPA computes gradients for T5's bias
            save_file({"logits": real_logits(model, inputs).contiguous()}, folder / "logits.safetensors")
        case = CASES[FORMS[form][0]]
        jobs.append({"name": folder.name, "folder": str(folder), "auto": case.auto, "stock": case.head.__name__})
    (root / "jobs.json").write_text(json.dumps(jobs))
    code = "import hf_efficient, sys; from tests.pruning.reload_driver import main; main(*sys.argv[1:])"
    done = python("-c", code, root / "jobs.json", root / "out.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads((root / "out.json").read_text()), models


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "form"), SAVED)
def test_a_fresh_process_computes_the_same(folders, kind, form):
    _, reports, models = folders
    report, model = reports[f"{kind}-{form}"], models[kind, form]
    assert report["equal"] is True
    assert report["missing"] == report["unexpected"] == report["mismatched"] == []
    assert report["class"] == type(model).__name__
    assert report["module"].startswith("transformers." if is_portable(model) else "hf_efficient.")


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "form"), SAVED)
def test_portable_results_open_with_the_stock_class_and_others_fail_loudly(folders, kind, form):
    root, reports, models = folders
    stock, stays_stock = reports[f"{kind}-{form}"]["stock"], is_portable(models[kind, form])
    assert stays_stock == portable(kind, form)
    settings = json.loads((root / f"{kind}-{form}" / "config.json").read_text())
    assert settings["model_type"].startswith("efficient_") != stays_stock
    assert (root / f"{kind}-{form}" / "modeling_hf_efficient.py").exists() != stays_stock
    assert (stock == "ok") == stays_stock, stock


@pytest.mark.parametrize(("kind", "form"), selected(JOBS, lambda *job: job in CHOSEN))
def test_parameters_fall_by_what_the_units_cost(kind, form):
    """For heads and neurons: exactly the parameters of the units that left; the table shapes follow."""
    dense, small = make_form(form), pruned(kind, form)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, small))
    assert after < before
    if kind in ("layers", "everything"):
        return
    gone = {
        group: group.units - other.units
        for group, other in zip(Anatomy.of(dense).groups, Anatomy.of(small).groups, strict=True)
    }
    assert before - after == sum(n * unit_cost(Anatomy.of(dense), group, "parameters", 1) for group, n in gone.items())


@pytest.mark.processes
@pytest.mark.parametrize(("form",), selected([(form,) for form in FORMS], lambda form: ("global", form) in CHOSEN))
def test_bytes_on_disk_fall(folders, form):
    root, _, models = folders
    size = (root / f"global-{form}" / "model.safetensors").stat().st_size
    stored = {id(p): p.numel() for p in models["global", form].parameters()}
    assert 0 <= size - 4 * sum(stored.values()) < 150 * len(stored)  # the rest is the header
    dense = {id(p): p.numel() for p in make_form(form).parameters()}
    assert size < 4 * sum(dense.values())


def test_state_dict_shapes_of_a_layer():
    dense = make("llama")
    plan = PruningPlan(units={"decoder.1.heads": (1,), "decoder.1.neurons": tuple(range(16))})
    shapes = {
        k.rpartition("layers.1.")[2]: tuple(v.shape)
        for k, v in apply_plan(Anatomy.of(dense), plan).state_dict().items()
    }
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
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 4)
    small = pruned("heads-uniform", "t5")
    assert (small.config.d_kv, type(small).__name__) == (4, "T5ForConditionalGeneration")
    assert small.config.num_heads < 4
    small = pruned("neurons-uniform", "gpt2")
    assert make_form("gpt2").config.n_inner is None and 0 < small.config.n_inner < 64
    assert pruned("layers", "gpt2").config.n_inner is None


@pytest.mark.cover
@pytest.mark.parametrize(
    ("form", "kind"),
    selected([(form, kind) for form in GENERATING for kind in KINDS], lambda form, kind: kind in SOME),
)
def test_generation_with_every_cache(form, kind):
    """Cached decoding gives the tokens of decoding without a cache."""
    small = pruned(kind, form)
    side = None if form == "whisper" else "left"
    inputs = {key: value for key, value in form_inputs(form, side=side).items() if key != "decoder_input_ids"}
    # Whisper's `generate` cuts padding off the end, and fails when nothing is left.
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [PAD]}
    plain = small.generate(**inputs, **options, use_cache=False)
    caches = ["dynamic"] if "encoder_hidden_states" in inputs else ["dynamic", "static"]
    for cache in caches:
        assert torch.equal(small.generate(**inputs, **options, cache_implementation=cache), plain), cache
