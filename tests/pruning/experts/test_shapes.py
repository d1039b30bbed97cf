"""Experts leave mixtures of every shape: what is left gives what the whole gives where these are never chosen, is a
stock model, has the sizes that the plan says, and generates."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_efficient import ConfigError, PruningConfig, PruningPlan, UnsupportedModelError, plan, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.family import Family
from hf_efficient.models.mixtures import without_experts
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.price.forecast import plan_table
from tests.helpers import selected

from .tiny import ALL, EXPERTS, SHAPES, SOME, batches, logits, make

ROWS = selected([(shape,) for shape in ALL], SOME.__contains__)
DECODERS = [(shape,) for shape in SHAPES if "," not in shape]
ONE_OF_FOUR = PruningConfig(ratio=0.1, granularity="expert", expert_importance="random", reconstruct=False)
ALONE = """
import json, sys
import torch, transformers
from safetensors.torch import load_file

assert "hf_efficient" not in sys.modules
for folder in sys.argv[1:]:
    config = json.load(open(f"{folder}/config.json"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    given = load_file(f"{folder}/given.safetensors")
    expected = given.pop("logits")
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, expected, atol=1e-5), folder
assert "hf_efficient" not in sys.modules
"""


def experts_of(model) -> list[int]:
    return [mixture.experts for mixture in Anatomy.of(model).mixtures]


@pytest.mark.parametrize(("shape",), ROWS)
def test_a_pruned_mixture_gives_what_the_whole_gives_without_these_experts(shape):
    dense = make(shape)
    [batch] = batches(dense, 1)
    made = plan(dense, ONE_OF_FOUR, [batch])
    small = prune(dense, plan=made)
    anatomy, counts = Anatomy.of(dense), set(experts_of(small))
    assert len(counts) == 1 and counts.pop() < EXPERTS
    gone = {one: sorted({*range(EXPERTS)} - {*made.units[one.name]}) for one in anatomy.mixtures}
    assert len({tuple(e) for e in gone.values()}) > 1 or len(gone) == 1, "every layer loses experts of its own"
    with without_experts(dense, gone):
        expected = logits(dense, batch)
    assert torch.allclose(logits(small, batch), expected, atol=1e-4)
    assert not torch.allclose(logits(dense, batch), expected, atol=1e-2), "and afterwards all are there again"


@pytest.mark.parametrize(("shape",), ROWS)
def test_the_result_is_a_stock_model_with_the_sizes_of_its_plan(shape):
    dense = make(shape)
    data = batches(dense)
    made = plan(dense, ONE_OF_FOUR, data)
    small = prune(dense, plan=made, calibration=data)
    told = made.forecast
    assert is_portable(small) and type(small) is type(dense) and told.loads_with == "portable"
    assert (told.parameters, told.parameters_before) == (small.num_parameters(), dense.num_parameters())
    assert told.weight_bytes == 4 * small.num_parameters() < told.weight_bytes_before
    assert told.macs == pytest.approx(told.macs_before, rel=0.02), "as many experts work for a token"
    assert told.removed_parameters >= ONE_OF_FOUR.ratio
    rows = [row for row in told.layers if row.experts_before]
    assert [row.experts for row in rows] == experts_of(small) and "experts" in plan_table(made)
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.cold
def test_a_saved_mixture_loads_without_the_package(tmp_path, pytestconfig):
    folders = []
    for number, shape in enumerate(ALL if pytestconfig.getoption("--thorough") else SOME[1:3]):
        dense = make(shape)
        [batch] = batches(dense, 1)
        small = prune(dense, ONE_OF_FOUR, [batch])
        folders.append(tmp_path / str(number))
        small.save_pretrained(folders[-1])
        save_file(batch | {"logits": logits(small, batch)}, folders[-1] / "given.safetensors")
        assert "efficient" not in (folders[-1] / "config.json").read_text()
    (tmp_path / "alone.py").write_text(ALONE)
    words = [sys.executable, str(tmp_path / "alone.py"), *map(str, folders)]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("shape",), selected(DECODERS, ("deepseek_v3", "gpt_oss").__contains__))
def test_a_pruned_mixture_generates(shape):
    small = prune(make(shape), ONE_OF_FOUR)
    ids = torch.tensor([[5, 9, 11, 7], [8, 3, 17, 4]])
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
    text = small.generate(ids, **options)
    with torch.no_grad():  # one token after another, without a cache
        expected = ids
        for _ in range(6):
            scores = small(input_ids=expected, use_cache=False).logits[:, -1]
            scores[:, small.config.eos_token_id] = -torch.inf
            expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, expected)
    assert torch.equal(small.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize(("shape",), selected(DECODERS, ("deepseek_v3", "mixtral").__contains__))
def test_experts_and_their_neurons_leave_together(shape):
    """Half of a mixture by both, uniformly: still a stock model, and that of the plan."""
    dense = make(shape)
    data = batches(dense)
    changes = {"importance": "magnitude", "expert_importance": "random", "allocation": "uniform"}
    config = PruningConfig(ratio=0.3, granularity=("expert", "neuron"), reconstruct=False, **changes)
    made = plan(dense, config, data)
    small = prune(dense, plan=made, calibration=data)  # which compares with the whole, silenced
    widths = [{g.units for g in Anatomy.of(one).groups if g.has_experts} for one in (dense, small)]
    assert len(widths[1]) == 1 and max(widths[1]) < max(widths[0])
    assert max(experts_of(small)) < EXPERTS and made.forecast.removed_parameters >= config.ratio
    assert made.forecast.parameters == small.num_parameters()
    assert made.forecast.loads_with == ("portable" if is_portable(small) else "plugin")


def test_layers_and_experts_leave_together():
    dense = make("mixtral")
    data = batches(dense)
    config = PruningConfig(ratio=0.6, granularity=("layer", "expert"), layer_importance="block_influence")
    small = prune(dense, config, data)
    assert small.config.num_hidden_layers < 3 and small.config.num_local_experts < EXPERTS
    assert is_portable(small) and logits(small, data[0]).isfinite().all()


def test_sizes_are_known_without_weights():
    config = make("deepseek_v3, groups").config
    made = plan(config, PruningConfig(ratio=0.2, granularity="expert"))
    assert not made.chosen and made.forecast.removed_parameters >= 0.2
    assert {len(kept) for kept in made.units.values()} == {row.experts for row in made.forecast.layers[1:]}


def test_every_group_of_a_router_keeps_as_many():
    dense = make("deepseek_v3, groups")
    small = prune(dense, PruningConfig(ratio=0.25, granularity="expert", expert_importance="random"))
    assert small.config.n_routed_experts == 4 and small.config.n_group == 2
    with pytest.raises(ConfigError, match="At most 0"):  # two of each group stay
        prune(dense, PruningConfig(ratio=0.5, granularity="expert", expert_importance="random"))
    units = {one.name: (0, 1, 2, 3) for one in Anatomy.of(dense).mixtures}
    with pytest.raises(ConfigError, match=r"keeps \[4, 0\] experts of the 2 groups"):
        prune(dense, plan=PruningPlan(units=units))


def test_a_plan_that_no_config_can_say_is_refused():
    with pytest.raises(ConfigError, match="Keep as many everywhere"):
        prune(make("mixtral"), plan=PruningPlan(units={"decoder.0.experts": (0, 1, 2)}))


def test_fewer_experts_work_for_a_token_only_where_fewer_are_left():
    dense = make("mixtral")
    units = {f"decoder.{layer}.experts": (layer,) for layer in range(3)}
    made = PruningPlan(units=units)
    small = prune(dense, plan=made)
    assert (small.config.num_local_experts, small.config.num_experts_per_tok) == (1, 1)
    [batch] = batches(dense, 1)
    with without_experts(dense, {one: [e for e in range(8) if e != one.layer] for one in Anatomy.of(dense).mixtures}):
        expected = logits(dense, batch)
    assert torch.allclose(logits(small, batch), expected, atol=1e-4)
    most = plan(dense, PruningConfig(ratio=0.7, granularity="expert", expert_importance="random"))
    assert "experts that work for a token" in plan_table(most)
    two = prune(dense, plan=PruningPlan(units=dict.fromkeys(units, (0, 5))))
    assert two.config.num_experts_per_tok == 2


def test_metrics_that_do_not_fall_are_refused():
    assert PruningConfig(granularity="expert").metric == "parameters" and PruningConfig().metric == "macs"
    for metric in ("macs", "latency"):
        with pytest.raises(ConfigError, match="does not fall when experts leave"):
            PruningConfig(granularity=("expert", "neuron"), metric=metric)


def test_a_model_without_experts_says_so():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    with pytest.raises(UnsupportedModelError, match="no mixture of experts"):
        prune(llama, PruningConfig(granularity="expert", expert_importance="random"))


@pytest.mark.parametrize("changes", [{"row_dims": [3, 0, 0]}, {"row_dims": [0]}, {"module": "elsewhere"}])
def test_what_a_config_says_of_experts_is_checked(changes):
    entry = Anatomy.of(make("mixtral")).family.to_dict()
    assert Family.from_dict(entry).to_dict() == entry
    entry["stacks"][0]["experts"] |= changes
    with pytest.raises(ConfigError, match="each of `rows`"):
        Family.from_dict(entry)


def test_an_older_plan_still_loads():
    """Of before experts could leave: it says nothing of them."""
    made = plan(make("mixtral"), PruningConfig(ratio=0.2, granularity="neuron", importance="magnitude"))
    data = made.to_dict()
    del data["forecast"]["active_experts"]
    del data["forecast"]["active_experts_before"]
    data["forecast"]["layers"] = [
        {name: value for name, value in vars(row).items() if "experts" not in name} for row in made.forecast.layers
    ]
    assert PruningPlan.from_dict(data).units == made.units
