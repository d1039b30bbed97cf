"""Longer inputs than the checkpoint was made for."""

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, extend_positions
from hf_efficient.bundled import bundled_model

from ..families import VOCABULARY, make_inputs, make_model

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


def test_rotary_positions_only_raise_the_length_in_the_config():
    model = make_model("llama")
    longer = extend_positions(model, 128)
    assert longer.config.max_position_embeddings == 128 and model.config.max_position_embeddings == 64
    inputs = make_inputs("llama")
    assert torch.equal(longer(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("length", [32, 31, 0, -1, 64.0, True, "64"])
def test_a_length_that_is_not_longer_is_refused(length):
    with pytest.raises(ConfigError, match=r"larger than the 32 positions of this model, got"):
        extend_positions(make_model("bert"), length)


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_families_without_such_positions_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=f"{name} models have no table of text positions"):
        extend_positions(make_model(name), 1000)


def test_minilm_runs_at_4096_tokens():
    model = AutoModel.from_pretrained(bundled_model("minilm-l6"))
    longer = extend_positions(convert_attention(model, AttentionConfig(kind="local", window=64)), 4096)
    with torch.no_grad():
        states = longer.eval()(input_ids=torch.randint(1000, 30000, (1, 4096))).last_hidden_state
    assert states.shape == (1, 4096, 384) and torch.isfinite(states).all()
    assert states.std(1).mean() > 0.1
