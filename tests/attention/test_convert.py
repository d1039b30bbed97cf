"""Whole models before and after `convert_attention`: what must be equal, what must differ, what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, MPNetConfig, MPNetModel

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, efficient_config
from hf_efficient.attention.convert import check_reached
from hf_efficient.attention.dispatch import ATTACHED, ATTENTIONS
from hf_efficient.families import FAMILIES, find_stacks
from hf_efficient.models.building import auto_classes

from ..families import CASES, HEADS, PADDED_CASES, make_inputs, make_model, real_logits
from ..helpers import assert_close

FULL = AttentionConfig(kind="full")
WIDE = AttentionConfig(kind="local", window=64)
NARROW = AttentionConfig(kind="local", window=2)
LINEAR = AttentionConfig(kind="linear")
WITH_LINEAR = [name for name, family in FAMILIES.items() if not family.relative_bias]


def kinds(model):
    """The attention kind of each layer of each stack, as the modules have it."""
    found = {}
    for stack, layers in find_stacks(model):
        modules = [layer.get_submodule(stack.attention.module)._modules.get(ATTACHED) for layer in layers]
        found[stack.name] = ["full" if module is None else module.config.kind for module in modules]
    return found


@pytest.mark.parametrize(("name", "padding"), PADDED_CASES)
def test_a_window_over_the_whole_input_changes_nothing(name, padding):
    model, inputs = make_model(name), make_inputs(name, padding)
    converted = convert_attention(model, WIDE)
    assert_close(real_logits(converted, inputs), real_logits(model, inputs), 1e-5)


@pytest.mark.parametrize(("name", "padding"), PADDED_CASES)
def test_a_small_window_changes_the_output(name, padding):
    model, inputs = make_model(name), make_inputs(name, padding)
    converted = convert_attention(model, NARROW)
    assert (real_logits(converted, inputs) - real_logits(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_LINEAR)
def test_linear_attention_changes_the_output(name):
    model, inputs = make_model(name), make_inputs(name, CASES[name].paddings[0])
    converted = convert_attention(model, LINEAR)
    assert (real_logits(converted, inputs) - real_logits(model, inputs)).abs().max() > 1e-3


def test_linear_attention_has_no_place_for_a_relative_bias():
    for convert in (convert_attention, lambda model, config: efficient_config(model.config, attention=config)):
        with pytest.raises(UnsupportedModelError, match=r'relative position bias.*Use kind="local"'):
            convert(make_model("t5"), LINEAR)


@pytest.mark.parametrize(("name", "auto_name"), HEADS)
def test_every_head_can_be_converted(name, auto_name):
    model = make_model(name, auto_classes(FAMILIES[name])[auto_name][1])
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
    others = [convert_attention(model, one) for one in ({1: NARROW}, {2: third}, {0: NARROW, 1: third})]
    for other in others:
        assert not torch.allclose(mixed(**inputs)[0], other(**inputs)[0], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_only_the_named_layers_are_converted_and_the_others_keep_theirs(name):
    model = make_model(name)
    first = convert_attention(model, NARROW, layers=[0, 2])
    assert set(map(tuple, kinds(first).values())) == {("local", "full", "local")}
    second = convert_attention(first, {1: WIDE, 2: FULL})
    assert set(map(tuple, kinds(second).values())) == {("local", "local", "full")}
    assert second.config.block().stacks[next(iter(kinds(second)))].attention == (NARROW, WIDE, FULL)


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


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}])
def test_generation_with_a_wide_window_is_unchanged(name, options):
    model = make_model(name)
    wide = convert_attention(model, WIDE)
    for padding in ("left", None):
        inputs = {
            key: value for key, value in make_inputs(name, padding).items() if key in ("input_ids", "attention_mask")
        }
        if padding is None:
            del inputs["attention_mask"]
        options = options | {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        assert torch.equal(wide.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("config", [NARROW, AttentionConfig(kind="local", window=3, global_tokens=2), LINEAR])
def test_decoding_step_by_step_gives_what_one_pass_gives(name, config):
    """With a cache of either kind, the logits of each new token are those of a forward over the whole text."""
    if name == "t5" and config is LINEAR:
        config = WIDE
    model = convert_attention(make_model(name), config)
    inputs = {key: value for key, value in make_inputs(name, "left").items() if key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    for cache in ("dynamic", "static"):
        out = model.generate(**inputs, **options, do_sample=False, cache_implementation=cache)
        if name == "llama":
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            whole = model(out.sequences, attention_mask=mask, position_ids=positions).logits[:, -9:-1]
        else:
            whole = model(**inputs, decoder_input_ids=out.sequences).logits[:, :-1]
        assert_close(torch.stack(out.logits, 1), whole, 1e-5)


def test_a_narrow_window_generates_something_else():
    model, inputs = make_model("llama"), make_inputs("llama", "left")
    narrow = convert_attention(model, NARROW)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert not torch.equal(narrow.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(DebertaV2Config, DebertaV2Model), (MPNetConfig, MPNetModel)]
)
def test_a_family_outside_the_table_is_refused(config_class, model_class):
    config = config_class(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(UnsupportedModelError, match=r"not in the table of families\. Known: bert, llama, t5, vit"):
        convert_attention(model_class(config), NARROW)
    with pytest.raises(UnsupportedModelError, match="not in the table"):
        efficient_config(config, attention=NARROW)


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
    for layers in ([3], [-1], [True], ["0"]):
        with pytest.raises(ConfigError, match="does not exist: this model has layers 0 to 2"):
            convert_attention(model, NARROW, layers=layers)
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        convert_attention(model, {3: NARROW})
    with pytest.raises(ConfigError, match="not both"):
        convert_attention(model, {0: NARROW}, layers=[0])
    with pytest.raises(ConfigError, match="Layer 1: expected an AttentionConfig"):
        convert_attention(model, {1: "local"})
    with pytest.raises(ConfigError, match="Expected an AttentionConfig or a dict"):
        convert_attention(model, "local")


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_ignores_the_interface_is_refused(name, monkeypatch):
    model = make_model(name)
    stack, layers = next(find_stacks(model))
    attention = type(layers[0].get_submodule(stack.attention.module))

    def own_attention(self, hidden_states, *args, **kwargs):
        return (hidden_states, None, None)[: 3 if name == "t5" else 2]

    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", own_attention)
        with pytest.raises(UnsupportedModelError, match=r"no effect on .*efficient_attention.*attention interface"):
            convert_attention(model, NARROW)
    assert kinds(convert_attention(model, NARROW))[stack.name] == ["local"] * 3


def test_the_check_needs_every_converted_layer_reached():
    model = convert_attention(make_model("bert"), NARROW, layers=[0])
    stray = ATTENTIONS["local"](NARROW)
    model.dropout.add_module(ATTACHED, stray)
    with pytest.raises(UnsupportedModelError, match=r"no effect on dropout\.efficient_attention"):
        check_reached(model)
    assert not model.training
