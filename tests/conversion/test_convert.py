"""Whole models before and after `convert_attention`: what must be equal, what must differ, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartForCausalLM,
    BertLMHeadModel,
    GenerationMixin,
    GPT2LMHeadModel,
    RwkvConfig,
)

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, efficient_config
from hf_efficient.attention.dispatch import ATTACHED, ATTENTIONS
from hf_efficient.attention.variant import HeadShape
from hf_efficient.conversion.probe import check_reached
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.classes import auto_classes
from hf_efficient.models.families import FAMILIES

from ..families import (
    CASES,
    CAUSAL,
    HEADS,
    PADDED_CASES,
    TWO_STACKS,
    config_class,
    make_inputs,
    make_model,
    one_layer,
    position_ids,
    real_logits,
)
from ..helpers import assert_close

FULL = AttentionConfig(kind="full")
WIDE = AttentionConfig(kind="local", window=64)
NARROW = AttentionConfig(kind="local", window=2)
LINEAR = AttentionConfig(kind="linear")
WITH_LINEAR = [name for name, family in FAMILIES.items() if not family.relative_bias]
OWN_WINDOW = [(name, side) for name, side in PADDED_CASES if CASES[name].own_window]
STOCK_HEADS = {auto_classes(config_class(name))[auto][1]: name for name, auto in HEADS}


def kinds(model, attention="heads"):
    """The attention kind of each layer of each stack, as the modules have it."""
    found = {}
    for stack in Anatomy.of(model).stacks:
        if attention in stack.attentions:
            path = stack.attentions[attention].module
            modules = [layer.get_submodule(path)._modules.get(ATTACHED) for layer in stack.layers]
            found[stack.name] = ["full" if module is None else module.config.kind for module in modules]
    return found


def generate_logits(model, inputs, **options):
    """Greedy generation; Whisper's own would cut the outputs into segments."""
    if "input_features" in inputs:
        inputs = inputs | {"decoder_input_ids": torch.full((2, 1), model.config.decoder_start_token_id)}
    options |= {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return GenerationMixin.generate(model, **inputs, **options)


def text_of(inputs):
    """What `generate` takes."""
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "input_features") if key in inputs}


@pytest.mark.cover
@pytest.mark.parametrize(("name", "padding"), PADDED_CASES)
def test_a_window_over_the_whole_input_changes_nothing_and_anything_less_does(name, padding):
    model, inputs = make_model(name), make_inputs(name, padding)
    expected = real_logits(model, inputs)
    assert_close(real_logits(convert_attention(model, WIDE), inputs), expected, 1e-5)
    for config in (NARROW, LINEAR) if name in WITH_LINEAR else (NARROW,):
        assert (real_logits(convert_attention(model, config), inputs) - expected).abs().max() > 1e-3, config.kind


def test_linear_attention_has_no_place_for_a_relative_bias():
    for convert in (convert_attention, lambda model, config: efficient_config(model.config, attention=config)):
        with pytest.raises(UnsupportedModelError, match=r"relative position bias.*they see: local, strided, lsh"):
            convert(make_model("t5"), LINEAR)


@pytest.mark.cover
@pytest.mark.parametrize(("head", "name"), STOCK_HEADS.items())
def test_every_head_can_be_converted(head, name):
    model = make_model(name, head, **one_layer(name))
    inputs = make_inputs(name, CASES[name].paddings[0], model)
    assert_close(real_logits(convert_attention(model, WIDE), inputs), real_logits(model, inputs), 1e-5)
    assert (real_logits(convert_attention(model, NARROW), inputs) - real_logits(model, inputs)).abs().max() > 1e-5


@pytest.mark.parametrize("name", CASES)
def test_converting_back_gives_the_original_bit_for_bit(name):
    model, inputs = make_model(name), make_inputs(name, CASES[name].paddings[0])
    for there in (NARROW, {1: NARROW}):
        back = convert_attention(convert_attention(model, there), FULL)
        assert type(back) is type(model)
        assert torch.equal(back(**inputs)[0], model(**inputs)[0])
        assert back.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", CASES)
def test_the_given_model_is_left_alone(name):
    model, inputs = make_model(name), make_inputs(name)
    model.train()
    before, config, expected = copy.deepcopy(model.state_dict()), model.config.to_dict(), model(**inputs)[0]
    converted = convert_attention(model, NARROW)
    assert converted.training and model.training and all(module.training for module in converted.modules())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert model.config.to_dict() == config and type(model) is CASES[name].head
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_layers_can_mix(name):
    third = LINEAR if name in WITH_LINEAR else AttentionConfig(kind="local", window=1)
    model, inputs = make_model(name), make_inputs(name)
    mixed = convert_attention(model, {0: FULL, 1: NARROW, 2: third})
    assert set(map(tuple, kinds(mixed).values())) == {("full", "local", third.kind)}
    assert "local" not in str(kinds(mixed, "cross_heads"))
    out = mixed(**inputs)[0]
    for other in ({1: NARROW}, {2: third}):
        assert not torch.allclose(out, convert_attention(model, other)(**inputs)[0], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_only_the_named_layers_are_converted_and_the_others_keep_theirs(name):
    model = make_model(name)
    first = convert_attention(model, NARROW, layers=[0, 2])
    assert set(map(tuple, kinds(first).values())) == {("local", "full", "local")}
    second = convert_attention(first, {1: WIDE, 2: FULL})
    assert set(map(tuple, kinds(second).values())) == {("local", "local", "full")}
    kept = second.config.block().stacks[next(iter(kinds(second)))].attention
    assert [replace(one, global_tokens=None) for one in kept] == [NARROW, WIDE, FULL]


@pytest.mark.parametrize("name", CASES)
def test_an_efficient_config_and_a_conversion_agree(name):
    model, inputs = make_model(name), make_inputs(name)
    config = efficient_config(model.config, attention={1: NARROW}, num_labels=model.config.num_labels)
    made = type(convert_attention(model, NARROW))(config).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(made(**inputs)[0], convert_attention(model, {1: NARROW})(**inputs)[0])


def test_an_efficient_config_of_a_folder_takes_loading_options_and_changes(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    config = efficient_config(str(tmp_path), attention=NARROW, layers=[1], num_labels=7, classifier_dropout=0.5)
    assert config.num_labels == 7 and config.classifier_dropout == 0.5
    assert [one.kind for one in config.block().stacks["encoder"].attention] == ["full", "local", "full"]
    assert efficient_config(str(tmp_path)).block().is_trivial()


@pytest.mark.parametrize(("name", "side"), OWN_WINDOW)
def test_a_window_of_the_model_stays_where_a_layer_stays_and_goes_where_it_is_converted(name, side):
    fields, window = CASES[name].own_window
    model, inputs = make_model(name, **fields), make_inputs(name, side)
    expected = real_logits(model, inputs)
    types = getattr(model.config, "layer_types", ["sliding_attention"] * 3)
    own = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
    other = sorted({0, 1, 2} - set(own))
    same = convert_attention(model, AttentionConfig("local", window=window), layers=own)
    assert_close(real_logits(same, inputs), expected, 1e-5)
    if other:
        assert_close(real_logits(convert_attention(model, WIDE, layers=other), inputs), expected, 1e-5)
    free = make_model(name)
    free.load_state_dict(model.state_dict())
    assert_close(real_logits(convert_attention(model, WIDE), inputs), real_logits(free, inputs), 1e-5)
    assert (real_logits(free, inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name, _ in OWN_WINDOW[::2] if name in CAUSAL])
@pytest.mark.parametrize("config", [WIDE, NARROW, LINEAR], ids=["wide", "narrow", "linear"])
def test_a_cache_for_a_window_of_the_model_does_not_cut_what_a_converted_layer_sees(name, config):
    model = make_model(name, **CASES[name].own_window[0])
    inputs, options = make_inputs(name, "left"), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for layers in ("all", "2", "0"):
        converted = convert_attention(model, config, layers=layers)
        expected = converted.generate(**inputs, **options, use_cache=False)
        for cache in ("dynamic", "static"):
            assert torch.equal(converted.generate(**inputs, **options, cache_implementation=cache), expected)


GENERATING = [*CAUSAL, *TWO_STACKS]
CACHES = [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}]


@pytest.mark.cover
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("options", CACHES, ids=["dynamic", "static", "beams", "no cache"])
def test_generation_with_a_wide_window_is_unchanged(name, options):
    model = make_model(name)
    wide = convert_attention(model, WIDE)
    for padding in ("left", None):
        inputs = text_of(make_inputs(name, padding))
        if padding is None:
            inputs.pop("attention_mask", None)
        options = options | {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(wide.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.cover
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("config", [AttentionConfig(kind="local", window=3, global_tokens=2), LINEAR])
def test_decoding_step_by_step_gives_what_one_pass_gives(name, config):
    """With a cache of either kind, the logits of each new token are those of a forward over the whole text."""
    if name not in WITH_LINEAR and config is LINEAR:
        config = NARROW
    model = convert_attention(make_model(name), config)
    inputs = text_of(make_inputs(name, "left"))
    for cache in ("dynamic", "static"):
        out = generate_logits(model, inputs, max_new_tokens=8, min_new_tokens=8, cache_implementation=cache)
        if name in TWO_STACKS:
            whole = model(**inputs, decoder_input_ids=out.sequences).logits[:, :-1]
        else:
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
            whole = model(out.sequences, attention_mask=mask, **position_ids(model, mask)).logits[:, -9:-1]
        assert_close(torch.stack(out.logits, 1), whole[:, -8:], 2e-5)


def test_a_narrow_window_generates_something_else():
    model, inputs = make_model("llama"), make_inputs("llama", "left")
    narrow = convert_attention(model, NARROW)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert not torch.equal(narrow.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("name", TWO_STACKS)
def test_cross_attention_is_converted_where_it_is_asked_for(name):
    model, inputs = make_model(name), make_inputs(name, CASES[name].paddings[0])
    crossed = convert_attention(model, {"cross_attention": LINEAR})
    assert kinds(crossed, "cross_heads") == {"decoder": ["linear"] * 3}
    assert kinds(crossed) == {"encoder": ["full"] * 3, "decoder": ["full"] * 3}
    assert (crossed(**inputs)[0] - model(**inputs)[0]).abs().max() > 1e-3
    some = convert_attention(model, {"cross_attention": {1: LINEAR}, "encoder": NARROW})
    assert kinds(some, "cross_heads") == {"decoder": ["full", "linear", "full"]}
    assert kinds(some) == {"encoder": ["local"] * 3, "decoder": ["full"] * 3}
    back = convert_attention(some, {"cross_attention": FULL, "encoder": FULL})
    assert torch.equal(back(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("name", TWO_STACKS)
def test_converted_cross_attention_decodes_step_by_step(name):
    model = convert_attention(make_model(name), {"cross_attention": LINEAR, "decoder": NARROW})
    inputs = text_of(make_inputs(name, "right"))
    out = generate_logits(model, inputs, max_new_tokens=6, min_new_tokens=6)
    whole = model(**inputs, decoder_input_ids=out.sequences).logits[:, -7:-1]
    assert_close(torch.stack(out.logits, 1), whole, 1e-5)


DECODERS = {
    "bert": (BertLMHeadModel, {"is_decoder": True, "add_cross_attention": True}),
    "gpt2": (GPT2LMHeadModel, {"add_cross_attention": True}),
    "bart": (BartForCausalLM, {}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_alone_can_have_its_cross_attention_converted(name):
    head, fields = DECODERS[name]
    model, inputs = make_model(name, head, **fields), make_inputs(name)
    inputs = text_of(inputs) | {"encoder_hidden_states": torch.randn(2, 9, 16)}
    converted = convert_attention(model, {"cross_attention": LINEAR})
    assert list(kinds(converted, "cross_heads").values()) == [["linear"] * 3]
    assert (converted(**inputs)[0] - model(**inputs)[0]).abs().max() > 1e-3
    wide = convert_attention(model, WIDE)
    assert_close(wide(**inputs)[0], model(**inputs)[0], 1e-5)


def test_cross_attention_needs_a_model_that_has_it_and_a_kind_that_can_serve_it():
    with pytest.raises(ConfigError, match="no cross attention"):
        convert_attention(make_model("bert"), {"cross_attention": LINEAR})
    with pytest.raises(UnsupportedModelError, match="queries and keys of one sequence"):
        convert_attention(make_model("bart"), {"cross_attention": NARROW})


def test_attention_that_is_no_softmax_of_products_cannot_be_converted():
    with pytest.raises(UnsupportedModelError, match=r"encoder of rwkv models cannot be converted: its heads are not"):
        efficient_config(RwkvConfig(), attention=NARROW)


def test_what_is_no_transformers_model_is_refused():
    adapted = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"got PeftModel\. .*merge_and_unload"):
        convert_attention(adapted, NARROW)
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        convert_attention(nn.Linear(2, 2), NARROW)


def test_a_quantised_model_is_refused():
    model = make_model("bert")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        convert_attention(model, NARROW)


def test_bad_requests_are_refused_with_the_way_out():
    model = make_model("bert")
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        AttentionConfig(kind="locla")
    with pytest.raises(ConfigError, match="does not exist: this model has layers 0 to 2"):
        convert_attention(model, NARROW, layers=[3])
    for layers in ([-1], [True]):
        with pytest.raises(ConfigError, match="names no layers"):
            convert_attention(model, NARROW, layers=layers)
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        convert_attention(model, {3: NARROW})
    with pytest.raises(ConfigError, match="not both"):
        convert_attention(model, {0: NARROW}, layers=[0])
    with pytest.raises(ConfigError, match=r"Layer 1: expected an AttentionConfig"):
        convert_attention(model, {1: "local"})
    with pytest.raises(ConfigError, match="Expected an AttentionConfig or a mapping"):
        convert_attention(model, "local")


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_ignores_the_interface_is_refused(name, monkeypatch):
    model = make_model(name)
    stack = Anatomy.of(model).stacks[0]
    attention = type(stack.layers[0].get_submodule(stack.entry.attention.module))

    outputs = 3 if name == "t5" else 2

    def own_attention(self, hidden_states, *args, **kwargs):
        return (hidden_states, None, None)[:outputs]

    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", own_attention)
        with pytest.raises(UnsupportedModelError, match=r"no effect on .*efficient_attention.*attention interface"):
            convert_attention(model, NARROW)
    assert kinds(convert_attention(model, NARROW))[stack.name] == ["local"] * 3


def test_the_check_needs_every_converted_layer_reached():
    model = convert_attention(make_model("bert"), NARROW, layers=[0])
    stray = ATTENTIONS["local"](NARROW, HeadShape(4, 4, 4))
    model.dropout.add_module(ATTACHED, stray)
    with pytest.raises(UnsupportedModelError, match=r"no effect on dropout\.efficient_attention"):
        check_reached(model)
    assert not model.training


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_model_without_values_is_refused_before_any_work(name):
    whole, part = make_model(name).to("meta"), make_model(name)
    Anatomy.of(part).stacks[0].layers[1].to("meta")
    for model in (whole, part):
        with pytest.raises(
            UnsupportedModelError, match=r"have no values \(meta device\), such as '.*Load it whole first"
        ):
            convert_attention(model, NARROW)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_converted_in_inference_mode_can_be_trained(name):
    hedgehog, inputs = AttentionConfig("linear", feature_map="hedgehog"), make_inputs(name)
    model = make_model(name)
    with torch.inference_mode():
        converted = convert_attention(model, hedgehog)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    converted.train()(**inputs)[0].square().mean().backward()
    assert all(one.grad is not None for key, one in converted.named_parameters() if "query_map" in key)
    assert torch.equal(convert_attention(model, hedgehog)(**inputs)[0], converted.eval()(**inputs)[0])
