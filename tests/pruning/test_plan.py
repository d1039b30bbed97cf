"""A plan says beforehand what pruning will give, survives JSON, can be edited, and gives the same model."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, LlamaConfig

from hf_efficient import (
    AttentionConfig,
    CheckpointError,
    ConfigError,
    PruningConfig,
    PruningPlan,
    convert_attention,
    plan,
    prune,
)
from hf_efficient.models.derive.tiny import tiny_config, tiny_model
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.pruning.price.forecast import plan_table
from tests.families import BUILDS, CASES, make_config, make_inputs, make_model
from tests.helpers import selected

from .tiny import batches, make

SETTINGS = {"ratio": 0.4, "round_to": 4}


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return type(first) is type(second) and all(k == m and torch.equal(v, w) for (k, v), (m, w) in pairs)


@pytest.mark.cover
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
@pytest.mark.parametrize("case", ["bert", "llama", "t5"])
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


@pytest.mark.parametrize(("name",), selected([(name,) for name in CASES], lambda name: name in BUILDS))
def test_every_family_has_a_forecast(name):
    """That of a plan with weights is what pruning gives."""
    dense, inputs = make_model(name), [make_inputs(name) for _ in range(6)]
    made = plan(dense, PruningConfig(**SETTINGS, sequence_length=12), inputs)
    small = prune(dense, plan=made, calibration=inputs)
    assert made.forecast.parameters == small.num_parameters()
    assert 0 < made.forecast.macs < made.forecast.macs_before
    text = plan_table(made)
    assert "parameters" in text and len(text.splitlines()) > len(made.forecast.layers)


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_a_forecast_of_sizes(name):
    """From the config alone."""
    dense = make_model(name)
    config = PruningConfig(**SETTINGS, sequence_length=12)
    sizes = plan(type(dense).config_class(**make_config(name).to_dict()), config)
    assert not sizes.chosen and sizes.forecast.removed_macs >= 0.4
    with pytest.raises(ConfigError, match="sizes only"):
        prune(dense, plan=sizes)


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
    asked = PruningConfig(0.4, sequence_length=2048, granularity=("layer", "head", "neuron"), allocation="uniform")
    told = plan(config, asked).forecast
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
    with pytest.raises(ConfigError, match=r"names units of encoder\.1\.\w+, but its `layers` do not keep layer 1"):
        prune(dense, plan=PruningPlan.from_dict(edited))
    edited["units"] = {name: kept for name, kept in edited["units"].items() if not name.startswith("encoder.1.")}
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
        (
            {"layers": {"encoder": [0, 1]}, "model": "roberta"},
            "type 'roberta', this one is 'bert'",
        ),
        ({"layers": {"encoder": [0, 1]}, "model": "efficient_vit"}, "type 'efficient_vit'"),
        ({"layers": {"encoder": [0, 1]}, "units": {"encoder.2.heads": [1]}}, "Delete encoder.2.heads from `units`"),
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
        PruningPlan().to_dict() | {"units": {"encoder.0.heads": [10**400]}},
        PruningPlan().to_dict() | {"units": {"encoder.0.heads": [[[0]]]}},
        PruningPlan().to_dict() | {"layers": {"encoder": [True]}},
        PruningPlan().to_dict() | {"layers": {f"stack{i}": [0] for i in range(10**4)}},
        PruningPlan().to_dict() | {"layers": {"encoder": range(2)}},
        PruningPlan().to_dict() | {"config": {"ratio": 10**400}},
        PruningPlan().to_dict() | {"config": {"granularity": [[]]}},
        PruningPlan().to_dict() | {"config": [0.5]},
        PruningPlan().to_dict() | {"model": "x" * 10**5, "config": {"seed": 10**400}},
    ],
    ids=lambda data: str(data)[:40] if len(str(data)) < 10**4 else "large",
)
def test_what_is_no_plan(data):
    with pytest.raises(ConfigError) as told:
        PruningPlan.from_dict(data)
    assert len(str(told.value)) < 1000


def test_a_long_list_is_checked_before_it_is_used():
    wrong = PruningPlan(layers={"encoder": tuple(range(10**5))})
    with pytest.raises(ConfigError, match="from 0 to 2") as told:
        prune(make("bert"), plan=wrong)
    assert len(str(told.value)) < 1000


@pytest.fixture(scope="module")
def one_plan():
    return plan(make("bert"), PruningConfig(ratio=0.4, importance="magnitude", round_to=4)).to_dict()


def test_a_forecast_of_too_many_layers(one_plan):
    assert PruningPlan.from_dict(one_plan).forecast.layers
    many = one_plan["forecast"]["layers"] * 10**4
    with pytest.raises(ConfigError, match="at most"):
        PruningPlan.from_dict(one_plan | {"forecast": one_plan["forecast"] | {"layers": many}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"macs": 10**400}, "macs"),
        ({"macs": 10**30}, "`macs` of the plan's forecast is 1000"),
        ({"removed_macs": float("nan")}, "`removed_macs`"),
        ({"loads_with": "pickle"}, "loads_with"),
        ({"layers": None}, "layers"),
        ({"layers": [{"stack": "encoder"}]}, "LayerForecast"),
        ({"layers": [1]}, "LayerForecast"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_forecast_that_cannot_be(change, words, one_plan):
    data = one_plan
    with pytest.raises(ConfigError, match=words):
        PruningPlan.from_dict(data | {"forecast": data["forecast"] | change})


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_plain_values_there_and_back(case):
    kinds = {"granularity": ("layer", "neuron"), "importance": "random", "layer_importance": "random"}
    made = plan(make(case), PruningConfig(ratio=0.2, round_to=4, sequence_length=9, **kinds))
    assert made.forecast.layers and PruningPlan.from_dict(made.to_dict()) == made
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()  # lists, no tuples


def test_a_plan_of_a_stock_model_is_one_of_its_converted_form():
    dense = make("bert")
    made = plan(dense, PruningConfig(ratio=0.4, importance="magnitude", round_to=4))
    local = convert_attention(dense, AttentionConfig(kind="local", window=4))
    assert prune(local, plan=made).num_parameters() == prune(dense, plan=made).num_parameters()


@pytest.mark.parametrize("granularity", [("head", "neuron"), ("layer", "neuron"), ("layer",), ("neuron",)])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_sizes_alone_say_how_the_result_will_load(granularity, allocation):
    """As the plan with weights does, for scores that differ between layers."""
    dense, config = make("llama", 4), PruningConfig(0.25, granularity=granularity, allocation=allocation, round_to=4)
    told = plan(dense.config, config).forecast
    assert told.loads_with == plan(dense, config, batches("llama") * 2).forecast.loads_with
    assert told.loads_with == ("portable" if allocation == "uniform" or granularity == ("layer",) else "plugin")


def test_zeros_change_no_size_and_are_in_no_plan():
    dense = make("bert")
    sizes = plan(dense.config, PruningConfig(ratio=0.5, granularity="weight"))
    assert not sizes.layers and not sizes.units and sizes.forecast.parameters == sizes.forecast.parameters_before
    asked = PruningConfig(ratio=0.36, granularity=("neuron", "weight"), importance="taylor", round_to=4)
    both = plan(dense.config, asked)
    assert 0.2 <= both.forecast.removed_macs < 0.3  # 0.8 * 0.8 = 0.64
    with pytest.raises(ConfigError, match="single weights become zeros"):
        plan(dense, PruningConfig(ratio=0.5, granularity="weight", importance="magnitude"))
    with pytest.raises(ConfigError, match="mask_structure='2:5'"):
        plan(dense.config, PruningConfig(granularity="weight", mask_structure="2:5"))


def test_a_uniform_ratio_out_of_reach_is_refused_before_scores_are_taken():
    """One layer has 2 neurons already, so that all layers cannot have the same multiple of 4."""
    dense = prune(make("bert"), plan=PruningPlan(units={"encoder.0.neurons": (0, 1)}))
    dense.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    asked = {"ratio": 0.2, "granularity": "neuron", "round_to": 4}
    for model in (dense, dense.config):
        with pytest.raises(ConfigError, match=r"ratio=0\.2 cannot be reached with allocation='uniform'"):
            plan(model, PruningConfig(**asked, allocation="uniform"), batches("bert"))
    for model in (dense, dense.config):
        made = plan(model, PruningConfig(**asked, importance="magnitude"))
        assert made.forecast.removed_macs >= 0.2 and made.forecast.loads_with == "plugin"


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        PruningPlan.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="as JSON"):
        PruningPlan.load(tmp_path / "broken.json")


def test_a_plan_or_a_config():
    for arguments in ({}, {"config": PruningConfig(), "plan": PruningPlan()}):
        with pytest.raises(ConfigError, match="a config or a plan"):
            prune(make("bert"), **arguments)


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 99), max_size=5).map(tuple), max_size=4))
def test_json_there_and_back(units):
    made = PruningPlan(units=units, config=PruningConfig(ratio=0.3))
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("model_type", ["gpt_neo", "esm"])
def test_of_a_model_that_reads_values_the_layers_are_counted(model_type):
    model = tiny_model(tiny_config(CONFIG_MAPPING[model_type]()))
    config = PruningConfig(
        0.3, importance="magnitude", granularity=("neuron",), sequence_length=8, round_to=1, reconstruct=False
    )
    made = plan(model, config)
    assert made.forecast.macs_before == sum(row.macs_before for row in made.forecast.layers) > made.forecast.macs > 0
    assert "MACs of the layers, 8 tokens" in plan_table(made)
