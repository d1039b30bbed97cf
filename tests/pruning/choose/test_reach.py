"""A ratio that cannot be reached is refused from shapes alone; the highest that is named can be reached."""

import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efficient import ConfigError, PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.choose.reach import check_reachable as check
from hf_efficient.pruning.price.costs import make_costs, total_cost

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 20,
}


def check_reachable(model, config: PruningConfig, length: int) -> None:
    anatomy = Anatomy.of(model)
    check(anatomy, config, make_costs(anatomy, config.metric, length))


def _config(ratio: float, granularity: tuple[str, ...], metric: str) -> PruningConfig:
    return PruningConfig(ratio=ratio, granularity=granularity, metric=metric, importance="magnitude", round_to=4)


@pytest.mark.parametrize("metric", ["macs", "parameters"])
@pytest.mark.parametrize("granularity", [("head",), ("neuron",), ("head", "neuron"), ("layer",)])
def test_the_highest_ratio_is_exact(granularity, metric):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    with pytest.raises(ConfigError, match="At most") as refused:
        check_reachable(model, _config(0.999, granularity, metric), 128)
    highest = float(re.search(r"At most (0\.\d+)", str(refused.value)).group(1))
    below = prune(model, _config(highest - 0.006, granularity, metric))
    assert 1 - total_cost(below, metric, 128) / total_cost(model, metric, 128) >= highest - 0.006
    with pytest.raises(ConfigError, match="At most"):
        prune(model, _config(highest + 0.006, granularity, metric))


def test_layers_and_units_together():
    model = BertForSequenceClassification(BertConfig(**SIZES))
    check_reachable(model, _config(0.8, ("layer", "head", "neuron"), "macs"), 128)
    with pytest.raises(ConfigError, match="At most"):
        check_reachable(model, _config(0.97, ("layer", "head", "neuron"), "macs"), 128)


def test_no_weights_are_needed():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**SIZES | {"hidden_size": 4096, "intermediate_size": 16384}))
    check_reachable(model, _config(0.5, ("head", "neuron"), "macs"), 128)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(ConfigError, match="At most"):
        check_reachable(model, _config(0.9999, ("head", "neuron"), "macs"), 128)
