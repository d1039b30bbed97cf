"""What cannot be converted in memory is refused with the reason; what some kinds or parts can keep is kept."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import TrainingArguments

from hf_efficient import (
    AttentionConfig,
    ConfigError,
    UnsupportedModelError,
    extend_positions,
    transfer_attention,
)
from hf_efficient.attention.dispatch import NAME

from ..families import VOCABULARY
from ..helpers import assert_close
from .in_memory import (
    IMAGE,
    LINEAR,
    MBART,
    NARROW,
    SIZES,
    TEXT,
    TOKENS,
    WIDE,
    convert_attention,
    kinds,
    make,
    randomize,
)

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
