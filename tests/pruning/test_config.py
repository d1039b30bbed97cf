"""Each bad value is refused when the config is made, and the message says what is allowed."""

import pytest

from hf_efficient import ConfigError, PruningConfig
from hf_efficient.io.lazy import load
from hf_efficient.pruning.methods import (
    IMPORTANCES,
    LAYER_IMPORTANCES,
    METRICS,
    SCHEDULES,
    TRAINED_IMPORTANCES,
    WEIGHT_IMPORTANCES,
)

BAD = [
    ({"ratio": 0}, ["between 0 and 1", "0"]),
    ({"ratio": 1.0}, ["between 0 and 1", "1.0"]),
    ({"ratio": -0.1}, ["between 0 and 1", "-0.1"]),
    ({"ratio": float("nan")}, ["between 0 and 1", "nan"]),
    ({"ratio": "half"}, ["between 0 and 1", "'half'"]),
    ({"ratio": True}, ["between 0 and 1", "True"]),
    ({"metric": "flops"}, ["'flops'", "macs", "parameters"]),
    ({"granularity": ()}, ["empty", "head", "neuron", "layer"]),
    ({"granularity": "heads"}, ["'heads'", "Did you mean 'head'", "neuron", "layer"]),
    ({"granularity": ("head", "block")}, ["'block'", "head", "neuron", "layer"]),
    ({"granularity": ("head", "vocabulary")}, ["prune_vocabulary(model, tokenizer, texts)"]),
    ({"granularity": None}, ["None", "head", "neuron", "layer"]),
    ({"granularity": 3}, ["3", "head"]),
    ({"importance": "tayler"}, ["'tayler'", "Did you mean 'taylor'", "magnitude", "random"]),
    ({"allocation": "even"}, ["'even'", "global", "uniform"]),
    ({"schedule": "cosine"}, ["'cosine'", "cubic", "linear", "one-shot"]),
    ({"round_to": 0}, ["round_to", "1 to 4096", "0"]),
    ({"round_to": 8.0}, ["round_to", "integer", "8.0"]),
    ({"round_to": 5000}, ["round_to", "1 to 4096", "5000"]),
    ({"steps": 0}, ["steps", "1 to 1000", "0"]),
    ({"steps": True}, ["steps", "integer", "True"]),
    ({"seed": -1}, ["seed", "integer", "-1"]),
    ({"seed": "a"}, ["seed", "integer", "'a'"]),
    ({"reconstruct": 1}, ["reconstruct", "true or false", "1"]),
    ({"importance": "wanda"}, ["'wanda'", "['head', 'neuron']", "taylor", "obs"]),
    ({"importance": "loss"}, ["'loss' ranks layers", "layer_importance='loss'"]),
    ({"layer_importance": "depth"}, ["'depth'", "block_influence", "loss", "fisher"]),
    ({"rearrange": True, "importance": "taylor"}, ["rearrange", "fisher", "'taylor'"]),
    ({"rearrange": 1}, ["rearrange", "true or false"]),
    ({"sequence_length": 0}, ["sequence_length", "0"]),
    ({"granularity": "weight", "importance": "wanda"}, ["'wanda'", "['weight']", "activation", "obs"]),
    (
        {"granularity": ("neuron", "weight"), "importance": "magnitude_l1"},
        ["'magnitude_l1'", "['neuron', 'weight']", "taylor"],
    ),
    ({"mask_structure": "2:4"}, ["'2:4'", "['head', 'neuron']", "Add 'weight'"]),
    ({"granularity": "weight", "mask_structure": "4:2"}, ["'4:2'", "0 < n < m <= 32", "2 of every 4"]),
    ({"granularity": "weight", "mask_structure": "0:4"}, ["'0:4'", "n:m"]),
    ({"granularity": "weight", "mask_structure": "16:64"}, ["'16:64'", "<= 32"]),
    ({"granularity": "weight", "mask_structure": "half"}, ["'half'", "n:m"]),
    ({"granularity": "weight", "mask_structure": 2}, ["got 2", "n:m"]),
    ({"granularity": "weight", "mask_structure": "1:4", "ratio": 0.5}, ["'1:4'", "0.75", "ratio=0.5", "leave it out"]),
    ({"granularity": "weight", "mask_structure": "2:4", "steps": 2}, ["steps=2", "one step"]),
    ({"granularity": "weight", "importance": "activation"}, ["'activation'", "one matrix", "allocation='uniform'"]),
    ({"granularity": "weight", "importance": "obs"}, ["'obs'", "one matrix", "allocation='uniform'"]),
    (
        {"granularity": "weight", "importance": "obs", "allocation": "uniform", "reconstruct": False},
        ["'obs'", "reconstruct=False", "'activation'"],
    ),
    ({"granularity": ("head", "weight"), "mask_structure": "2:4", "ratio": 0.5}, ["0.5", "more than that", "'head'"]),
    (
        {"granularity": ("neuron", "weight"), "mask_structure": "2:4", "ratio": 0.8, "round_to": 6},
        ["multiples of 4", "round_to=6"],
    ),
]


@pytest.mark.parametrize(("values", "words"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_values(values, words):
    with pytest.raises(ConfigError) as raised:
        PruningConfig(**values)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_good_values():
    one = PruningConfig(ratio=0.3, granularity="head", seed=0, steps=1000, round_to=4096)
    assert one.granularity == ("head",)
    assert PruningConfig(granularity=["head", "layer"]).granularity == ("head", "layer")
    assert PruningConfig(granularity=("head",)) == PruningConfig(granularity="head") != PruningConfig()


@pytest.mark.parametrize("table", [IMPORTANCES, LAYER_IMPORTANCES, WEIGHT_IMPORTANCES])
def test_every_importance_has_a_function(table):
    assert all(callable(load(importance.function)) for importance in table.values())


@pytest.mark.parametrize("table", [METRICS, SCHEDULES, TRAINED_IMPORTANCES])
def test_every_other_name_has_a_function(table):
    assert all(callable(function) for function in table.values())


def test_the_ratio_that_a_pattern_says():
    assert PruningConfig().ratio == PruningConfig(granularity="weight").ratio == 0.5
    assert PruningConfig(granularity="weight", mask_structure="1:4").ratio == 0.75
    assert PruningConfig(granularity="weight", mask_structure="2:3", ratio=0.333333333).structure == (2, 3)


def test_all_parts_reduce_by_the_same_factor():
    one = PruningConfig(ratio=0.875, granularity=("layer", "head", "neuron", "weight"))
    rest = one.without_weights()
    assert one.weight_ratio == pytest.approx(0.5) == rest.layer_share
    assert rest.ratio == pytest.approx(0.75) and rest.granularity == ("layer", "head", "neuron")
    pattern = PruningConfig(ratio=0.8, granularity=("neuron", "weight"), mask_structure="2:4")
    assert pattern.weight_ratio == 0.5 and pattern.without_weights().ratio == pytest.approx(0.6)
    assert PruningConfig(granularity="weight").without_weights() is None
    assert PruningConfig(granularity="head").weight_ratio == 0
