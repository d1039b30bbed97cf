"""Capped scores and attention sinks: the kinds that keep them equal their naive twins, the others say so."""

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention import naive
from hf_efficient.attention.engines import gathered
from hf_efficient.attention.engines.parts import full_attention
from hf_efficient.attention.kinds.local import local_attention, local_decode
from hf_efficient.attention.kinds.strided import strided_attention
from hf_efficient.attention.kinds.topk import topk_attention, topk_decode
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.variant import Logits
from hf_efficient.models.derive.tiny import tiny_config, tiny_model

from ..helpers import assert_close, padding_mask
from .cases import HEADS, assert_exports, assert_gradients, make_bias, make_inputs

CAP = 1.5
# Each function with its naive twin, and settings under which it sees few keys.
FUNCTIONS = {
    "full": (full_attention, naive.naive_full_attention, {"window": 5}),
    "local": (local_attention, naive.naive_local_attention, {"window": 5, "global_tokens": 2}),
    "strided": (
        strided_attention,
        naive.naive_strided_attention,
        {"block_size": 4, "num_blocks": 2, "global_tokens": 2},
    ),
    "topk": (topk_attention, naive.naive_topk_attention, {"block_size": 4, "top_k": 3, "global_tokens": 2}),
}
LOGITS = {"cap": (CAP, False), "sinks": (None, True), "both": (CAP, True)}
DECODERS = {"local": local_decode, "topk": topk_decode}


def make_logits(name, dtype=torch.float64):
    softcap, has_sinks = LOGITS[name]
    return Logits(softcap, torch.linspace(-1, 2, HEADS, dtype=dtype) if has_sinks else None)


def results(function, inputs, mask, logits, **options):
    """The output, and its gradients in queries, keys, values and sinks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if logits.sinks is not None:
        leaves.append(logits.sinks.detach().requires_grad_())
        logits = logits._replace(sinks=leaves[3])
    out = function(*leaves[:3], mask, logits=logits, **options)
    return out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)


@pytest.mark.parametrize("pieces", [1 << 21, 600], ids=["whole", "pieces"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_naive(name, logits, pieces, monkeypatch):
    monkeypatch.setitem(gathered.PIECE, "cpu", pieces)
    fast, slow, options = FUNCTIONS[name]
    for causal, side in ((False, "left"), (True, "right"), (True, None)):
        inputs, mask = make_inputs(70), padding_mask(side, 2, 70)
        pair = [results(f, inputs, mask, make_logits(logits), causal=causal, **options) for f in (fast, slow)]
        for actual, expected in zip(*pair, strict=True):
            assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("name", ["full", "local", "strided"])
def test_beside_a_bias(name):
    fast, slow, options = FUNCTIONS[name]
    inputs, bias = make_inputs(70), make_bias(70)
    outs = [f(*inputs, logits=make_logits("both"), bias=bias, **options) for f in (fast, slow)]
    assert_close(*outs, 1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_matter(name):
    fast, _, options = FUNCTIONS[name]
    inputs = make_inputs(40)
    plain, capped, sunk = (
        fast(*inputs, causal=True, logits=logits, **options)
        for logits in (None, Logits(CAP), Logits(sinks=torch.zeros(HEADS, dtype=torch.float64)))
    )
    assert (plain - capped).abs().max() > 1e-3 and (plain - sunk).abs().max() > 1e-3
    far = Logits(1e6, torch.full((HEADS,), -1e6, dtype=torch.float64))
    assert_close(fast(*inputs, causal=True, logits=far, **options), plain, 1e-6)


@pytest.mark.parametrize("name", ["full", "local", "strided"])
def test_gradcheck(name):
    fast, _, options = FUNCTIONS[name]
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64)

    def function(query, key, value, sinks):
        return fast(query, key, value, causal=True, logits=Logits(CAP, sinks), **options)

    assert_gradients(function, [*make_inputs(13, batch=1), sinks])


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_equals_the_whole(name, logits):
    fast, _, options = FUNCTIONS[name]
    inputs, mask = make_inputs(40), padding_mask("left", 2, 40)
    expected = fast(*inputs, mask, causal=True, logits=make_logits(logits), **options)
    parts, state = [], None
    for begin, end in ((0, 15), (15, 16), (16, 17), (17, 24), (24, 40)):
        new = [x[:, :, begin:end] for x in inputs]
        out, state = DECODERS[name](*new, mask[:, begin:end], state, logits=make_logits(logits), **options)
        parts.append(out)
    real = mask[:, None, :, None]
    assert_close(torch.cat(parts, 2) * real, expected * real, 1e-10)


def test_a_row_without_keys_is_zero_and_has_finite_gradients():
    mask = torch.zeros(2, 9, dtype=torch.bool)
    for logits in LOGITS:
        out, *grads = results(local_attention, make_inputs(9), mask, make_logits(logits), window=3)
        assert out.eq(0).all() and all(grad.isfinite().all() for grad in grads)


def test_dropout_drops_some():
    inputs = make_inputs(40)
    outs = [local_attention(*inputs, window=5, dropout=0.5, logits=Logits(CAP)) for _ in range(2)]
    assert not torch.allclose(*outs)


@pytest.mark.parametrize("global_tokens", [0, 2])
def test_it_exports(global_tokens):
    options = {"window": 5, "global_tokens": global_tokens, "causal": True, "logits": make_logits("both")}
    assert_exports(local_attention, real_only=True, **options)


def make_model(model_type):
    name = {"gemma2": "Gemma2ForCausalLM", "gpt_oss": "GptOssForCausalLM"}[model_type]
    return tiny_model(tiny_config(CONFIG_MAPPING[model_type]()), getattr(transformers, name))


@pytest.mark.parametrize("kind", [kind for kind in ATTENTIONS if ATTENTIONS[kind].takes_logits])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_models_with_them_convert_decode_and_load(model_type, kind, tmp_path):
    model = make_model(model_type)
    config = {
        "local": AttentionConfig("local", window=3),
        "strided": AttentionConfig("strided", block_size=2, num_blocks=1),
        "topk": AttentionConfig("topk", block_size=2, top_k=2),
    }[kind]
    converted = convert_attention(model, config)
    ids = torch.randint(3, 90, (2, 13))
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, converted(input_ids=ids).logits)
    whole = converted(input_ids=ids, use_cache=False).logits
    assert (whole - model(input_ids=ids, use_cache=False).logits).abs().max() > 1e-3
    steps, cache = [], None
    for part in ids.split([4] + [1] * 9, dim=1):
        out = converted(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole, 1e-4)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_kinds_without_a_place_for_them_are_refused(model_type):
    model = make_model(model_type)
    for kind in (kind for kind in ATTENTIONS if not ATTENTIONS[kind].takes_logits):
        message = rf"'{kind}' attention cannot express .* of {model_type} models\. .*: local, strided, topk"
        with pytest.raises(UnsupportedModelError, match=message):
            convert_attention(model, AttentionConfig(kind))
