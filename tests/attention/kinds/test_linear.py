"""linear_attention against its naive twin, with every feature map; and decoding from its state."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.attention.engines.feature_maps import FEATURE_MAPS
from hf_efficient.attention.kinds.linear import LinearAttention, linear_attention, linear_decode
from hf_efficient.attention.naive import naive_linear_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, padding_mask, random_examples, selected
from ..cases import (
    DIM,
    HEADS,
    VALUE_DIM,
    assert_causal,
    assert_compiles_whole,
    assert_equals_naive,
    assert_exports,
    assert_gradients,
    assert_mean_unbiased,
    assert_padding_is_inert,
    make_inputs,
)
from ..maps import draw_weights, map_options, mapped

MAPS = sorted(FEATURE_MAPS)


def assert_equals_twin(feature_map, inputs, mask=None, **options):
    fast, naive = mapped(linear_attention, feature_map), mapped(naive_linear_attention, feature_map)
    weights = draw_weights(feature_map, inputs[1].shape[1])
    assert_equals_naive(fast, naive, inputs, mask, weights, **options)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_naive(seen, causal, side, feature_map):
    mask = padding_mask(side, 2, seen)
    for kv_heads in (1, 4):
        assert_equals_twin(feature_map, make_inputs(seen, kv_heads=kv_heads), mask, causal=causal)
    assert_equals_twin(feature_map, make_inputs(seen), mask, causal=causal, scaling=1.0)


@pytest.mark.cover
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_naive_at_a_thousand(causal, feature_map):
    assert_equals_twin(feature_map, make_inputs(1000), padding_mask("left", 2, 1000), causal=causal)


@random_examples(30)
@given(data=st.data(), seen=st.integers(1, 300), length=st.integers(1, 300), feature_map=st.sampled_from(MAPS))
def test_any_shape_equals_naive(data, seen, length, feature_map):
    causal = data.draw(st.booleans())
    if causal:
        seen = max(seen, length)
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    mask = data.draw(st.sampled_from([None, holes]))
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    assert_equals_twin(feature_map, inputs, mask, causal=causal)


def test_pieces_of_all_sizes_equal_naive(monkeypatch):
    """Long inputs are worked on piece by piece; here short ones are."""
    for numbers in (1, 6000, 20000):
        monkeypatch.setattr("hf_efficient.attention.engines.pieces.NUMBERS", numbers)
        for feature_map in ("elu", "hedgehog"):
            assert_equals_twin(feature_map, make_inputs(300), padding_mask("left", 2, 300), causal=True)
            assert_equals_twin(feature_map, make_inputs(300, 200), causal=True)
        assert_equals_twin("hedgehog", make_inputs(300))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(causal, feature_map):
    weights = draw_weights(feature_map)
    learned = () if weights is None else (weights,)
    mask = torch.tensor([[False, *[True] * 4]])

    def function(query, key, value, weights=None):
        options = map_options(feature_map, weights)
        return linear_attention(query, key, value, mask, causal=causal, scaling=0.7, **options)

    assert_gradients(function, [*make_inputs(5, batch=1), *learned])


@pytest.mark.cover
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_padding_is_inert(junk, causal, feature_map):
    options = map_options(feature_map, draw_weights(feature_map))
    for side in ("left", "right"):
        mask = padding_mask(side, 2, 150)
        assert_padding_is_inert(linear_attention, make_inputs(150), mask, junk, causal=causal, **options)


@pytest.mark.parametrize("feature_map", MAPS)
def test_padding_equals_no_padding(feature_map):
    query, key, value = make_inputs(150, batch=1)
    options = map_options(feature_map, draw_weights(feature_map))
    for real in (slice(40, 150), slice(0, 110)):
        mask = torch.zeros(1, 150, dtype=torch.bool)
        mask[:, real] = True
        short = [tensor[:, :, real] for tensor in (query, key, value)]
        for causal in (False, True):
            out = linear_attention(query, key, value, mask, causal=causal, **options)
            assert_close(out[:, :, real], linear_attention(*short, causal=causal, **options), 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_rows_without_keys_are_zero(feature_map):
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        options = {"causal": causal, **map_options(feature_map, draw_weights(feature_map))}
        assert_padding_is_inert(linear_attention, make_inputs(150), mask, float("nan"), **options)
        assert linear_attention(*make_inputs(150), mask, **options).eq(0).all()


@pytest.mark.parametrize("feature_map", MAPS)
def test_causal(feature_map):
    assert_causal(linear_attention, **map_options(feature_map, draw_weights(feature_map)))


def test_queries_at_the_end_equal_the_whole():
    query, key, value = make_inputs(150)
    mask = padding_mask("left", 2, 150)
    whole = linear_attention(query, key, value, mask, causal=True)
    for seen, length in ((60, 1), (150, 1), (150, 3)):
        inputs = (query[:, :, seen - length : seen], key[:, :, :seen], value[:, :, :seen], mask[:, :seen])
        assert_close(linear_attention(*inputs, causal=True), whole[:, :, seen - length : seen], 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("side", [None, "left"])
def test_decoding_from_the_state_equals_the_whole(feature_map, side):
    query, key, value = make_inputs(150)
    mask = padding_mask(side, 2, 150)
    options = map_options(feature_map, draw_weights(feature_map))
    whole = linear_attention(query, key, value, mask, causal=True, scaling=0.7, **options)
    for lengths in ([1] * 150, [70, 1, 1, 1, 70, 7], [130, 20]):
        outs, state, start = [], None, 0
        for length in lengths:
            now = slice(start, start + length)
            part = (query[:, :, now], key[:, :, now], value[:, :, now], None if mask is None else mask[:, now])
            out, state = linear_decode(*part, state, scaling=0.7, **options)
            outs.append(out)
            start += length
        assert_close(torch.cat(outs, 2), whole, 1e-12)


def test_the_state_has_one_size_and_single_precision():
    variant = LinearAttention(AttentionConfig("linear", feature_map="hedgehog"), HeadShape(HEADS, 2, DIM)).bfloat16()
    query, key, value = make_inputs(40, dtype=torch.bfloat16)
    state, shapes = None, set()
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 40)):
        part = (x[:, :, start:end] for x in (query, key, value))
        out, state = variant.decode(*part, None, state, scaling=None, bias=None)
        assert out.dtype == torch.bfloat16
        shapes.add(tuple(tuple(tensor.shape) for tensor in state))
        assert {tensor.dtype for tensor in state} == {torch.float32}
    assert shapes == {((2, 2, 2 * DIM, VALUE_DIM + 1),)}


@pytest.mark.parametrize("feature_map", MAPS)
def test_cross_attention(feature_map):
    variant = LinearAttention(AttentionConfig("linear", feature_map=feature_map), HeadShape(HEADS, 2, DIM)).double()
    assert variant.takes_cross
    for seen, length in ((9, 150), (150, 9)):
        mask = padding_mask("right", 2, seen)
        inputs = make_inputs(seen, length)
        out = variant(*inputs, mask, causal=False, scaling=None, dropout=0.0, bias=None)
        assert_close(out, naive_linear_attention(*inputs, mask, **variant.map_options), 1e-12)


def test_the_weights_are_those_that_are_used():
    variant = LinearAttention(AttentionConfig("linear"), HeadShape(HEADS, 2, DIM))
    query, key, value = make_inputs(70)
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": None}
    weights = variant.weights(query, key, None, **options)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    assert_close(weights @ value.repeat_interleave(2, 1), variant(query, key, value, None, **options), 1e-12)


def test_what_must_differ():
    inputs = make_inputs(50)
    plain = linear_attention(*inputs)
    changes = [{"causal": True}, {"scaling": 1.0}, {"key_mask": padding_mask("right", 2, 50)}]
    changes += [map_options(name, draw_weights(name)) for name in MAPS if name != "elu"]
    outs = [plain, *(linear_attention(*inputs, **changed) for changed in changes)]
    for i, out in enumerate(outs):
        for other in outs[:i]:
            assert (out - other).abs().max() > 1e-3
    assert_close(linear_attention(*inputs, scaling=4**-0.5), plain, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    assert_mean_unbiased(linear_attention, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_half_precision_sums_in_single(causal, feature_map):
    inputs = make_inputs(1200, batch=1, dtype=torch.bfloat16)
    options = {"causal": causal, **map_options(feature_map, draw_weights(feature_map))}
    expected = naive_linear_attention(*(tensor.double() for tensor in inputs), **options)
    out = linear_attention(*inputs, **options)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected.bfloat16(), 2**-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_attention(*(tensor.float() for tensor in inputs), **options)
    assert_close(cast, expected, 1e-5)


@pytest.mark.cover
@pytest.mark.parametrize(
    ("feature_map", "causal"),
    selected(
        [("elu", True), ("relu", False), ("favor", False), ("hedgehog", True)],
        lambda name, _: name == "relu",
    ),
)
def test_compiles_whole(feature_map, causal):
    options = map_options(feature_map, draw_weights(feature_map))
    assert_compiles_whole(linear_attention, gradients=True, causal=causal, **options)


@pytest.mark.parametrize(
    ("causal", "feature_map"), selected(product((False, True), MAPS), lambda *row: row == (True, "favor"))
)
def test_exports_with_any_length(causal, feature_map):
    options = map_options(feature_map, draw_weights(feature_map))
    assert_exports(linear_attention, ((1, 140), (3, 301), (2, 256)), causal=causal, **options)


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'elu'"):
        linear_attention(*make_inputs(4), feature_map="elo")
    with pytest.raises(ConfigError, match=r"'favor' needs map_weights: .*draw_projection"):
        linear_attention(*make_inputs(4), feature_map="favor")
    with pytest.raises(ConfigError, match="'relu' has no weights"):
        linear_attention(
            *make_inputs(4), **{**map_options("hedgehog", draw_weights("hedgehog")), "feature_map": "relu"}
        )
    with pytest.raises(ConfigError, match=r"\(4, 4, 4\) does not fit 2 heads of dimension 4"):
        square = torch.randn(4, 4, 4)
        linear_attention(*make_inputs(4), feature_map="hedgehog", map_weights=(square, square))
    with pytest.raises(UnsupportedModelError, match="6 queries and 4 keys"):
        linear_attention(*make_inputs(4, 6), causal=True)
