"""local_attention against its naive twin, SDPA, and the limits it promises."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.attention.kinds.local import local_attention
from hf_efficient.attention.naive import naive_local_attention
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, padding_mask, random_examples, selected
from ..cases import (
    assert_causal,
    assert_compiles_whole,
    assert_equals_naive,
    assert_exports,
    assert_gradients,
    assert_mean_unbiased,
    assert_padding_is_inert,
    make_bias,
    make_inputs,
)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("global_tokens", [0, 1, 3])
def test_equals_naive(seen, causal, side, global_tokens):
    mask = padding_mask(side, 2, seen)
    for window in (1, 6, 70):
        options = {"window": window, "causal": causal, "global_tokens": global_tokens}
        assert_equals_naive(local_attention, naive_local_attention, make_inputs(seen), mask, **options)
        options["scaling"] = 1.0
        bias = make_bias(seen)
        assert_equals_naive(local_attention, naive_local_attention, make_inputs(seen), mask, bias, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_naive_at_a_thousand(causal):
    mask, bias = padding_mask("left", 2, 1000), make_bias(1000)
    options = {"window": 33, "causal": causal, "global_tokens": 2}
    assert_equals_naive(local_attention, naive_local_attention, make_inputs(1000), mask, bias, **options)


@pytest.mark.cover(2)
@pytest.mark.parametrize(("seen", "length"), [(5, 1), (40, 1), (150, 1), (150, 3), (150, 63), (300, 200)])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("global_tokens", [0, 3])
def test_queries_at_the_end_equal_naive(seen, length, side, global_tokens):
    inputs, mask = make_inputs(seen, length), padding_mask(side, 2, seen)
    for bias in (None, make_bias(seen, length)):
        options = {"window": 20, "causal": True, "global_tokens": global_tokens}
        assert_equals_naive(local_attention, naive_local_attention, inputs, mask, bias, **options)


@random_examples(30)
@given(data=st.data(), seen=st.integers(1, 150), window=st.integers(1, 80), global_tokens=st.integers(0, 5))
def test_any_shape_equals_naive(data, seen, window, global_tokens):
    causal = data.draw(st.booleans())
    length = data.draw(st.integers(1, seen)) if causal else seen
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    mask = data.draw(st.sampled_from([None, holes]))
    bias = data.draw(st.sampled_from([None, make_bias(seen, length)]))
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    options = {"window": window, "global_tokens": global_tokens, "causal": causal}
    assert_equals_naive(local_attention, naive_local_attention, inputs, mask, bias, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_equals_sdpa(dtype, tolerance, causal):
    query, key, value = make_inputs(130, kv_heads=4, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    for global_tokens in (0, 2):
        for window in (130, 1000):
            out = local_attention(query, key, value, window=window, causal=causal, global_tokens=global_tokens)
            assert_close(out, expected, tolerance)
    # 129 is the shortest that covers all when bidirectional; with global tokens it goes through the blocks.
    out = local_attention(query, key, value, window=129 + causal, causal=causal, global_tokens=1)
    assert_close(out, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    inputs = make_inputs(200, kv_heads=2, dtype=dtype)
    out = local_attention(*inputs, window=10, global_tokens=1)
    assert out.dtype == dtype
    expected = naive_local_attention(*(tensor.double() for tensor in inputs), window=10, global_tokens=1)
    assert_close(out, expected, tolerance)


def test_autocast():
    inputs = make_inputs(200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = local_attention(*inputs, window=10, global_tokens=1, bias=make_bias(200).float())
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("global_tokens", [0, 1])
def test_gradcheck(causal, global_tokens):
    mask = torch.tensor([[False, *[True] * 8]])

    def function(query, key, value, bias):
        options = {"window": 2, "causal": causal, "global_tokens": global_tokens, "bias": bias}
        return local_attention(query, key, value, mask, **options)

    assert_gradients(function, [*make_inputs(9, batch=1), make_bias(9)])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right"):
        for global_tokens in (0, 2):
            options = {"window": 9, "causal": causal, "global_tokens": global_tokens}
            mask = padding_mask(side, 2, 150)
            assert_padding_is_inert(local_attention, make_inputs(150), mask, junk, **options)


def test_padding_equals_no_padding():
    query, key, value = make_inputs(150, batch=1)
    short = [tensor[:, :, 40:] for tensor in (query, key, value)]
    mask = torch.arange(150)[None] >= 40
    for causal in (False, True):
        options = {"window": 9, "causal": causal, "global_tokens": 2}
        out = local_attention(query, key, value, mask, **options)
        assert_close(out[:, :, 40:], local_attention(*short, **options), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for global_tokens in (0, 2):
        options = {"window": 9, "global_tokens": global_tokens}
        assert_padding_is_inert(local_attention, make_inputs(150), mask, float("nan"), **options)
        assert local_attention(*make_inputs(150), mask, **options).eq(0).all()


def test_causal():
    assert_causal(local_attention, window=6)
    assert_causal(local_attention, window=6, global_tokens=2)


def test_decoding_equals_the_whole():
    query, key, value = make_inputs(150)
    mask = padding_mask("left", 2, 150)
    options = {"window": 16, "causal": True, "global_tokens": 2}
    whole = local_attention(query, key, value, mask, **options)
    for seen in (60, 149, 150):
        step = local_attention(
            query[:, :, seen - 1 : seen], key[:, :, :seen], value[:, :, :seen], mask[:, :seen], **options
        )
        assert_close(step, whole[:, :, seen - 1 : seen], 1e-12)


def test_what_must_differ():
    inputs = make_inputs(200)
    plain = local_attention(*inputs, window=8)
    mask = padding_mask("right", 2, 200)
    changes = ({"window": 9}, {"global_tokens": 1}, {"bias": make_bias(200)}, {"causal": True}, {"key_mask": mask})
    for changed in changes:
        assert (local_attention(*inputs, **{"window": 8, **changed}) - plain).abs().max() > 1e-3, changed
    # A global token changes far queries, and sees far keys itself.
    difference = (local_attention(*inputs, window=8, global_tokens=1) - plain).abs().amax((0, 1, 3))
    assert difference[0] > 1e-3
    assert difference[150] > 1e-3


def test_dropout_is_unbiased():
    assert_mean_unbiased(local_attention, window=3, global_tokens=1)


@pytest.mark.parametrize(
    ("causal", "global_tokens"), selected(product((False, True), (0, 2)), lambda causal, count: causal and count == 0)
)
def test_compiles_whole(causal, global_tokens):
    assert_compiles_whole(local_attention, window=9, causal=causal, global_tokens=global_tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("global_tokens", [0, 2])
def test_exports_with_any_length(global_tokens):
    assert_exports(local_attention, real_only=True, window=9, global_tokens=global_tokens)


def test_an_exported_row_without_keys_is_finite_in_half_precision():
    """Scores of -64 before the mask: with the smallest number itself as the mask they would leave the range."""

    class Module(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return local_attention(query, key, value, mask, window=9, scaling=1.0)

    query = torch.full((1, 2, 200, 4), 4.0, dtype=torch.float16)
    mask = torch.arange(200).expand(1, -1) >= 150
    program = torch.export.export(Module(), (query, -query, query, mask))
    assert program.module()(query, -query, query, mask).isfinite().all()


@pytest.mark.parametrize("global_tokens", [0, 2])
def test_causal_and_shared_heads_export(global_tokens):
    options = {"window": 70, "global_tokens": global_tokens, "causal": True, "scaling": 0.3}
    assert_exports(local_attention, ((1, 30), (2, 301)), masked=False, **options)


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        local_attention(*make_inputs(9, 3), window=2)
    with pytest.raises(ConfigError, match="window must be at least 1"):
        local_attention(*make_inputs(9), window=0)
