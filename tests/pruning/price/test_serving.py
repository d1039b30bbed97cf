"""A plan says whether the sizes that are left fit groups of 4-bit weights and vLLM, by trying what it says."""

import json

import pytest
import torch
from transformers import LlamaConfig

from hf_efficient import AttentionConfig, ConfigError, PruningConfig, PruningPlan, convert_attention, plan, prune
from hf_efficient import quantize as quantized
from hf_efficient.pruning.price.forecast import plan_table
from hf_efficient.pruning.price.serving import serving_lines
from tests.families import make_model
from tests.gguf_files import make_llama

MAGNITUDE = PruningConfig(0.3, importance="magnitude", sequence_length=8)


def told(config=None, **changes):
    """Of a Llama with 8 heads of 32 in 4 groups, and 512 neurons."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}
    llama = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, architectures=["LlamaForCausalLM"])
    options = {"ratio": 0.3, "allocation": "uniform", "sequence_length": 16} | changes
    return plan(config or llama, PruningConfig(**options))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"granularity": ("neuron",), "round_to": 8},
            "groups of 32 or more do not fit; round_to=128 makes those of 128",
        ),
        ({"granularity": ("neuron",), "round_to": 24}, "round_to=384 makes those of 128 fit"),
        (
            {"granularity": ("neuron",), "round_to": 32, "ratio": 0.2},
            "groups of 32 fit; round_to=128 makes those of 128",
        ),
        ({"granularity": ("neuron",), "round_to": 128}, "groups of 128 fit."),
        ({"granularity": ("head",), "ratio": 0.2}, "groups of 64 fit."),
    ],
)
def test_groups_of_4_bits(changes, words):
    made = told(**changes)
    assert f"4 bits: {words}" in plan_table(made) or words in plan_table(made)
    small = made.forecast.serving
    neurons, heads = made.forecast.layers[0].neurons, made.forecast.layers[0].heads
    assert small.int4_group == next((g for g in (128, 64, 32) if neurons % g == 32 * heads % g == 0), 0)


def test_heads_that_are_too_narrow_are_no_matter_of_rounding():
    narrow = LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=1,
        architectures=["LlamaForCausalLM"],
    )
    assert "whatever round_to is" in plan_table(told(narrow))


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"granularity": ("layer",), "ratio": 0.5}, (1, 2, 4, 8)),  # of 8 each has half a copy of 4 key/value heads
        ({"granularity": ("head",), "ratio": 0.1}, (1, 2, 4)),
        ({"granularity": ("neuron",), "round_to": 6}, (1, 2, 4)),
        ({"granularity": ("neuron",), "round_to": 7}, None),
    ],
)
def test_devices_that_share_out_a_layer(changes, devices):
    made = told(**changes)
    [(heads, neurons)] = {(row.heads, row.neurons) for row in made.forecast.layers if row.heads}
    able = tuple(count for count in range(1, 65) if heads % count == neurons % count == 0)  # 2 heads read one key
    assert made.forecast.serving.devices == able and devices in (able, None)
    text = plan_table(made)
    assert ("tensor parallel over" in text) == (len(able) > 1) and "vLLM: a stock class" in text


def test_key_value_heads_are_whole_on_a_device():
    """4 devices would share 12 heads, but not the 6 groups that they read."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 768}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, architectures=["LlamaForCausalLM"])
    assert told(config, granularity=("layer",), ratio=0.5).forecast.serving.devices == (1, 2, 3, 6, 12)


def test_what_is_no_stock_class_or_does_not_write_is_told_otherwise():
    uneven = told(allocation="global")
    assert uneven.forecast.loads_with == "plugin"
    assert serving_lines(uneven)[0] == "vLLM: no, it wants layers of equal sizes; allocation='uniform' gives them."
    for other in ("bert", "t5"):
        made = plan(make_model(other), MAGNITUDE)
        assert serving_lines(made) == [] and "serving" not in made.to_dict()["forecast"]
    local = convert_attention(make_model("llama"), AttentionConfig("local", window=4))
    assert not any("vLLM" in line for line in serving_lines(plan(local, MAGNITUDE)))


def test_it_comes_back_from_json_and_old_plans_say_nothing():
    made = told()
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    old = made.to_dict()
    del old["forecast"]["serving"]
    assert serving_lines(PruningPlan.from_dict(old)) == [] and "Loads as" in plan_table(PruningPlan.from_dict(old))
    wrong = made.to_dict()
    wrong["forecast"]["serving"]["int4_group"] = "many"
    with pytest.raises(ConfigError, match="int4_group"):
        PruningPlan.from_dict(wrong)


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
def test_a_pruned_model_is_quantised_as_its_plan_says(method):
    """8 bits with any sizes; 4 bits with the groups that are said to fit, and no larger ones."""
    pytest.importorskip("torchao")
    dense, ids = make_llama(intermediate_size=128), torch.randint(3, 280, (2, 9))
    config = PruningConfig(0.3, importance="magnitude", granularity="neuron", round_to=32 if method == "int4" else 1)
    made = plan(dense, config)
    small = prune(dense, plan=made)
    if method == "int4":
        group = made.forecast.serving.int4_group
        assert group == 32
        with pytest.raises(ConfigError, match="group_size=64 does not divide"):
            quantized(small, method, group_size=2 * group)
        few = quantized(small, method, group_size=group)
    else:
        assert made.forecast.serving.int4_group == 0
        with pytest.raises(ConfigError, match="does not divide"):
            quantized(small, "int4")
        few = quantized(small, method)
    with torch.no_grad():
        exact, rounded = small(ids).logits, few(ids).logits
    assert 0 < (rounded - exact).abs().max() / exact.abs().max() < 0.6
