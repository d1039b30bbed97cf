"""Each bad value is refused when the config is made, and the message says what is allowed."""

import pytest

from hf_efficient import ConfigError, PruningConfig
from hf_efficient.pruning.config import IMPORTANCES as NAMES
from hf_efficient.pruning.importance import IMPORTANCES

BAD = [
    ({"ratio": 0}, ["between 0 and 1", "0"]),
    ({"ratio": 1.0}, ["between 0 and 1", "1.0"]),
    ({"ratio": -0.1}, ["between 0 and 1", "-0.1"]),
    ({"ratio": float("nan")}, ["between 0 and 1", "nan"]),
    ({"ratio": "half"}, ["between 0 and 1", "'half'"]),
    ({"ratio": True}, ["between 0 and 1", "True"]),
    ({"ratio": None}, ["between 0 and 1", "None"]),
    ({"metric": "flops"}, ["'flops'", "macs", "parameters"]),
    ({"granularity": ()}, ["empty", "head", "neuron", "layer"]),
    ({"granularity": "heads"}, ["'heads'", "Did you mean 'head'", "neuron", "layer"]),
    ({"granularity": ("head", "block")}, ["'block'", "head", "neuron", "layer"]),
    ({"granularity": None}, ["None", "head", "neuron", "layer"]),
    ({"granularity": 3}, ["3", "head"]),
    ({"importance": "tayler"}, ["'tayler'", "Did you mean 'taylor'", "magnitude", "random"]),
    ({"importance": None}, ["None", "taylor"]),
    ({"allocation": "even"}, ["'even'", "global", "uniform"]),
    ({"schedule": "cosine"}, ["'cosine'", "cubic", "linear", "one-shot"]),
    ({"round_to": 0}, ["round_to", "1 to 4096", "0"]),
    ({"round_to": 8.0}, ["round_to", "integer", "8.0"]),
    ({"round_to": 5000}, ["round_to", "1 to 4096", "5000"]),
    ({"steps": 0}, ["steps", "1 to 1000", "0"]),
    ({"steps": True}, ["steps", "integer", "True"]),
    ({"seed": -1}, ["seed", "integer", "-1"]),
    ({"seed": "a"}, ["seed", "integer", "'a'"]),
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


def test_config_and_table_name_the_same_importances():
    assert set(IMPORTANCES) == set(NAMES)
