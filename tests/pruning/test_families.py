"""Pruning and students of every family in the table: exact where it is offered, refused with a reason where not."""

import copy

import pytest
import torch
import transformers

from hf_efficient import AttentionConfig, ConfigError, build_student, convert_attention, prune
from hf_efficient.families import FAMILIES, find_stacks
from hf_efficient.models.configs import block_of
from hf_efficient.pruning.groups import find_groups, total_cost
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.surgery import apply_plan
from tests.families import CASES, CAUSAL, TWO_STACKS, make_inputs, make_labels, make_model, real_logits
from tests.helpers import assert_close

from .tiny import config, depths, kept_parts, sizes, zero_units


@pytest.mark.parametrize("name", CASES)
def test_removing_units_is_cutting_them(name):
    """Another set of units in every group, chosen here and not by a score."""
    dense, inputs = make_model(name).double(), make_inputs(name, CASES[name].paddings[0])
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    plan = {group: tuple(range(i % 2, group.units, 2 + i % 3)) for i, group in enumerate(find_groups(dense))}
    small = apply_plan(dense, PruningPlan(units=plan))
    assert kept_parts(dense, small) == plan
    zero_units(masked := copy.deepcopy(dense), plan)
    assert_close(real_logits(small, inputs), real_logits(masked, inputs), 1e-10)
    assert (real_logits(small, inputs) - real_logits(dense, inputs)).abs().max() > 1e-3
    kinds = {group.kind for group in plan}
    assert kinds == {"heads", "neurons"} | ({"cross_heads"} if name in TWO_STACKS else set())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_pruned_model_comes_back_from_disk(name, allocation, tmp_path):
    dense, inputs = make_model(name), make_inputs(name, CASES[name].paddings[0])
    batches = [inputs | make_labels(name)]
    granularity = "neuron" if allocation == "uniform" else ("head", "neuron")
    settings = config(ratio=0.3, allocation=allocation, granularity=granularity, round_to=1)
    small = prune(dense, settings, batches)
    assert total_cost(small, "macs", 13) < 0.75 * total_cost(dense, "macs", 13)
    small.save_pretrained(tmp_path)
    loaded = getattr(transformers, CASES[name].auto).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)[0], small(**inputs)[0])
    assert sizes(loaded) == sizes(small) != sizes(dense)
    if allocation == "uniform":
        sayable = all(stack.neurons for stack in FAMILIES[name].stacks)
        assert (type(loaded) is type(dense)) == sayable, "the stock config says it all, where it has a field for it"


@pytest.mark.parametrize("name", ["qwen3", "bart", "whisper"])
def test_taylor_scores_and_converted_attention(name):
    dense = convert_attention(make_model(name), AttentionConfig("linear"))
    inputs = make_inputs(name, CASES[name].paddings[0]) | make_labels(name)
    small = prune(dense, config(ratio=0.4, importance="taylor", allocation="global", round_to=1), [inputs])
    assert type(small) is type(dense) and small.num_parameters() < dense.num_parameters()
    assert torch.isfinite(small(**inputs)[0]).all()


@pytest.mark.parametrize("name", CASES)
def test_a_student_keeps_the_chosen_layers(name, tmp_path):
    """Cut by hand, the teacher gives the same; what depends on the layer (windows, scalings) goes with it."""
    fields = CASES[name].own_window[0] if CASES[name].own_window else {}
    teacher, inputs = make_model(name, **fields), make_inputs(name, CASES[name].paddings[0])
    inputs |= {"use_cache": False} if name in (*CAUSAL, *TWO_STACKS) else {}
    student = build_student(teacher, [0, 2])
    assert set(depths(student).values()) == {2} and type(student) is type(teacher)
    by_hand = copy.deepcopy(teacher)
    for _, layers in list(find_stacks(by_hand)):
        del layers[1]
    for key in FAMILIES[name].per_layer:
        setattr(by_hand.config, key, [getattr(teacher.config, key)[layer] for layer in (0, 2)])
        assert getattr(student.config, key) == getattr(by_hand.config, key)
    for stack in FAMILIES[name].stacks:
        setattr(stack.own_config(by_hand.config), stack.num_layers, 2)
    assert_close(real_logits(student, inputs), real_logits(by_hand, inputs), 1e-6)
    student.save_pretrained(tmp_path)
    loaded = getattr(transformers, CASES[name].auto).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)[0], student(**inputs)[0])
    assert set(block_of(loaded.config).kept_layers.values()) == {(0, 2)}


@pytest.mark.parametrize("name", [*CAUSAL, *TWO_STACKS])
def test_a_student_generates(name):
    inputs = {key: value for key, value in make_inputs(name, "left").items() if key != "decoder_input_ids"}
    layers = {"encoder": 3, "decoder": 2} if name in TWO_STACKS else 2
    student = build_student(make_model(name), layers)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(student.generate(**inputs, **options), student.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("name", ["bart", "marian", "whisper"])
def test_the_decoder_of_these_may_be_the_deeper_stack(name):
    """Unlike T5's: `generate` counts the layers of the decoder for the cache."""
    inputs = {key: value for key, value in make_inputs(name, "left").items() if key != "decoder_input_ids"}
    student = build_student(make_model(name), {"encoder": 1})
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for cache in ("dynamic", "static"):
        out = student.generate(**inputs, **options, cache_implementation=cache)
        assert torch.equal(out, student.generate(**inputs, **options, use_cache=False))


def test_a_first_layer_that_is_unlike_the_others_cannot_leave():
    with pytest.raises(ConfigError, match="first layer"):
        build_student(make_model("modernbert"), [1, 2])
