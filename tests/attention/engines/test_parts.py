"""full_attention against its naive twin and SDPA."""

import pytest
import torch
import torch.nn.functional as F

from hf_efficient.attention.engines.parts import full_attention, toeplitz
from hf_efficient.attention.naive import naive_full_attention
from hf_efficient.errors import UnsupportedModelError

from ...helpers import assert_close, padding_mask
from ..cases import (
    assert_causal,
    assert_compiles_whole,
    assert_equals_naive,
    assert_mean_unbiased,
    assert_padding_is_inert,
    make_bias,
    make_inputs,
)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 65])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_equals_naive(seen, causal, side, window):
    mask = padding_mask(side, 2, seen)
    assert_equals_naive(full_attention, naive_full_attention, make_inputs(seen), mask, causal=causal, window=window)
    bias = make_bias(seen)
    options = {"causal": causal, "window": window, "scaling": 1.0}
    assert_equals_naive(full_attention, naive_full_attention, make_inputs(seen, kv_heads=1), mask, bias, **options)


@pytest.mark.parametrize(("seen", "length"), [(9, 1), (9, 4), (70, 3)])
@pytest.mark.parametrize("window", [None, 3])
def test_queries_at_the_end_equal_naive(seen, length, window):
    inputs, bias = make_inputs(seen, length), make_bias(seen, length)
    for side in (None, "left"):
        mask = padding_mask(side, 2, seen)
        assert_equals_naive(full_attention, naive_full_attention, inputs, mask, bias, causal=True, window=window)


@pytest.mark.parametrize(("seen", "length"), [(3, 8), (8, 3)])
def test_cross_attention_equals_naive(seen, length):
    mask = padding_mask("right", 2, seen)
    assert_equals_naive(full_attention, naive_full_attention, make_inputs(seen, length), mask)


def test_equals_sdpa():
    query, key, value = make_inputs(33, kv_heads=4, dtype=torch.float32)
    assert_close(full_attention(query, key, value), F.scaled_dot_product_attention(query, key, value), 0)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(full_attention(query, key, value, causal=True), expected, 0)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_padding_is_inert(junk):
    for side in ("left", "right"):
        mask = padding_mask(side, 2, 20)
        assert_padding_is_inert(full_attention, make_inputs(20), mask, junk)
        assert_padding_is_inert(full_attention, make_inputs(20), mask, junk, causal=True, window=3)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    assert_padding_is_inert(full_attention, make_inputs(6), mask, float("nan"))
    assert full_attention(*make_inputs(6), mask, bias=make_bias(6)).eq(0).all()


def test_causal():
    assert_causal(full_attention)
    assert_causal(full_attention, window=7)


def test_what_must_differ():
    inputs = make_inputs(9)
    plain = full_attention(*inputs)
    mask = padding_mask("right", 2, 9)
    for changed in ({"window": 2}, {"causal": True}, {"bias": make_bias(9)}, {"scaling": 1.0}, {"key_mask": mask}):
        assert (full_attention(*inputs, **changed) - plain).abs().max() > 1e-3, changed


def test_dropout_is_unbiased():
    assert_mean_unbiased(full_attention)


def test_toeplitz():
    vector = torch.arange(2 * 6).view(2, 6)
    expected = [[[2, 3, 4, 5], [1, 2, 3, 4], [0, 1, 2, 3]], [[8, 9, 10, 11], [7, 8, 9, 10], [6, 7, 8, 9]]]
    assert toeplitz(vector, 3, 4).tolist() == expected


def test_compiles_whole():
    assert_compiles_whole(full_attention, causal=True, window=3)


def test_misfits_are_refused():
    query, key, value = make_inputs(4, 6)
    with pytest.raises(UnsupportedModelError, match="6 queries and 4 keys"):
        full_attention(query, key, value, causal=True)
    with pytest.raises(UnsupportedModelError, match="4 query heads cannot share 3"):
        full_attention(query, *make_inputs(4, kv_heads=3)[1:])
    with pytest.raises(UnsupportedModelError, match="must be bool"):
        full_attention(query, key, value, torch.ones(2, 4))
    with pytest.raises(UnsupportedModelError, match=r"keys \+ queries - 1 = 9"):
        full_attention(query, key, value, bias=torch.zeros(1, 4, 6, 4))
