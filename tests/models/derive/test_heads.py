"""Heads of attention that is less plain: for each image alone, with gates behind it, with numbers of other names."""

from dataclasses import replace

import pytest
import torch

from hf_efficient import PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.cutting import cut_units
from hf_efficient.models.derive.fitting import OTHERWISE, fitted
from hf_efficient.models.derive.observe import differs
from hf_efficient.models.derive.roles import Heads, other_numbers
from hf_efficient.models.family import Attention

from ...helpers import selected
from .tiny import make

BY_SIZE = PruningConfig(ratio=0.1, granularity=("head",), importance="magnitude", round_to=1, reconstruct=False)
TYPES = {  # and what is said of their attention
    "glm4v_vision": {"query": "attn.qkv", "output": "attn.proj"},
    "muse_glimmer_text": {"gates": ("self_attn.gate_proj",)},
    "mlcd_vision_model": {"output": "self_attn.out_proj"},  # tokens before rows
    "exaone4_5_vision": {"kv_width_attributes": ("kv_dim",)},
}
FAST = ("glm4v_vision", "muse_glimmer_text")


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_heads_are_found_and_cut(name):
    model, inputs = make(name)
    [stack] = Anatomy.of(model).stacks
    assert stack.entry.why_not("heads") is None
    said = {field: getattr(stack.entry.attention, field) for field in TYPES[name]}
    assert said == TYPES[name]
    small = prune(model, replace(BY_SIZE, sequence_length=9))
    assert small.num_parameters() < model.num_parameters()
    with torch.no_grad():
        assert small(**inputs)[0].isfinite().all()


def test_a_gate_is_cut_with_its_heads():
    model, _ = make("muse_glimmer_text")
    anatomy = Anatomy.of(model)
    group = next(group for group in anatomy.groups if group.name == "decoder.0.heads")
    gate = "layers.0.self_attn.gate_proj.weight"
    whole = model.state_dict()[gate]
    state = cut_units(model.state_dict(), anatomy.groups, {group.name: (1,)})
    assert torch.equal(state[gate], whole[len(whole) // group.units :][: len(whole) // group.units])


def test_numbers_are_tried_from_the_fewest():
    module = torch.nn.Module()
    module.num_heads, module.q_dim, module.kv_dim, module.other = 4, 32, 16, 7
    known = Attention("attn", head_attributes=("num_heads",))
    tried = [
        (one.head_attributes, one.width_attributes, one.kv_width_attributes)
        for one in other_numbers(module, known, Heads(4, 2, 8, 8))
    ]
    heads = ("num_heads",)
    assert tried == [(heads, ("q_dim",), ()), (heads, (), ("kv_dim",)), (heads, ("q_dim",), ("kv_dim",))]


def test_a_number_that_has_another_value_in_the_real_model_is_none_of_heads():
    model, _ = make("opt")
    family = Anatomy.of(model).family
    assert fitted(family, model).why_not("heads") is None
    model.decoder.layers[1].self_attn.num_heads = 5
    assert dict(fitted(family, model).stacks[0].refusals)["heads"] == OTHERWISE


def test_what_no_token_reaches_stays_the_same():
    """The audio half of a layer, where a text has no audio."""
    nothing = torch.zeros(0, 3)
    assert not differs(nothing, nothing) and not differs(None, nothing)
    assert differs(torch.ones(1, 3), torch.zeros(1, 3))
