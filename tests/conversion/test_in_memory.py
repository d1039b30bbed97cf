"""Models that are converted in memory: what is left where nothing can be derived."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from hf_efficient import (
    AttentionConfig,
    ConfigError,
    UnsupportedModelError,
)
from hf_efficient.attention.dispatch import ATTACHED, NAME
from hf_efficient.models.families import FAMILIES

from ..helpers import assert_close
from .in_memory import (
    FULL,
    GENERATING,
    LINEAR,
    MODELS,
    NARROW,
    WIDE,
    convert_attention,
    kinds,
    make,
    make_inputs,
    real,
)


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_over_everything_changes_nothing_and_a_small_one_does(name, side):
    model, inputs = make(name), make_inputs(name, side)
    expected, wide, narrow = real(model, inputs), convert_attention(model, WIDE), convert_attention(model, NARROW)
    assert type(wide) is type(model) and kinds(wide) == ["local"] * MODELS[name][3]
    assert_close(real(wide, inputs), expected, 1e-5)
    assert (real(narrow, inputs) - expected).abs().max() > 1e-3
    assert (real(convert_attention(model, LINEAR), inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_given_model_is_left_alone(name):
    model, inputs = make(name).train(), make_inputs(name)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    implementations = {
        id(module): module.config._attn_implementation for module in model.modules() if has_config(module)
    }
    converted = convert_attention(model, NARROW)
    assert converted.training and all(module.training for module in converted.modules())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert model.training and kinds(model) == [] and model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        if has_config(module):
            assert module.config._attn_implementation == implementations[id(module)] != NAME
    assert not (converted.eval()(**inputs)[0] - model.eval()(**inputs)[0]).abs().max() < 1e-3


def has_config(module):
    return isinstance(getattr(module, "config", None), transformers.PreTrainedConfig)


@pytest.mark.parametrize("name", ["opt", "mbart", "siglip"])
def test_patterns_count_the_layers_in_the_order_of_their_calls(name):
    model, count = make(name), MODELS[name][3]
    mixed = convert_attention(model, {"all": NARROW, "1::2": LINEAR, 0: FULL})
    said = mixed.config.efficient_in_memory
    decoders = {"opt": range(3), "mbart": range(2, 4), "siglip": ()}[name]
    windows = [NARROW.resolve(causal=layer in decoders).to_dict() for layer in range(count)]
    expected = [LINEAR.to_dict() if layer % 2 else windows[layer] for layer in range(1, count)]
    assert list(said.values()) == expected and next(iter(said)).endswith("layers.1.self_attn")
    assert {mixed.get_submodule(f"{key}.{ATTACHED}").config.kind for key in list(said)[::2]} == {"linear"}
    assert len(kinds(mixed)) == len(said)
    assert kinds(convert_attention(model, NARROW, layers=[count - 1])) == ["local"]
    assert kinds(convert_attention(model, FULL)) == []
    with pytest.raises(ConfigError, match=f"this model has layers 0 to {count - 1}"):
        convert_attention(model, NARROW, layers=[count])
    with pytest.raises(ConfigError, match="names no layers"):
        convert_attention(model, {"cross_attention": LINEAR})


@pytest.mark.cover
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("config", [WIDE, NARROW, LINEAR], ids=["wide", "narrow", "linear"])
def test_generation_is_the_same_with_every_cache(name, config):
    model, inputs = make(name), make_inputs(name, "left")
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    converted = convert_attention(model, config)
    tokens = converted.generate(**inputs, **options, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(converted.generate(**inputs, **options, cache_implementation=cache), tokens)
    if config is WIDE:
        assert torch.equal(model.generate(**inputs, **options), tokens)


def test_a_window_of_the_model_stays_where_a_layer_stays():
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model, inputs = make("qwen2", **fields), make_inputs("qwen2", "left")
    expected = real(model, inputs)
    assert_close(real(convert_attention(model, WIDE, layers=[0]), inputs), expected, 1e-5)
    own = AttentionConfig("local", window=4)
    assert_close(real(convert_attention(model, own, layers="1-2"), inputs), expected, 1e-5)
    assert (real(convert_attention(model, WIDE), inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["opt", "wav2vec2"])
def test_it_cannot_be_saved_and_the_error_says_what_can(name, tmp_path):
    model = convert_attention(make(name), NARROW)
    for attempt in (lambda: model.save_pretrained(tmp_path), lambda: model.push_to_hub("someone/something")):
        with pytest.raises(UnsupportedModelError, match=r"converted in memory.*Save the original model") as refused:
            attempt()
        assert "efficient_in_memory" in str(refused.value)
        assert all(family in str(refused.value) for family in FAMILIES)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa' cannot be set"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"converted in memory before.*Convert the original"):
        convert_attention(model, WIDE)


def test_it_trains_copies_and_takes_adapters(tmp_path):
    model, inputs = convert_attention(make("opt"), NARROW), make_inputs("opt")
    expected = model(**inputs)[0]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs)[0], expected)
    with pytest.raises(UnsupportedModelError, match="converted in memory"):
        copied.save_pretrained(tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_precision_and_the_memory_of_the_probe():
    model = convert_attention(make("opt").to(torch.bfloat16), LINEAR)
    assert model(**make_inputs("opt"))[0].dtype == torch.bfloat16
    recorder = AttentionInterface._global_mapping[f"{NAME}_probe"].__self__
    assert not recorder.layers and not recorder.crossed, "the register would keep a copy of the model"
