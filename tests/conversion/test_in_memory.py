"""Models that are converted in memory, or refused with the reason: what is left where nothing can be derived.

Most of the models here can be derived; they stand for those that cannot.
"""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, TrainingArguments

from hf_efficient import (
    AttentionConfig,
    ConfigError,
    UnsupportedModelError,
    extend_positions,
    transfer_attention,
)
from hf_efficient.attention.dispatch import ATTACHED, NAME
from hf_efficient.conversion.in_memory import convert_in_memory
from hf_efficient.conversion.mixing import only
from hf_efficient.models.families import FAMILIES

from ..families import VOCABULARY
from ..helpers import assert_close

FULL = AttentionConfig()
WIDE = AttentionConfig("local", window=64)
NARROW = AttentionConfig("local", window=2)
LINEAR = AttentionConfig("linear")

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
OPT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 32, "word_embed_proj_dim": 16}
SOUND = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
MBART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
MBART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}

# name: (model class, config class, config fields, how many self-attentions)
MODELS = {
    "opt": ("OPTForCausalLM", "OPTConfig", OPT | TOKENS | {"max_position_embeddings": 32}, 3),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | TOKENS | {"max_position_embeddings": 32}, 3),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES | TOKENS | {"max_position_embeddings": 32}, 3),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES | TOKENS | {"num_key_value_heads": 2}, 3),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", MBART | TOKENS | {"decoder_start_token_id": 2}, 4),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SIZES | SOUND | {"num_conv_pos_embedding_groups": 2}, 3),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": SIZES | TOKENS | {"max_position_embeddings": 16}, "vision_config": IMAGE},
        6,
    ),
}
GENERATING = ["opt", "pythia", "phi", "qwen2", "mbart"]


def convert_attention(model, config, layers=None):
    return convert_in_memory(model, only(config, layers) if isinstance(config, AttentionConfig) else config)


def make(name, **changes):
    """A tiny stock model in eval mode with weights large enough to matter."""
    model_class, config_class, fields, _ = MODELS[name]
    return randomize(getattr(transformers, model_class)(getattr(transformers, config_class)(**fields | changes)))


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def make_inputs(name, side=None):
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 200)}
    ids = torch.randint(3, VOCABULARY, (2, 13))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(0, 5) if side == "left" else slice(8, 13)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "mbart":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7))
    return inputs | ({"pixel_values": torch.randn(2, 3, 16, 16)} if name == "siglip" else {})


def real(model, inputs):
    logits, mask = model(**inputs)[0], inputs.get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits


def kinds(model):
    return [module.config.kind for name, module in model.named_modules() if name.endswith(ATTACHED)]


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


SMALL = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
LAYERS = SMALL | {"num_hidden_layers": 2, "intermediate_size": 8}
NO_INTERFACE = "does not call transformers' attention interface, so there is nothing to convert"
REFUSED = {
    "DebertaV2": (LAYERS, NO_INTERFACE),
    "MPNet": (LAYERS, NO_INTERFACE),
    "Bloom": ({"vocab_size": 20, "hidden_size": 8, "n_layer": 2, "n_head": 2}, NO_INTERFACE),
    "MT5": (
        {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 20},
        "bias or its mask",
    ),
}
# What only some kinds have a place for: capped scores, and a bias that comes as a mask.
SOME_KINDS = {
    "Gemma2": (LAYERS | {"num_key_value_heads": 2, "head_dim": 4}, "capped scores"),
    "Swin": ({"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, "4D mask"),
}


@pytest.mark.parametrize("name", SOME_KINDS)
def test_some_kinds_keep_what_others_refuse(name):
    fields, message = SOME_KINDS[name]
    model = randomize(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)))
    inputs = (
        {"pixel_values": torch.randn(1, 3, 32, 32)} if name == "Swin" else {"input_ids": torch.arange(3, 16)[None]}
    )
    expected = model(**inputs)[0]
    wide = convert_attention(model, AttentionConfig("local", window=64, global_tokens=0))
    assert_close(wide(**inputs)[0], expected, 1e-4)
    assert (convert_attention(model, NARROW)(**inputs)[0] - expected).abs().max() > 1e-4
    with pytest.raises(UnsupportedModelError, match=f"'linear' .*{message}"):
        convert_attention(model, LINEAR)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_says_why(name):
    fields, message = REFUSED[name]
    model = randomize(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)))
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=message):
        convert_attention(model, NARROW)
    assert model.config._attn_implementation == implementation


def test_a_model_that_loses_its_mask_is_refused(monkeypatch):
    """Chunks are told to the mask alone; an attention that adds something of its own is found by its output."""
    attention = transformers.models.opt.modeling_opt.OPTAttention
    forward = attention.forward

    def with_extra(self, hidden_states, *args, **kwargs):
        out, weights = forward(self, hidden_states, *args, **kwargs)
        return out * (2 if self.config._attn_implementation.startswith(NAME) else 1), weights

    monkeypatch.setattr(attention, "forward", with_extra)
    with pytest.raises(UnsupportedModelError, match="more than softmax over the keys that are not padding"):
        convert_attention(make("opt"), NARROW)
    fields = LAYERS | {"num_key_value_heads": 2, "head_dim": 4, "attention_chunk_size": 2, "num_local_experts": 2}
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**fields, intermediate_size_mlp=8))
    with pytest.raises(UnsupportedModelError, match=r"no place for its bias or its mask"):
        convert_attention(randomize(llama4), NARROW)


def test_what_has_no_weights_or_is_quantised_is_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        convert_attention(make("opt").to("meta"), NARROW)
    model = make("opt")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        convert_attention(model, NARROW)


def test_a_model_that_made_up_inputs_do_not_fit_is_refused():
    with pytest.raises(UnsupportedModelError, match="could not be run with made-up inputs"):
        convert_attention(transformers.ASTModel(transformers.ASTConfig(**SIZES)), NARROW)


def test_the_models_inside_are_sealed_too(tmp_path):
    model = convert_attention(make("opt"), NARROW)
    for attempt in (lambda: model.model.save_pretrained(tmp_path), lambda: model.model.decoder.push_to_hub("a/b")):
        with pytest.raises(UnsupportedModelError, match="converted in memory"):
            attempt()
    with pytest.raises(UnsupportedModelError, match="cannot be set"):
        model.model.set_attn_implementation("sdpa")
    assert list(tmp_path.iterdir()) == []


def test_two_threads_convert_at_the_same_time():
    jobs = [("opt", NARROW), ("qwen2", LINEAR)] * 6
    models = {name: make(name) for name in ("opt", "qwen2")}
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda job: convert_attention(models[job[0]], job[1]), jobs))
    for (_, config), model in zip(jobs, made, strict=True):
        assert kinds(model) == [config.kind] * 3


def test_a_state_that_changes_its_tensors_is_not_compiled_by_itself():
    assert not convert_attention(make("qwen2"), LINEAR)._valid_auto_compile_criteria({}, None)


def test_what_it_lacks_is_said_in_advance(tmp_path):
    model = convert_attention(make("opt"), AttentionConfig("linear", feature_map="hedgehog"))
    with pytest.raises(ConfigError, match='save_strategy="no"'):
        transfer_attention(model, [], TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(UnsupportedModelError, match=r"in memory \(`convert_attention`\); nothing else"):
        extend_positions(model, 64)


TEXT = SIZES | TOKENS | {"num_key_value_heads": 2}


def llava_next():
    vision = transformers.CLIPVisionConfig(**IMAGE, projection_dim=16)
    config = transformers.LlavaNextConfig(
        text_config=transformers.Qwen2Config(**TEXT), vision_config=vision, image_grid_pinpoints=[[16, 16]]
    )
    return randomize(transformers.LlavaNextModel(config))


def qwen2_audio():
    sound = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}
    config = transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**TEXT).to_dict(),
        audio_config={"model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "max_source_positions": 12} | sound,
    )
    return randomize(transformers.Qwen2AudioForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("make_composite", "missed", "text"),
    [
        (llava_next, r"vision_tower\.encoder", "language_model"),
        (qwen2_audio, "audio_tower", "model.language_model"),
    ],
    ids=["llava_next", "qwen2_audio"],
)
def test_a_tower_that_would_stay_dense_is_named(make_composite, missed, text):
    model = make_composite()
    with pytest.raises(UnsupportedModelError, match=rf"has attention in (model\.)?{missed} too, .* would stay dense"):
        convert_attention(model, NARROW)
    parts = [name for name, _ in model.named_modules() if name.endswith("language_model")]
    text = parts[0]
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 7))}
    named = convert_attention(model, {text: NARROW})
    assert kinds(named) == ["local"] * 3
    assert all(name.startswith(f"{text}.") for name in named.config.efficient_in_memory)
    assert (named(**inputs)[0] - model(**inputs)[0]).abs().max() > 1e-3
    assert_close(convert_attention(model, {text: WIDE})(**inputs)[0], model(**inputs)[0], 1e-5)
    assert kinds(convert_attention(model, {text: {0: LINEAR, 2: NARROW}})) == ["linear", "local"]
    with pytest.raises(ConfigError, match=r"part of the model with self-attention"):
        convert_attention(model, {text: NARROW, f"{text}s": NARROW})
    assert kinds(convert_attention(model.get_submodule(text), NARROW)) == ["local"] * 3


def test_a_whole_model_and_cross_attention_that_nothing_reaches_are_no_towers():
    """MBART's decoder alone has cross attention, which takes states that nobody gives."""
    fields = MBART | TOKENS | {"is_decoder": True, "is_encoder_decoder": False}
    alone = randomize(transformers.MBartForCausalLM(transformers.MBartConfig(**fields)))
    assert kinds(convert_attention(alone, NARROW)) == ["local"] * 2
    assert kinds(convert_attention(make("siglip"), NARROW)) == ["local"] * 6


DIFF = ("DiffLlama", TEXT, "call attention 2 times")
GEMMA3N = TEXT | {
    "head_dim": 4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [32] * 4,
}


def caching(name, fields):
    config = getattr(transformers, f"{name}Config")(**fields)
    class_name = f"{name.removesuffix('Text')}ForCausalLM"
    return randomize(getattr(transformers, class_name)(config))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [DIFF, ("Gemma3nText", GEMMA3N, "use the keys of other layers")],
    ids=["diffllama", "gemma3n"],
)
def test_a_state_that_would_not_be_that_of_its_layer_is_refused(name, fields, message):
    model = caching(name, fields)
    ids = torch.randint(3, VOCABULARY, (1, 9))
    for config in (
        WIDE,
        LINEAR,
        {0: WIDE, 1: AttentionConfig("additive"), 2: LINEAR, **({3: LINEAR} if name != "DiffLlama" else {})},
    ):
        with pytest.raises(UnsupportedModelError, match=rf"decode otherwise from a cache.*{message}") as refused:
            convert_attention(model, config)
        assert "Kinds that keep all keys: strided, lsh, kernel" in str(refused.value)
    keeping = convert_attention(model, AttentionConfig("strided", block_size=2, num_blocks=1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(keeping.generate(ids, **options), keeping.generate(ids, **options, use_cache=False))
    everything = convert_attention(model, AttentionConfig("strided"))
    assert torch.equal(everything.generate(ids, **options), model.generate(ids, **options))


def test_every_output_is_compared(monkeypatch):
    """A pooled output that changes, in a model whose first output does not."""
    model = make("siglip").vision_model
    siglip = type(model)
    forward = siglip.forward

    @functools.wraps(forward)
    def pooled_otherwise(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.config._attn_implementation.startswith(NAME):
            out.pooler_output = out.pooler_output + 1
        return out

    assert kinds(convert_attention(model, NARROW)) == ["local"] * 3
    monkeypatch.setattr(siglip, "forward", pooled_otherwise)
    with pytest.raises(UnsupportedModelError, match=r"more than softmax .*\(pooler_output would change\)"):
        convert_attention(model, NARROW)


def test_an_output_may_begin_with_a_tuple():
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.VitPoseBackboneConfig(image_size=[16, 16], patch_size=[8, 8], **fields)
    model = randomize(transformers.VitPoseBackbone(config))
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).feature_maps
    assert len(expected) and kinds(convert_attention(model, WIDE)) == ["local"] * 2
    for got, wanted in zip(convert_attention(model, WIDE)(**inputs).feature_maps, expected, strict=True):
        assert_close(got, wanted, 1e-4)
    assert (convert_attention(model, LINEAR)(**inputs).feature_maps[0] - expected[0]).abs().max() > 1e-3
