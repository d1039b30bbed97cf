"""T5's relative position bias as a Toeplitz carrier: the same numbers as stock T5, in linear memory."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.attention.relative_bias import toeplitz_bias

from ..families import make_inputs, make_model
from ..helpers import assert_close

NARROW = AttentionConfig(kind="local", window=2, global_tokens=0)
TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias"


def band_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, **kwargs):
    """T5's own eager attention with a band mask of `NARROW` added to the scores of self attention."""
    length, seen = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-1, -2) * scaling + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    if not getattr(module, "is_cross", False):
        distance = torch.arange(seen) - torch.arange(seen - length, seen)[:, None]
        inside = distance.abs() <= 2 if not module.is_causal else (distance > -2) & (distance <= 0)
        scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
    return (F.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def naive_t5(monkeypatch):
    """A stock T5 that computes a band of its full score matrix."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "band_of_test", band_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "band_of_test", eager_mask)
    stock = make_model("t5")
    model = type(stock)._from_config(stock.config, attn_implementation="band_of_test").train(stock.training)
    model.load_state_dict(stock.state_dict())
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.is_cross = True
    return model


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (9, 0), (40, 0), (1, 12), (4, 12), (1, torch.tensor(7))])
def test_the_carrier_holds_the_bias_of_every_pair(stack, length, past):
    attention = getattr(make_model("t5"), stack).block[0].layer[0].SelfAttention
    seen = int(past) + length
    expected = attention.compute_bias(length, seen, past_seen_tokens=past)  # [1, H, T, S]
    carrier = toeplitz_bias(attention, length, seen, past_seen_tokens=past)
    assert carrier.shape == (1, 4, 1, seen + length - 1)
    distance = torch.arange(seen) - torch.arange(seen - length, seen)[:, None]
    assert torch.equal(carrier[:, :, 0][:, :, distance + seen - 1], expected)
    assert expected.unique().numel() > 4 * (seen > 1)


def test_a_static_cache_does_not_lengthen_the_carrier():
    attention = make_model("t5").decoder.block[0].layer[0].SelfAttention
    assert toeplitz_bias(attention, 2, 500, past_seen_tokens=3).shape == (1, 4, 1, 6)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_local_attention_equals_a_masked_t5_in_values_and_gradients(naive_t5, side):
    local = convert_attention(naive_t5, NARROW)
    inputs = make_inputs("t5", side)
    direction = torch.randn(2, 7, 50)
    grads = []
    for model in (local, naive_t5):
        logits = model(**inputs).logits
        (logits * direction).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(local(**inputs).logits, naive_t5(**inputs).logits, 1e-5)
    for name, expected in grads[1].items():
        assert_close(grads[0][name], expected, 1e-4, f"gradient of {name}")
    for stack in ("encoder", "decoder"):
        assert grads[0][f"{stack}.{TABLE}.weight"].abs().max() > 1e-3
    stock = make_model("t5")
    stock.load_state_dict(naive_t5.state_dict())
    assert (stock(**inputs).logits - local(**inputs).logits).abs().max() > 1e-3


def test_converting_one_stack_alone_leaves_the_other_exact():
    model, inputs = make_model("t5"), make_inputs("t5", "right")
    layers = {0: NARROW, 1: NARROW, 2: NARROW}
    converted = convert_attention(model, layers)
    block = converted.config.efficient
    only_encoder = {"version": 1, "stacks": {"encoder": block["stacks"]["encoder"]}}
    half = type(converted)(type(converted.config)(**model.config.to_dict() | {"efficient": only_encoder})).eval()
    half.load_state_dict(model.state_dict())
    states = half.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    given = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": inputs["decoder_input_ids"]}
    assert_close(half(encoder_outputs=states, **given).logits, model(encoder_outputs=states, **given).logits, 1e-5)
    assert (half(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_table(duplicate):
    model, inputs = convert_attention(make_model("t5"), NARROW), make_inputs("t5")
    expected = model(**inputs).logits
    copied = duplicate(model)
    assert torch.equal(copied(**inputs).logits, expected)
    with torch.no_grad():
        model.encoder.get_submodule(TABLE).weight.add_(torch.randn(8, 4))
    assert torch.equal(copied(**inputs).logits, expected)
    assert not torch.allclose(model(**inputs).logits, expected)
