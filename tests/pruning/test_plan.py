"""A plan says beforehand what pruning will give, survives JSON, can be edited, and gives the same model."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_efficient import CheckpointError, ConfigError, PruningConfig, PruningPlan, plan, prune
from hf_efficient.models.building import is_portable
from hf_efficient.pruning.costs import total_cost
from hf_efficient.pruning.forecast import plan_table
from tests.families import CASES, make_config, make_inputs, make_model

from .tiny import batches, make

SETTINGS = {"ratio": 0.4, "round_to": 4}


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return type(first) is type(second) and all(k == m and torch.equal(v, w) for (k, v), (m, w) in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 3},
        {"reconstruct": False},
        {"granularity": ("layer", "head", "neuron")},
        {"allocation": "uniform"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["bert", "t5", "llama"])
def test_a_plan_gives_what_prune_gives(case, changes, tmp_path):
    dense, data = make(case), batches(case) * 4
    config = PruningConfig(**SETTINGS | changes)
    made = plan(dense, config, data)
    made.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == made
    small = prune(dense, plan=loaded, calibration=data)
    assert same(small, prune(dense, config, data))
    assert not same(small, prune(dense, PruningConfig(**SETTINGS | changes | {"importance": "random"}), data))
    told = made.forecast
    assert told.parameters == small.num_parameters() and told.parameters_before == dense.num_parameters()
    length = told.length
    assert told.removed_macs == pytest.approx(
        1 - total_cost(small, "macs", length) / total_cost(dense, "macs", length)
    )
    assert told.loads_with == ("portable" if is_portable(small) else "plugin")


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_a_forecast(name):
    """Sizes from the config alone, and those of a plan with weights."""
    dense, inputs = make_model(name), [make_inputs(name) for _ in range(6)]
    config = PruningConfig(**SETTINGS, sequence_length=12)
    made = plan(dense, config, inputs)
    small = prune(dense, plan=made, calibration=inputs)
    assert made.forecast.parameters == small.num_parameters()
    assert 0 < made.forecast.macs < made.forecast.macs_before
    sizes = plan(type(dense).config_class(**make_config(name).to_dict()), config)
    assert not sizes.chosen and sizes.forecast.removed_macs >= 0.4
    with pytest.raises(ConfigError, match="sizes only"):
        prune(dense, plan=sizes)
    text = plan_table(made)
    assert "parameters" in text and len(text.splitlines()) > len(made.forecast.layers)


def test_70_billion_parameters_need_no_memory():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    made = plan(config, PruningConfig(ratio=0.4, sequence_length=2048, granularity=("layer", "head", "neuron")))
    told = made.forecast
    assert told.parameters_before == 70_553_706_496  # that of Llama-3.1-70B
    assert told.weight_bytes_before == 2 * told.parameters_before
    assert told.cache_bytes_before == 80 * 2 * 8 * 128 * 2 * 2048
    assert told.loads_with == "portable"
    assert told.removed_macs == pytest.approx(0.4, abs=0.02)


def test_an_edited_plan_is_what_counts(tmp_path):
    dense, data = make("bert"), batches("bert") * 4
    plan(dense, PruningConfig(**SETTINGS), data).save(tmp_path / "plan.json")
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["units"]["encoder.0.neurons"] = [0, 5, 7]
    edited["layers"] = {"encoder": [0, 2]}
    small = prune(dense, plan=PruningPlan.from_dict(edited))
    assert small.config.num_hidden_layers == 2
    assert torch.equal(
        small.bert.encoder.layer[0].intermediate.dense.weight,
        dense.bert.encoder.layer[0].intermediate.dense.weight[[0, 5, 7]],
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"units": {"encoder.0.neurons": [1, 1]}}, "encoder.0.neurons; give at least one"),
        ({"units": {"encoder.0.neurons": [3, 2]}}, "ascending"),
        ({"units": {"encoder.0.neurons": []}}, "at least one"),
        ({"units": {"encoder.0.neurons": [48]}}, "from 0 to 47"),
        ({"units": {"encoder.0.neurons": [-1, 2]}}, "from 0 to 47"),
        ({"units": {"encoder.0.neuron": [1]}}, "Did you mean 'encoder.0.neurons'"),
        ({"units": {"encoder.9.heads": [1]}}, "entry of the plan's units"),
        ({"layers": {"decoder": [0]}}, "entry of the plan's layers 'decoder'"),
        ({"layers": {"encoder": [0, 3]}}, "from 0 to 2"),
        ({}, "removes nothing"),
    ],
)
def test_plans_that_do_not_fit(change, words):
    data = PruningPlan().to_dict() | change
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        prune(make("bert"), plan=PruningPlan.from_dict(data))


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"format": "something"},
        PruningPlan().to_dict() | {"version": 9},
        PruningPlan().to_dict() | {"extra": 1},
        PruningPlan().to_dict() | {"units": {"a": "b"}},
        PruningPlan().to_dict() | {"units": {"a": [1.5]}},
        PruningPlan().to_dict() | {"layers": [1]},
        PruningPlan().to_dict() | {"config": {"ratio": 2}},
        PruningPlan().to_dict() | {"config": {"ratios": 0.5}},
        PruningPlan().to_dict() | {"forecast": {"macs": 1}},
    ],
    ids=str,
)
def test_what_is_no_plan(data):
    with pytest.raises(ConfigError):
        PruningPlan.from_dict(data)


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(CheckpointError, match="is no file"):
        PruningPlan.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        PruningPlan.load(tmp_path / "broken.json")


def test_a_plan_or_a_config():
    for arguments in ({}, {"config": PruningConfig(), "plan": PruningPlan()}):
        with pytest.raises(ConfigError, match="a config or a plan"):
            prune(make("bert"), **arguments)


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 99), max_size=5).map(tuple), max_size=4))
def test_json_there_and_back(units):
    made = PruningPlan(units=units, config=PruningConfig(ratio=0.3))
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
