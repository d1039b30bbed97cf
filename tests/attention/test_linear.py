"""linear_attention against its naive twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficient.attention import config
from hf_efficient.attention.linear import FEATURE_MAPS, linear_attention
from hf_efficient.attention.naive import naive_linear_attention
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ..helpers import assert_close, padding_mask
from .cases import (
    assert_causal,
    assert_equals_naive,
    assert_mean_unbiased,
    assert_padding_is_inert,
    compiled,
    make_inputs,
)


@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equals_naive(seen, causal, side, kv_heads):
    inputs, mask = make_inputs(seen, kv_heads=kv_heads), padding_mask(side, 2, seen)
    assert_equals_naive(linear_attention, naive_linear_attention, inputs, mask, causal=causal)
    assert_equals_naive(linear_attention, naive_linear_attention, inputs, mask, causal=causal, scaling=1.0)


@settings(max_examples=30, deadline=None)
@given(seen=st.integers(1, 300), length=st.integers(1, 300), causal=st.booleans(), holes=st.booleans())
def test_any_shape_equals_naive(seen, length, causal, holes):
    if causal:
        seen = max(seen, length)
    mask = torch.rand(2, seen, generator=torch.Generator().manual_seed(seen)) > 0.3 if holes else None
    assert_equals_naive(linear_attention, naive_linear_attention, make_inputs(seen, length), mask, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(5, batch=1)]
    mask = torch.tensor([[False, *[True] * 4]])
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, mask, causal=causal, scaling=0.7), inputs)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right"):
        mask = padding_mask(side, 2, 150)
        assert_padding_is_inert(linear_attention, make_inputs(150), mask, junk, causal=causal)


def test_padding_equals_no_padding():
    query, key, value = make_inputs(150, batch=1)
    short = [tensor[:, :, 40:] for tensor in (query, key, value)]
    mask = torch.arange(150)[None] >= 40
    for causal in (False, True):
        out = linear_attention(query, key, value, mask, causal=causal)
        assert_close(out[:, :, 40:], linear_attention(*short, causal=causal), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        assert_padding_is_inert(linear_attention, make_inputs(150), mask, float("nan"), causal=causal)
        assert linear_attention(*make_inputs(150), mask, causal=causal).eq(0).all()


def test_causal():
    assert_causal(linear_attention)


def test_decoding_equals_the_whole():
    query, key, value = make_inputs(150)
    mask = padding_mask("left", 2, 150)
    whole = linear_attention(query, key, value, mask, causal=True)
    for seen, length in ((60, 1), (150, 1), (150, 3)):
        inputs = (query[:, :, seen - length : seen], key[:, :, :seen], value[:, :, :seen], mask[:, :seen])
        assert_close(linear_attention(*inputs, causal=True), whole[:, :, seen - length : seen], 1e-12)


def test_what_must_differ():
    inputs = make_inputs(50)
    plain = linear_attention(*inputs)
    for changed in ({"causal": True}, {"scaling": 1.0}, {"key_mask": padding_mask("right", 2, 50)}):
        assert (linear_attention(*inputs, **changed) - plain).abs().max() > 1e-3, changed
    assert_close(linear_attention(*inputs, scaling=4**-0.5), plain, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    assert_mean_unbiased(linear_attention, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_sums_in_single(causal):
    inputs = make_inputs(4000, batch=1, dtype=torch.bfloat16)
    expected = naive_linear_attention(*(tensor.double() for tensor in inputs), causal=causal)
    out = linear_attention(*inputs, causal=causal)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected.bfloat16(), 2**-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_attention(*(tensor.float() for tensor in inputs), causal=causal)
    assert_close(cast, expected, 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole(causal):
    function = compiled(linear_attention, causal=causal)
    for seen in (150, 301, 192):
        inputs, mask = make_inputs(seen), padding_mask("left", 2, seen)
        assert_close(function(*inputs, mask), linear_attention(*inputs, mask, causal=causal), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return linear_attention(query, key, value, mask, causal=causal)

    auto = torch.export.Dim.AUTO
    example = (*make_inputs(200), padding_mask("right", 2, 200))
    program = torch.export.export(Module(), example, dynamic_shapes=[{0: auto, 2: auto}] * 3 + [{0: auto, 1: auto}])
    for batch, seen in ((1, 140), (3, 301), (2, 256)):
        inputs = (*make_inputs(seen, batch=batch), padding_mask("left", batch, seen))
        assert_close(program.module()(*inputs), Module()(*inputs), 1e-12)


def test_the_config_knows_every_feature_map():
    assert set(config.FEATURE_MAPS) == set(FEATURE_MAPS)


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'elu'"):
        linear_attention(*make_inputs(4), feature_map="relu")
    with pytest.raises(UnsupportedModelError, match="6 queries and 4 keys"):
        linear_attention(*make_inputs(4, 6), causal=True)
