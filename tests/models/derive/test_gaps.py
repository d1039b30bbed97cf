"""Layers that leave a gap, where a place means something: cut is skipped, saved, loaded, cut again and decoded."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModel

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, prune
from hf_efficient.distillation.layer_map import map_attentions, map_layers
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.block import check_block
from hf_efficient.models.classes import block_of
from hf_efficient.models.derive.compare import decodes_alike, distance, outputs_of
from hf_efficient.models.derive.depths import depth_field, is_depth_field
from hf_efficient.models.derive.entry import make_entry
from hf_efficient.models.derive.proof import hand_on, prove
from hf_efficient.models.family import Family
from hf_efficient.models.gaps import EmptyLayer, leave_gaps
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.plan import PruningPlan

from ...helpers import selected
from .test_parts import BY_SIZE
from .tiny import make, outputs

TYPES = {  # the stack, and why its layers have places
    "esm": "encoder",  # the weights of a head beside the model have a part for each layer
    "gpt_neo": "decoder",  # a list in a list says the kind of each layer
    "yolos": "encoder",  # positions are added between layers
    "gemma4_text": "decoder",  # a table holds something for each layer
    "llava": "vision",  # the last layer but one is read
    "swin": "encoder_layers_0_blocks",  # every second window is shifted
    "qwen3_vl": "visual_blocks",  # the states of some layers go into the text
}
FAST = ("esm", "gpt_neo", "yolos")


class Layer(nn.Module):
    kind = "plain"

    def __init__(self):
        super().__init__()
        self.linear, self.window = nn.Linear(4, 4), 3

    def forward(self, states, mask=None):
        return self.linear(states), mask


def test_an_empty_layer_hands_on_what_it_is_given():
    layers, states = nn.ModuleList(Layer() for _ in range(3)), torch.randn(2, 5, 4)
    leave_gaps(layers, (0, 2), gives=2)
    given, rest = layers[1](states, mask=torch.ones(2, 5, dtype=torch.long))
    assert given is states and rest is None
    assert [isinstance(one, EmptyLayer) for one in layers] == [False, True, False]
    assert isinstance(layers[1], Layer) and (layers[1].kind, layers[1].window) == ("plain", 3)
    assert not layers[1].state_dict() and len(layers[0].state_dict()) == 2
    assert layers[0](states)[0] is not states


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_what_leaves_is_skipped(name, tmp_path):
    model, inputs = make(name)
    anatomy = Anatomy.of(model)
    stack = anatomy.stack(TYPES[name])
    assert stack.entry.gaps is not None and stack.entry.why_not("layers") is None
    kept = [layer for layer in range(stack.depth) if layer != 1]
    small = apply_plan(anatomy, PruningPlan(layers={stack.name: tuple(kept)}))
    handle = stack.layers[1].register_forward_hook(hand_on, with_kwargs=True, prepend=True)
    wanted = outputs_of(model, inputs)
    handle.remove()
    assert distance(outputs_of(small, inputs), wanted, inputs) < 1e-5
    assert distance(outputs_of(model, inputs), wanted, inputs) > 1e-3
    assert not is_portable(small) and small.num_parameters() < model.num_parameters()
    left = Anatomy.of(small).stack(stack.name)
    assert (left.depth, len(left.layers), left.entry.places) == (len(kept), len(kept), tuple(kept))
    assert left.layer_prefix(len(kept) - 1) == stack.layer_prefix(kept[-1])
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert distance(outputs_of(loaded, inputs), outputs_of(small, inputs), inputs) == 0


def test_what_has_gaps_is_cut_and_converted_again(tmp_path):
    model, inputs = make("esm")
    small = apply_plan(Anatomy.of(model), PruningPlan(layers={"encoder": (0, 2)}))
    narrow = prune(small, replace(BY_SIZE, granularity=("neuron", "head"), ratio=0.2))
    assert [group.layers for group in Anatomy.of(narrow).groups if group.kind == "heads"] == [(0,), (1,)]
    wide = convert_attention(narrow, AttentionConfig("local", window=4096, global_tokens=0))
    assert distance(outputs_of(wide, inputs), outputs_of(narrow, inputs), inputs) < 1e-5
    last = apply_plan(Anatomy.of(wide), PruningPlan(layers={"encoder": (1,)}))
    assert block_of(last.config).kept_layers == {"encoder": (2,)}
    assert [isinstance(layer, EmptyLayer) for layer in last.base_model.encoder.layer] == [True, True, False]
    last.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), inputs), outputs(last, inputs))


def test_a_student_with_gaps_is_compared_place_by_place():
    model, _ = make("esm")
    small = apply_plan(Anatomy.of(model), PruningPlan(layers={"encoder": (0, 2)}))
    assert map_layers(small, model, "auto", ("encoder",)) == {"encoder": [(0, 0), (1, 1), (3, 3)]}
    with pytest.raises(UnsupportedModelError, match="gaps in their places"):
        map_attentions(small, model, "auto", ("encoder",))


def test_without_the_layer_that_a_cache_asks_nothing_is_proven():
    """GPT-Neo's cache asks its first layer how long the text is, so that layer stays."""
    model, inputs = make("gpt_neo")
    anatomy = Anatomy.of(model)
    assert anatomy.family.first_stays
    with pytest.raises(ConfigError, match="first layer"):
        apply_plan(anatomy, PruningPlan(layers={"decoder": (1, 2)}))
    for kept in ((0, 1), (0, 2)):
        assert decodes_alike(apply_plan(anatomy, PruningPlan(layers={"decoder": kept})), inputs, 1e-4)
    stacks = tuple(replace(one, gaps=0) for one in anatomy.family.stacks)
    again = prove(replace(anatomy.family, stacks=stacks, first_stays=False), model, inputs)
    assert again.first_stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": [0, 3]}, "from 0 to 2 in rising order"),
        ({"places": [2, 0]}, "rising order"),
        ({"places": []}, "rising order"),
        ({"places": "all"}, "places must be"),
        ({"gaps": None, "places": [0, 2]}, "need `gaps`"),
        ({"gaps": -1}, "gaps must be"),
    ],
)
def test_places_of_a_stranger_are_read_with_care(change, message):
    model, _ = make("esm")
    small = apply_plan(Anatomy.of(model), PruningPlan(layers={"encoder": (0, 2)}))
    block = small.config.efficient
    [stack] = block["family"]["stacks"]
    with pytest.raises(ConfigError, match=message):
        family = Family.from_dict(block["family"] | {"stacks": [stack | change]})
        check_block(replace(block_of(small.config), family=family), small.config, family)


def test_the_field_with_the_depth_is_found_by_trial():
    """Towers of as many layers: only one field makes the list shorter."""
    model, inputs = make("blip")
    assert is_depth_field(model, "vision_model.encoder.layers", "vision_config", "num_hidden_layers")
    assert not is_depth_field(model, "vision_model.encoder.layers", "text_config", "num_hidden_layers")
    assert depth_field(model, "vision_model.encoder.layers") == ("vision_config", "num_hidden_layers")
    assert [one.config for one in make_entry(model, inputs).stacks] == ["text_config", "vision_config"]


def test_parts_of_layers_leave_no_gaps():
    """XLM adds what its FFNs give to the stream outside of them: empty ones would double it."""
    model, _ = make("xlm")
    assert Anatomy.of(model).family.why_not("layers") is not None
