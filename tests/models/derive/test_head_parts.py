"""Heads with parts beside the projections: tables, slopes and biases, alone or made once for all; and shared keys."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import AttentionConfig, ConfigError, convert_attention
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.classes import with_block
from hf_efficient.models.derive import family_for
from hf_efficient.models.derive.fitting import OTHERWISE, fitted
from hf_efficient.models.derive.head_parts import with_head_parts, without_part
from hf_efficient.models.family import Attention, Family
from hf_efficient.models.groups import Slice, output_weight
from hf_efficient.models.kept_heads import of_heads
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.costs import unit_cost

from ...helpers import selected
from .tiny import make, outputs

BOTH = ("weight", "bias")
TABLE = "relative_position_bias.relative_position_bias_table"
TYPES = {  # and what is said of their attention
    "mpnet": {"shared": ("position_bias",), "shared_dims": (1,)},
    "layoutlmv3": {"shared": ("rel_pos", "rel_2d_pos"), "shared_dims": (1, 1)},
    "bloom": {"shared": ("alibi",), "shared_dims": (0,)},
    "mpt": {"shared": ("position_bias",), "shared_dims": (0,)},
    "umt5": {"per_head": ("relative_attention_bias.weight",), "per_head_dims": (1,)},
    "deberta": {"per_head": ("q_bias", "v_bias"), "per_head_dims": ()},
    "swin": {"per_head": (TABLE,), "per_head_dims": (1,)},
    "swinv2": {"per_head": ("logit_scale", "continuous_position_bias_mlp.2.weight"), "per_head_dims": ()},
    "falcon": {"shared": ()},
    "falcon with slopes": {"shared": ("attention_mask", "alibi"), "shared_dims": (1, 1)},
    "deberta with positions": {
        "per_head": ("q_bias", "v_bias", "pos_proj.weight", *(f"pos_q_proj.{n}" for n in BOTH))
    },
    "deberta-v2 with positions": {"per_head": tuple(f"pos_{m}_proj.{n}" for m in ("key", "query") for n in BOTH)},
    "gpt_bigcode": {"shared": ()},
    "deepseek_v3": {"wide": ("self_attn.q_b_proj", "self_attn.kv_b_proj"), "value_size": 8},
}
CHANGES = {"slopes": {"alibi": True}, "positions": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}}
FAST = ("mpnet", "bloom", "umt5", "falcon", "deepseek_v3", "deberta-v2 with positions")


def heads_of(model):
    """The heads of the first two layers of its first stack."""
    return [group for group in Anatomy.of(model).groups if group.kind == "heads"][:2]


def cut(model, *kept):
    groups = heads_of(model)
    units = {group.name: heads for group, heads in zip(groups, kept, strict=True)}
    return apply_plan(Anatomy.of(model), PruningPlan(units=units))


def silenced(model, *kept):
    model = copy.deepcopy(model)
    for group, heads in zip(heads_of(model), kept, strict=True):
        gone = torch.tensor([unit for unit in range(group.units) if unit not in heads], dtype=torch.int64)
        for member in group.members:
            weight = output_weight(model, member)
            weight.data.index_fill_(member.output.dim, member.output.rows(gone, weight), 0)
    return model


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_unlike_layers_cut_twice_and_loaded_give_what_silent_heads_give(name, tmp_path):
    said = TYPES[name]
    name, _, changed = name.partition(" with ")
    model, inputs = make(name, **CHANGES.get(changed, {}))
    attention = Anatomy.of(model).stacks[0].entry.attention
    assert {field: getattr(attention, field) for field in said} == said
    small = cut(cut(model, (0, 2, 3), (1, 2)), (0, 2), (0, 1))  # of the first layer 0 and 3 are left
    wanted = outputs(silenced(model, (0, 3), (1, 2)), inputs)
    found = outputs(small, inputs)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, outputs(model, inputs), atol=1e-4)
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), inputs), found)


def test_a_head_of_the_same_number_in_all_layers_needs_its_own_slope():
    """The stock class would take the slopes of a model with two heads."""
    model, inputs = make("bloom")
    small = cut(model, (1, 3), (1, 3))
    assert small.config.n_head == model.config.n_head
    assert small.config.efficient["stacks"]["decoder"]["kept_heads"] == [[1, 3], [1, 3]]
    assert torch.allclose(outputs(small, inputs), outputs(silenced(model, (1, 3), (1, 3)), inputs), atol=1e-5)


def test_which_heads_are_left_has_to_be_said():
    model, _ = make("mpnet")
    config = cut(model, (0, 2, 3), (1, 2)).config
    block = config.block()
    entry = block.stacks["encoder"]
    rest = entry.kept_heads[1:]
    wrong = [
        ("belong together", replace(entry, kept_heads=())),
        ("as many of 4 heads", replace(entry, kept_heads=((0, 1), *rest))),
        ("as many of 4 heads", replace(entry, kept_heads=((0, 2, 4), *rest))),
        ("for 3 layers", replace(entry, kept_heads=rest)),
    ]
    for said, other in wrong:
        with pytest.raises(ConfigError, match=said):
            with_block(config, replace(block, stacks={"encoder": other}))
    family = block.family.to_dict()
    family["stacks"][0]["attention"] |= {"shared_dims": [7]}
    with pytest.raises(ConfigError, match="from 0 to 3"):
        Family.from_dict(family)


def test_what_was_made_for_all_heads_is_chosen_from():
    given = torch.arange(2 * 4 * 3).view(8, 3, 1)  # [batch * heads, ., .]
    assert torch.equal(of_heads(given, 0, (1, 3), 4), given[[1, 3, 5, 7]])
    assert torch.equal(of_heads(given.view(2, 4, 3), 1, (1, 3), 4), given.view(2, 4, 3)[:, [1, 3]])
    alike = torch.zeros(2, 1, 3)
    assert of_heads(alike, 1, (1, 3), 4) is alike and of_heads(None, 1, (1, 3), 4) is None


def test_parts_of_heads_are_found_by_their_sizes():
    layer = nn.Module()
    layer.attention = attention = nn.Module()
    for name in ("query", "out", "positions"):
        setattr(attention, name, nn.Linear(32, 32))
    attention.table, attention.norm = nn.Embedding(9, 4), nn.LayerNorm(32)
    attention.bias = nn.Parameter(torch.zeros(32))
    known = Attention("attention", query="attention.query", key="attention.query", output="attention.out")
    sure, wide, none = with_head_parts(layer, known, heads=4, dim=8)
    assert sure.head_parts == {"bias": 0, "table.weight": 1}
    assert wide.head_parts == sure.head_parts | {"positions.weight": 0, "positions.bias": 0}
    assert none.head_parts == {}
    assert without_part(sure, "table.weight").head_parts == {"bias": 0}


def test_a_part_that_has_another_size_in_the_real_model_is_none_of_heads():
    model, _ = make("umt5")
    family = Anatomy.of(model).family
    assert not family.stacks[0].why_not("heads") and fitted(family, model).stacks[0].why_not("heads") is None
    bias = model.encoder.block[1].layer[0].SelfAttention.relative_attention_bias
    bias.weight = nn.Parameter(bias.weight[:, :3].clone())
    assert fitted(family, model).stacks[0].why_not("heads") == OTHERWISE


def test_a_query_is_cut_with_the_gate_beside_it():
    model, inputs = make("qwen3_next")
    attention = Anatomy.of(model).stacks[0].entry.attention
    assert attention.wide[0] == "self_attn.q_proj" and attention.value_size is None and not attention.gates
    group, other = heads_of(model)
    kept = range(1, group.units), range(other.units)
    assert torch.allclose(outputs(cut(model, *kept), inputs), outputs(silenced(model, *kept), inputs), atol=1e-5)
    part = next(one for one in group.members[0].inputs if "q_proj" in one.name)
    assert part.width == 2 * group.members[0].output.width


def test_latent_heads_of_a_converted_model_are_cut():
    model, inputs = make("deepseek_v3")
    model = convert_attention(model, AttentionConfig("local", window=2, global_tokens=0))
    kept = (0, 2, 3), (1, 2)
    assert torch.allclose(outputs(cut(model, *kept), inputs), outputs(silenced(model, *kept), inputs), atol=1e-5)


def test_widths_of_latent_heads_are_those_of_the_real_model():
    config = CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=2, qk_nope_head_dim=24, v_head_dim=20)
    entry = family_for(config).stacks[0]
    assert entry.why_not("heads") is None and entry.attention.value_size == 20


def test_keys_that_all_heads_share_stay():
    model, _ = make("falcon")
    group, stack = heads_of(model)[0], Anatomy.of(model).stacks[0]
    assert stack.entry.one_kv_head and group.units == stack.num_heads
    before = model.h[0].self_attention.query_key_value.weight
    small = cut(model, (1,), (0, 1))
    after = small.h[0].self_attention.query_key_value.weight
    dim = stack.head_width
    assert torch.equal(after, torch.cat([before[dim : 2 * dim], before[-2 * dim :]]))
    gone = 3 * unit_cost(Anatomy.of(model), group, "parameters", 9)
    whole = cut(model, (0, 1, 2, 3), (0, 1))
    assert whole.num_parameters() - small.num_parameters() == gone


def test_rows_of_no_unit_are_behind_the_others():
    part, tensor = Slice("weight", 0, (2,), rest=3), torch.arange(9.0)
    assert part.count(tensor) == 3 and part.numel(tensor) == 2
    assert part.rows(torch.tensor([1]), tensor).tolist() == [2, 3]
    assert part.kept_rows(torch.tensor([0, 2]), tensor).tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert part.by_unit(tensor).tolist() == [[0, 1], [2, 3], [4, 5]]
