"""Pruning and students of every family in the table are exact."""

import copy

import pytest
import torch
import transformers

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, build_student, convert_attention, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.classes import block_of
from hf_efficient.models.families import FAMILIES
from hf_efficient.models.groups import unit_parameters
from hf_efficient.models.registry import family_of
from hf_efficient.pipeline.report import structure
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.pruning.score.calibration import average_length, model_loss
from hf_efficient.pruning.score.units import taylor
from tests.families import CASES, CAUSAL, TWO_STACKS, make_inputs, make_model, real_logits
from tests.helpers import assert_close, selected

from .forms import CROSS, FORMS, LOSSES, auto_class, form_batches, form_inputs, make_form
from .tiny import config, depths, kept_parts, measured_macs, zero_units


@pytest.mark.parametrize("form", FORMS)
def test_removing_units_is_cutting_them(form):
    """Another set of units in every group, chosen here and not by a score."""
    dense, inputs = make_form(form).double(), form_inputs(form)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    plan = {group: tuple(range(i % 2, group.units, 2 + i % 3)) for i, group in enumerate(Anatomy.of(dense).groups)}
    small = apply_plan(Anatomy.of(dense), PruningPlan(units={group.name: kept for group, kept in plan.items()}))
    assert kept_parts(dense, small) == plan
    zero_units(masked := copy.deepcopy(dense), plan)
    assert_close(real_logits(small, inputs), real_logits(masked, inputs), 1e-10)
    assert (real_logits(small, inputs) - real_logits(dense, inputs)).abs().max() > 1e-3
    shifted = {group: tuple((unit + 1) % group.units for unit in units) for group, units in plan.items()}
    zero_units(masked := copy.deepcopy(dense), shifted)
    assert (real_logits(small, inputs) - real_logits(masked, inputs)).abs().max() > 1e-3
    assert {group.kind for group in plan} == {"heads", "neurons"} | ({"cross_heads"} if form in CROSS else set())


@pytest.mark.parametrize("form", FORMS)
def test_units_own_every_weight_of_the_layers_but_norms_scales_and_output_biases(form):
    model = make_form(form)
    groups = Anatomy.of(model).groups
    owned = {id(p): part for g in groups for m in g.members for p, part in unit_parameters(model, m)}
    left = [
        (name, parameter)
        for stack in Anatomy.of(model).stacks
        for name, parameter in stack.layers.named_parameters()
        if id(parameter) not in owned
    ]
    assert left and all(parameter.ndim == 1 for _, parameter in left)
    assert owned.keys() <= {id(p) for stack in Anatomy.of(model).stacks for p in stack.layers.parameters()}
    hidden = Anatomy.of(model).stacks[0].width
    own = ("q_norm", "k_norm")  # Qwen and Gemma: one for all heads
    assert all(len(parameter) == hidden or any(norm in name for norm in own) for name, parameter in left)
    for group in groups:
        for member in group.members:
            for parameter, part in unit_parameters(model, member):
                rows = [part.rows(torch.tensor([unit]), parameter).tolist() for unit in range(group.units)]
                assert sorted(row for unit in rows for row in unit) == list(range(parameter.shape[part.dim]))
                by_unit = [parameter.index_select(part.dim, torch.tensor(unit)).abs().sum() for unit in rows]
                assert_close(part.by_unit(parameter).abs().sum(1), torch.stack(by_unit), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_dense_macs_are_what_the_flop_counter_sees(form):
    """Each tower of CLIP at its own length: 9 tokens, and 16 patches with the class token."""
    model, inputs, length = make_form(form), form_inputs(form, side=None), 9
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"][:, :length]  # no end token: CLIP takes the last
        del inputs["attention_mask"]
    elif "pixel_values" in inputs:
        length = average_length([], model) + (form == "deit")  # whose token of distillation is not counted
    for key in ("decoder_input_ids", "encoder_hidden_states"):
        if key in inputs:
            inputs[key] = inputs[key].repeat_interleave(2, 1)[:, :length]
    if "input_features" in inputs:
        length = average_length([], model)
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].repeat_interleave(2, 1)[:, :length]
    inputs = {key: value[:1] for key, value in inputs.items()}
    whole = total_cost(model, "macs", length)
    assert whole == measured_macs(model, inputs)
    small = prune(model, config(ratio=0.4, importance="random", round_to=1), form_batches(form))
    assert total_cost(small, "macs", length) == measured_macs(small, inputs) < whole


@pytest.mark.parametrize("form", LOSSES)
def test_taylor_finds_units_that_do_nothing(form):
    """Half of the units of each group are cut in the dense model; removing them changes nothing."""
    dense = make_form(form)
    good = {group: tuple(range(0, group.units, 2)) for group in Anatomy.of(dense).groups}
    zero_units(dense, good)
    scores = taylor(dense, list(good), batches=form_batches(form), length=8)
    for group, units in good.items():
        useless = [unit for unit in range(group.units) if unit not in units]
        assert scores[group][useless].max() == 0 < scores[group].max()


@pytest.mark.cover
@pytest.mark.parametrize(
    ("form", "kind"),
    selected(
        [(form, kind) for form in FORMS for kind in ("local", "linear", "hedgehog")],
        lambda form, kind: kind == "hedgehog" or form in ("bert", "llama", "t5"),
    ),
)
def test_converted_attention_stays_and_its_learned_parts_shrink(form, kind, tmp_path):
    settings = {"hedgehog": {"kind": "linear", "feature_map": "hedgehog"}, "local": {"kind": "local", "window": 2}}
    attention = AttentionConfig(**settings.get(kind, {"kind": kind}))
    model, inputs = make_form(form), form_inputs(form)
    if family_of(model.config).relative_bias and kind != "local":
        pytest.skip("T5's bias has no place in it")
    dense = convert_attention(model, attention)
    importance = "taylor" if form in LOSSES else "random"
    small = prune(dense, config(ratio=0.4, importance=importance, round_to=1), form_batches(form))
    assert type(small) is type(dense) and small.num_parameters() < dense.num_parameters()
    zero_units(masked := copy.deepcopy(dense), kept_parts(dense, small))
    assert_close(real_logits(small, inputs), real_logits(masked, inputs), 1e-5)
    small.save_pretrained(tmp_path)
    loaded = auto_class(form).from_pretrained(tmp_path)
    assert torch.equal(real_logits(loaded, inputs), real_logits(small, inputs))


@pytest.mark.parametrize("name", CASES)
def test_a_student_keeps_the_chosen_layers(name, tmp_path):
    """Cut by hand, the teacher gives the same; what depends on the layer (windows, scalings) goes with it."""
    fields = CASES[name].own_window[0] if CASES[name].own_window else {}
    teacher, inputs = make_model(name, **fields), make_inputs(name, CASES[name].paddings[0])
    inputs |= {"use_cache": False} if name in (*CAUSAL, *TWO_STACKS) else {}
    student = build_student(teacher, [0, 2])
    assert set(depths(student).values()) == {2} and type(student) is type(teacher)
    by_hand = copy.deepcopy(teacher)
    for stack in Anatomy.of(by_hand).stacks:
        del stack.layers[1]
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
    dense = make_model("modernbert")
    with pytest.raises(ConfigError, match="first layer"):
        build_student(dense, [1, 2])
    for parameter in dense.model.layers[0].parameters():
        parameter.data.mul_(1e-3)  # the favourite to leave
    small = prune(dense, config(ratio=0.6, granularity="layer"))
    assert block_of(small.config).kept_layers["encoder"] == (0,)
    with pytest.raises(ConfigError, match=r"At most 0\.6"):
        prune(dense, config(ratio=0.7, granularity="layer"))


@pytest.mark.parametrize("form", FORMS)
def test_the_report_counts_what_is_left(form):
    """Query heads and neurons of each layer, in a report's table of the structure."""
    dense = make_form(form)
    plan = {group: tuple(range(1 + i % group.units)) for i, group in enumerate(Anatomy.of(dense).groups)}
    small = apply_plan(Anatomy.of(dense), PruningPlan(units={group.name: kept for group, kept in plan.items()}))
    group_size = {stack.name: stack.group_size for stack in Anatomy.of(dense).stacks}
    expected = {}
    for group, kept in plan.items():
        for layer in group.layers:
            factor = group_size[group.stack] if group.kind == "heads" else 1
            expected[group.stack, layer, group.kind] = (len(kept) * factor, group.units * factor)
    for row in structure(dense, small):
        assert (row.heads, row.original_heads) == expected[row.stack, row.layer, "heads"]
        assert (row.neurons, row.original_neurons) == expected[row.stack, row.layer, "neurons"]


def test_each_tower_of_clip_has_its_own_sizes(tmp_path):
    """Neurons of one tower are said by its own config, other numbers in each layer by the block."""
    dense, inputs = make_form("clip"), form_inputs("clip")
    groups = [group for group in Anatomy.of(dense).groups if group.kind == "neurons"]
    assert {group.stack for group in groups} == {"text", "vision"}
    text = {group.name: tuple(range(8)) for group in groups if group.stack == "text"}
    small = apply_plan(Anatomy.of(dense), PruningPlan(units=text))
    assert type(small) is type(dense)
    assert (small.config.text_config.intermediate_size, small.config.vision_config.intermediate_size) == (8, 32)
    kept = [group for group in groups if group.stack == "vision" and group.layers[0] != 1]
    vision = {group.name: tuple(range(8 + group.layers[0])) for group in kept}
    small = apply_plan(Anatomy.of(dense), PruningPlan(units=text | vision, layers={"vision": (0, 2)}))
    assert small.config.efficient["stacks"] == {"vision": {"neurons": [8, 10]}}
    assert (small.config.text_config.num_hidden_layers, small.config.vision_config.num_hidden_layers) == (3, 2)
    with pytest.raises(UnsupportedModelError, match="part of a converted or pruned model"):
        small.vision_model.save_pretrained(tmp_path / "part")
    small.set_attn_implementation("eager")
    small.save_pretrained(tmp_path)
    loaded = auto_class("clip").from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(**inputs)[0], small(**inputs)[0])


def test_the_loss_of_two_towers_is_that_of_their_training():
    model, inputs = make_form("clip"), form_inputs("clip")
    assert_close(model_loss(model, inputs) / 2, model(**inputs, return_loss=True).loss, 1e-6)
