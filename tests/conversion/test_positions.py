"""Longer inputs than the checkpoint was made for."""

import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianModel,
    MarianMTModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, extend_positions
from hf_efficient.data.bundled import bundled_model
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.models.registry import token_limit

from ..families import VOCABULARY, make_inputs, make_model
from ..helpers import assert_close

LOCAL = AttentionConfig(kind="local", window=8, global_tokens=1)


def test_learned_positions_are_tiled():
    model = convert_attention(make_model("bert"), LOCAL)
    longer = extend_positions(model, 100)
    old, new = (one.bert.embeddings.position_embeddings.weight for one in (model, longer))
    assert new.shape == (100, 16) and longer.config.max_position_embeddings == 100
    assert torch.equal(new[:32], old)
    for row in (32, 40, 64, 99):
        assert torch.equal(new[row], old[row % 32])
    assert not torch.equal(new[33], old[0])
    assert model.config.max_position_embeddings == 32 and old.shape == (32, 16)


def test_learned_positions_are_interpolated():
    model = make_model("bert")
    old = model.bert.embeddings.position_embeddings.weight
    new = extend_positions(model, 94, method="interpolate").bert.embeddings.position_embeddings.weight
    assert new.shape == (94, 16)
    assert torch.equal(new[::3], old)  # 93 steps over 31: every third row lies on an old one
    assert_close(new[1], old[0] + (old[1] - old[0]) / 3, 1e-6)
    assert_close(new[92], old[31] + (old[30] - old[31]) / 3, 1e-6)
    tiled = extend_positions(model, 94).bert.embeddings.position_embeddings.weight
    assert not torch.equal(tiled, new)
    uneven = extend_positions(model, 33, method="interpolate").bert.embeddings.position_embeddings.weight
    assert_close(uneven[16], (old[15] + old[16]) / 2, 1e-6)
    assert torch.equal(uneven[0], old[0]) and torch.equal(uneven[-1], old[-1])


def test_a_longer_model_runs_at_its_length_and_agrees_on_short_inputs(tmp_path):
    model = convert_attention(make_model("bert"), LOCAL)
    longer = extend_positions(model, 100)
    inputs = make_inputs("bert", "right")
    assert torch.equal(longer(**inputs)[0], model(**inputs)[0])
    ids = torch.randint(3, VOCABULARY, (1, 100))
    with pytest.raises(RuntimeError):
        model(input_ids=ids)
    logits = longer(input_ids=ids)[0]
    assert logits.shape == (1, 100, 2) and torch.isfinite(logits).all()
    longer.save_pretrained(tmp_path)
    assert torch.equal(type(longer).from_pretrained(tmp_path)(input_ids=ids)[0], logits)


def test_a_stock_model_stays_a_stock_model():
    longer = extend_positions(make_model("bert", BertForMaskedLM), 33)
    assert type(longer) is BertForMaskedLM
    assert longer(input_ids=torch.full((1, 33), 5)).logits.shape == (1, 33, VOCABULARY)


def test_extending_and_converting_may_come_in_any_order():
    model, ids = make_model("bert"), torch.randint(3, VOCABULARY, (2, 50))
    first = extend_positions(convert_attention(model, LOCAL), 64)
    second = convert_attention(extend_positions(model, 64), LOCAL)
    assert torch.equal(first(input_ids=ids)[0], second(input_ids=ids)[0])


SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3}
BERT_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART_SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART_SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
# Each: a model for texts of 32 tokens; its tables; the rows that stand before the first position.
TABLES = {
    "roberta": (
        lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, **BERT_SIZES, max_position_embeddings=34, pad_token_id=1)),
        ("roberta.embeddings.position_embeddings",),
        2,
    ),
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(**SMALL, **BART_SIZES, max_position_embeddings=32, pad_token_id=1)
        ),
        ("model.encoder.embed_positions", "model.decoder.embed_positions"),
        2,
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
        ("transformer.wpe",),
        0,
    ),
}


@pytest.mark.parametrize("method", ["tile", "interpolate"])
@pytest.mark.parametrize("name", TABLES)
def test_rows_before_the_first_position_stay(name, method):
    make, tables, first = TABLES[name]
    model = make().eval()
    assert token_limit(model.config) == 32
    longer = extend_positions(model, 80, method=method)
    assert token_limit(longer.config) == 80
    for table in tables:
        old, new = (one.get_submodule(table).weight for one in (model, longer))
        assert len(old) == 32 + first and len(new) == 80 + first
        assert torch.equal(new[: first + 1], old[: first + 1])
        if method == "tile":
            assert torch.equal(new[first + 32 : first + 64], old[first:])
        else:
            assert torch.equal(new[-1], old[-1])
    ids = torch.randint(4, VOCABULARY, (1, 80))
    assert torch.isfinite(longer(input_ids=ids).logits).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    short = ids[:, :20]
    same = torch.equal(longer(input_ids=short).logits, model(input_ids=short).logits)
    assert same == (method == "tile")


def test_positions_that_are_a_formula_go_on():
    config = MarianConfig(**SMALL, **BART_SIZES, max_position_embeddings=32, pad_token_id=0)
    longer = extend_positions(MarianMTModel(config).eval(), 80)
    table = longer.model.encoder.embed_positions.weight
    assert table.shape == (80, 16)
    assert table[70, 0].item() == pytest.approx(math.sin(70), abs=1e-5)
    ids = torch.randint(4, VOCABULARY, (1, 80))
    assert torch.isfinite(longer(input_ids=ids, decoder_input_ids=ids).logits).all()


def test_rotary_positions_only_raise_the_length_in_the_config():
    model = make_model("llama")
    longer = extend_positions(model, 128)
    assert longer.config.max_position_embeddings == 128 and model.config.max_position_embeddings == 64
    inputs = make_inputs("llama")
    assert torch.equal(longer(**inputs).logits, model(**inputs).logits)


def llama(**fields):
    """Heads of 16 dimensions: enough frequencies that they are scaled differently."""
    return make_model("llama", head_dim=16, **fields)


def frequencies(model):
    return model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("config", [AttentionConfig(), LOCAL], ids=["full", "local"])
@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn"])
def test_rotary_positions_are_scaled_as_transformers_says(rope, config, tmp_path):
    model = convert_attention(llama(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), config)
    longer = extend_positions(model, 256, rope=rope)
    parameters = longer.config.rope_parameters
    assert parameters["rope_type"] == rope and parameters["factor"] == 4.0 and parameters["rope_theta"] == 500.0
    assert token_limit(longer.config) == 256 and token_limit(model.config) == 64
    assert dummy_inputs(longer, 1, 256)["input_ids"].shape == (1, 256)
    with pytest.raises(ConfigError, match="has 256 positions"):
        dummy_inputs(longer, 1, 257)
    ids = torch.randint(3, VOCABULARY, (1, 200))
    logits = longer(input_ids=ids).logits
    assert not torch.allclose(logits, extend_positions(model, 256)(input_ids=ids).logits)
    longer.save_pretrained(tmp_path)
    assert torch.equal(type(longer).from_pretrained(tmp_path)(input_ids=ids).logits, logits)


def test_each_scaling_does_its_own():
    model = llama()
    plain = frequencies(model)
    assert torch.equal(frequencies(extend_positions(model, 256, rope="linear")), plain / 4)
    yarn = frequencies(extend_positions(model, 256, rope="yarn"))
    assert torch.equal(yarn[0], plain[0]) and yarn[-1].item() == pytest.approx(plain[-1].item() / 4)
    dynamic = extend_positions(model, 256, rope="dynamic")
    ids = torch.randint(3, VOCABULARY, (1, 200))
    short = ids[:, :64]
    assert torch.equal(dynamic(input_ids=short).logits, model(input_ids=short).logits)
    assert not torch.allclose(dynamic(input_ids=ids).logits, model(input_ids=ids).logits)
    assert dynamic.config.max_position_embeddings == 64  # from here on it scales


def test_rope_parameters_of_ones_own():
    given = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    longer = extend_positions(llama(), 256, rope=given)
    assert longer.config.rope_parameters == given and longer.config.max_position_embeddings == 256


def test_rotary_positions_that_cannot_be_scaled_by_name():
    scaled = extend_positions(llama(), 128, rope="linear")
    with pytest.raises(UnsupportedModelError, match=r"scaled already \(rope_type 'linear'\).*Give rope as a dict"):
        extend_positions(scaled, 256, rope="linear")
    assert extend_positions(scaled, 256).config.rope_parameters["factor"] == 2.0
    config = ModernBertConfig(**SMALL, **BERT_SIZES, max_position_embeddings=32, pad_token_id=0, cls_token_id=1)
    with pytest.raises(UnsupportedModelError, match="differ between layers"):
        extend_positions(ModernBertForMaskedLM(config), 64, rope="yarn")


def test_options_without_a_use_are_refused():
    with pytest.raises(ConfigError, match=r"rope='yarn' has no use: bert has a table"):
        extend_positions(make_model("bert"), 64, rope="yarn")
    with pytest.raises(ConfigError, match=r"method='interpolate' is for tables.*give rope='linear'"):
        extend_positions(make_model("llama"), 128, method="interpolate")
    with pytest.raises(ConfigError, match="Did you mean 'interpolate'"):
        extend_positions(make_model("bert"), 64, method="interpolated")
    with pytest.raises(ConfigError, match=r"Unknown rope 'ntk'\. Known: dynamic, linear, yarn"):
        extend_positions(make_model("llama"), 128, rope="ntk")


@pytest.mark.parametrize("length", [32, 31, 0, -1, 64.0, True, "64"])
def test_a_length_that_is_not_longer_is_refused(length):
    with pytest.raises(ConfigError, match=r"larger than the 32 positions of this model, got"):
        extend_positions(make_model("bert"), length)


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_families_without_such_positions_are_refused(name):
    assert token_limit(make_model(name).config) is None
    with pytest.raises(UnsupportedModelError, match=f"{name} models have no table of text positions"):
        extend_positions(make_model(name), 1000)


def test_minilm_runs_at_4096_tokens(tmp_path):
    folder = bundled_model("minilm-l6")
    model = AutoModel.from_pretrained(folder)
    longer = extend_positions(convert_attention(model, AttentionConfig(kind="local", window=64)), 4096).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("every word counts " * 2000, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 4096)
    with torch.no_grad():
        states = longer(**inputs).last_hidden_state
    assert states.shape == (1, 4096, 384) and torch.isfinite(states).all()
    assert states.std(1).mean() > 0.1


def test_positions_that_are_a_formula_are_tensors_of_the_base_model():
    config = MarianConfig(**SMALL, **BART_SIZES, max_position_embeddings=32, pad_token_id=0)
    model = MarianModel(config).eval()
    longer = extend_positions(model, 80).encoder.embed_positions.weight
    assert torch.equal(longer[:32], model.encoder.embed_positions.weight)
    assert torch.equal(longer, extend_positions(MarianMTModel(config), 80).model.encoder.embed_positions.weight)


def test_dynamic_scaling_is_extended_again():
    twice = extend_positions(extend_positions(llama(), 128, rope="dynamic"), 256)
    once = extend_positions(llama(), 256, rope="dynamic")
    assert twice.config.rope_parameters == once.config.rope_parameters
    assert twice.config.max_position_embeddings == once.config.max_position_embeddings
    assert token_limit(twice.config) == 256


def test_a_rope_of_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown rope_type 'yarm'. Did you mean 'yarn'"):
        extend_positions(llama(), 128, rope={"rope_type": "yarm", "factor": 2.0})
