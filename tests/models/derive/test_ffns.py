"""FFNs of which a layer has several, or none: experts in one tensor, shared experts, dense layers among others."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, MixtralForCausalLM

from hf_efficient import ConfigError, PruningConfig, UnsupportedModelError, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.cutting import cut_units
from hf_efficient.models.derive.tiny import tiny_model
from hf_efficient.models.family import Family
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.fit.reconstruction import find_blocks
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.costs import unit_cost
from hf_efficient.pruning.score.statistics import mask_gradients

from .tiny import make, outputs

BY_SIZE = PruningConfig(
    ratio=0.2, granularity=("neuron",), importance="magnitude", round_to=1, reconstruct=False, sequence_length=9
)
KINDS = {  # of the FFNs of each layer
    "mixtral": [{"expert_neurons": 40}] * 3,
    "gpt_oss": [{"expert_neurons": 40}] * 3,  # gate and up take turns, and have biases
    "qwen2_moe": [{"neurons": 40, "expert_neurons": 40}] * 3,
    "deepseek_v3": [{"neurons": 40}] + [{"neurons_2": 40, "expert_neurons": 40}] * 2,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_ffn_of_a_layer_is_known(name):
    model, _ = make(name)
    groups = [group for group in Anatomy.of(model).groups if group.is_neurons]
    found = [{group.kind: group.units for group in groups if group.layers == (index,)} for index in range(3)]
    assert found == KINDS[name]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_pruned_experts_give_what_they_give_without_these_neurons(name, tmp_path):
    model, inputs = make(name)
    small = prune(model, replace(BY_SIZE, ratio=0.1, granularity=("neuron",)))
    before, after = (sum(g.units for g in Anatomy.of(one).groups if g.is_neurons) for one in (model, small))
    assert after < before
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(small, inputs))
    assert loaded.num_parameters() == small.num_parameters() < model.num_parameters()


def test_experts_that_are_alike_need_no_plugin():
    model, _ = make("mixtral")
    small = prune(model, replace(BY_SIZE, allocation="uniform"))
    assert is_portable(small) and small.config.intermediate_size == 24
    assert {group.units for group in Anatomy.of(small).groups if group.kind == "expert_neurons"} == {24}


def test_a_field_that_says_two_widths_is_changed_if_both_fit():
    """The shared expert is twice as wide as the field says."""
    model, inputs = make("deepseek_v3", n_shared_experts=2)
    small = prune(model, replace(BY_SIZE, allocation="uniform"))
    widths = {group.kind: group.units for group in Anatomy.of(small).groups}
    assert is_portable(small) and small.config.moe_intermediate_size == widths["expert_neurons"] == 24
    assert widths["neurons_2"] == 48
    [one] = [g for g in Anatomy.of(model).groups if g.name == "decoder.1.expert_neurons"]
    other = apply_plan(Anatomy.of(model), PruningPlan(units={one.name: tuple(range(8, 40))}))
    assert not is_portable(other) and other.config.moe_intermediate_size == 40
    assert other.config.efficient["stacks"]["decoder"] == {"expert_neurons": [40, 32, 40]}
    assert outputs(other, inputs).isfinite().all()


def test_experts_cost_what_works_for_a_token():
    model, _ = make("mixtral")
    anatomy = Anatomy.of(model)
    [group] = [group for group in anatomy.groups if group.name == "decoder.0.expert_neurons"]
    weights = 6 * 3 * 32  # experts, of gate, up and down
    assert unit_cost(anatomy, group, "parameters", 9) == weights
    assert unit_cost(anatomy, group, "macs", 9) == 9 * weights * 2 // 6  # two of six work


@pytest.mark.parametrize("importance", ["fisher", "taylor"])
def test_experts_are_scored_by_data(importance):
    base, inputs = make("mixtral")
    model = tiny_model(base.config, MixtralForCausalLM)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = prune(model, replace(BY_SIZE, importance=importance), [inputs])
    assert small.num_parameters() < model.num_parameters()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, torch.nn.Parameter)


def test_experts_are_not_reconstructed_and_dense_layers_are():
    model, inputs = make("deepseek_v3")
    [stack] = Anatomy.of(model).stacks
    assert [[block.writes for block in find_blocks(stack, index)] for index in range(3)] == [
        ["self_attn.o_proj", "mlp.down_proj"],
        ["self_attn.o_proj"],
        ["self_attn.o_proj"],
    ]
    small = prune(model, replace(BY_SIZE, ratio=0.1, importance="fisher", reconstruct=True), [inputs] * 3)
    assert outputs(small, inputs).isfinite().all()


def test_the_gradient_of_a_mask_is_the_slope_of_the_loss():
    model, inputs = make("mixtral")
    [group] = [group for group in Anatomy.of(model).groups if group.name == "decoder.0.expert_neurons"]

    def loss(model, batch):
        output = model(**batch)[0].double()
        return (output * torch.arange(output.shape[-1])).sum()

    [slope] = mask_gradients(model, [group], [inputs], loss)[group]
    down, step = model.layers[0].mlp.experts.down_proj, 1e-3
    values = []
    for factor in (1 + step, 1 - step):
        whole = down.detach().clone()
        with torch.no_grad():
            down[:, :, 3] *= factor
            values.append(float(loss(model, inputs)))
            down.copy_(whole)
    assert float(slope[3]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("importance", ["activation", "obs"])
def test_what_experts_read_cannot_be_seen(importance):
    model, inputs = make("mixtral")
    with pytest.raises(UnsupportedModelError, match="Use importance 'fisher'"):
        prune(model, replace(BY_SIZE, importance=importance), [inputs])


def test_an_entry_with_an_unknown_ffn_is_refused():
    entry = Anatomy.of(make("mixtral")[0]).family.to_dict()
    assert Family.from_dict(entry).to_dict() == entry
    entry["stacks"][0]["more_ffns"][0]["kind"] = "heads"
    with pytest.raises(ConfigError, match="an FFN is one of"):
        Family.from_dict(entry)


def test_experts_leave_together():
    """The same neuron of every expert: of the one tensor a column."""
    model, _ = make("mixtral")
    anatomy = Anatomy.of(model)
    [group] = [group for group in anatomy.groups if group.name == "decoder.0.expert_neurons"]
    state = cut_units(model.state_dict(), anatomy.groups, {group.name: (1, 3)})
    whole = model.layers[0].mlp.experts
    assert torch.equal(state["layers.0.mlp.experts.down_proj"], whole.down_proj[:, :, [1, 3]])
    assert torch.equal(state["layers.0.mlp.experts.gate_up_proj"], whole.gate_up_proj[:, [1, 3, 41, 43]])
