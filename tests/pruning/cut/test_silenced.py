"""A real model of a derived or registered family is cut only if it then gives what it gives without what left."""

import pytest
import torch

from hf_efficient import PruningConfig, UnsupportedModelError, prune
from hf_efficient.models.family import Attention, Family, Stack
from hf_efficient.models.registry import register_family

from ...models.derive.toy import documented

BATCHES = [{"input_ids": torch.arange(3, 39).view(2, 18), "attention_mask": torch.ones(2, 18, dtype=torch.long)}]
FIELDS = {"num_layers": "depth", "hidden": "dim", "heads": "n_heads", "neurons": "mlp_dim"}


def entry(**changes):
    linears = {"query": "mixer.mix", "key": "mixer.mix", "value": "mixer.mix", "output": "mixer.out"}
    attention = Attention("mixer", **linears, head_attributes=("n_heads",), **changes)
    stack = Stack("encoder", "blocks", attention, ("wide",), "narrow", causal=False, **FIELDS)
    return Family("toy_that_is_cut", "ToyConfig", (stack,), norm="pre")


@pytest.mark.parametrize("parts", [("head",), ("neuron", "layer")], ids=str)
def test_a_wrong_entry_is_noticed_and_the_model_stays_as_it_was(parts, monkeypatch):
    toy = documented(monkeypatch, "toy_that_is_cut", **{'"toy"': '"toy_that_is_cut"'})
    model = toy.ToyModel(toy.ToyConfig(depth=4)).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = PruningConfig(ratio=0.2, granularity=parts, importance="activation", round_to=1)
    register_family(entry(interleaved=True))  # q | k | v lie in blocks
    if parts == ("head",):
        with pytest.raises(UnsupportedModelError, match=r"Cut, this ToyModel .*last_hidden_state is .* off"):
            prune(model, config, BATCHES)
    else:
        prune(model, config, BATCHES)  # what is wrong is said of heads
    register_family(entry())
    assert prune(model, config, BATCHES).num_parameters() < model.num_parameters()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
