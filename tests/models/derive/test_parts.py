"""What is pruned where not all is known: attention of an unknown kind, layers without any, stages of a hierarchy."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import ConfigError, PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.proof import prove
from hf_efficient.models.derive.tiny import tiny_config, tiny_model
from hf_efficient.models.family import ABILITIES, Attention, Family, Stack
from hf_efficient.models.stacks import config_stacks

from ...helpers import selected
from .tiny import make, outputs

BY_SIZE = PruningConfig(
    ratio=0.1, importance="magnitude", layer_importance="magnitude", round_to=1, reconstruct=False, sequence_length=9
)
PARTS = {  # some of the abilities of types whose attention cannot be described, or is not in all layers
    "falcon": {"neurons", "layers"},
    "canine": {"neurons", "layers"},
    "wavlm": {"neurons", "layers"},
    "fnet": {"neurons", "layers"},
    "flaubert": {"neurons"},
    "minimax": {"heads", "neurons", "layers"},
    "hiera": {"neurons"},
    "swin": {"neurons"},
}
FAST = ("falcon", "fnet", "minimax")


@pytest.mark.parametrize(("name",), selected([(name,) for name in PARTS], lambda name: name in FAST))
def test_what_is_known_is_pruned(name, tmp_path):
    model, inputs = make(name)
    family = Anatomy.of(model).family
    assert PARTS[name] <= {ability for ability in ABILITIES if family.why_not(ability) is None}
    small = prune(model, replace(BY_SIZE, granularity=tuple(sorted(part[:-1] for part in PARTS[name]))))
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.num_parameters() < model.num_parameters()
    assert torch.equal(outputs(loaded, inputs), outputs(small, inputs))


def test_heads_leave_the_layers_that_have_attention():
    model, _ = make("minimax")
    layers = [group.layers for group in Anatomy.of(model).groups if group.kind == "heads"]
    types = model.config.layer_types
    assert layers == [(index,) for index, kind in enumerate(types) if kind == "full_attention"] != []


def test_the_entry_of_a_list_is_a_field():
    config = CONFIG_MAPPING["swin"](depths=[2, 3], num_heads=[3, 6])
    stack = Stack("b", "encoder.layers.1.blocks", Attention(""), num_layers="depths.1", heads="num_heads.1")
    [known] = config_stacks(config, Family("swin", "SwinConfig", (stack,)))
    assert (known.depth, known.num_heads) == (3, 6)
    assert known.changed({}, {"depths.1": 1, "num_heads.1": 2}) == {"depths": [2, 1], "num_heads": [3, 2]}
    assert known.changed({"depths": [1, 3]}, {"depths.1": 1}) == {"depths": [1, 1]}
    assert config.depths == [2, 3]


@pytest.mark.parametrize("field", ["depths.2", "depths.x", "patch_size.0", "missing"])
def test_a_field_that_is_not_there(field):
    stack = Stack("b", "encoder.layers.1.blocks", Attention(""), num_layers=field, heads="")
    [known] = config_stacks(CONFIG_MAPPING["swin"](depths=[2, 3]), Family("swin", "SwinConfig", (stack,)))
    with pytest.raises(ConfigError, match=f"A SwinConfig has no '{field}'"):
        _ = known.depth
    assert known.num_heads == 1  # where nothing is known of any


def test_layers_that_only_leave_at_the_end_prove_nothing():
    """In a tiny model of two layers of which the first stays no layer moves to another place, so that none may."""
    config = tiny_config(CONFIG_MAPPING["opt"]())
    config.num_hidden_layers = 2
    model = tiny_model(config)
    family = Anatomy.of(model).family
    assert family.why_not("layers") is None and family.stacks[0].gaps is None
    again = prove(replace(family, first_stays=True), model, tiny_inputs(model))
    assert again.stacks[0].gaps is not None
