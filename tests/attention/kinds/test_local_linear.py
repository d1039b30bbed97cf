"""local_linear_attention against its naive twin and SDPA; decoding from its state."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.attention.engines.feature_maps import FEATURE_MAPS
from hf_efficient.attention.kinds.local import local_attention
from hf_efficient.attention.kinds.local_linear import (
    LocalLinearAttention,
    local_linear_attention,
    local_linear_decode,
)
from hf_efficient.attention.naive import naive_linear_attention, naive_local_linear_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples
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


def with_mix(function):
    """The function with its `log_mix` as `bias`, so that `assert_equals_naive` compares its gradient too."""
    return lambda *inputs, bias, **options: function(*inputs, log_mix=bias, **options)


def assert_equals_twin(feature_map, inputs, mask=None, **options):
    fast, naive = mapped(local_linear_attention, feature_map), mapped(naive_local_linear_attention, feature_map)
    weights = draw_weights(feature_map, inputs[1].shape[1])
    assert_equals_naive(fast, naive, inputs, mask, weights, **options)


def assert_equals_twin_with_mix(inputs, mask=None, **options):
    fast, naive = with_mix(local_linear_attention), with_mix(naive_local_linear_attention)
    mix = torch.randn(HEADS, dtype=torch.float64)
    assert_equals_naive(fast, naive, inputs, mask, mix, **options)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("window", [1, 6, 64, 70])
def test_equals_naive(seen, causal, side, window):
    mask, options = padding_mask(side, 2, seen), {"window": window, "causal": causal}
    for kv_heads in (1, 2, 4):
        assert_equals_twin_with_mix(make_inputs(seen, kv_heads=kv_heads), mask, **options)
    assert_equals_twin("elu", make_inputs(seen), mask, scaling=1.0, **options)


@pytest.mark.parametrize("seen", [7, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_naive_with_every_map(seen, causal, feature_map):
    mask, options = padding_mask("left", 2, seen), {"window": 9, "causal": causal, "scaling": 0.7}
    assert_equals_twin(feature_map, make_inputs(seen), mask, **options)


@pytest.mark.cover
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [33, 150])
def test_equals_naive_at_a_thousand(causal, window):
    assert_equals_twin_with_mix(make_inputs(1000), padding_mask("left", 2, 1000), window=window, causal=causal)


@pytest.mark.parametrize(("seen", "length"), [(5, 1), (150, 1), (150, 3), (150, 63), (300, 200)])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_queries_at_the_end_equal_naive(seen, length, side):
    inputs, mask = make_inputs(seen, length), padding_mask(side, 2, seen)
    for window in (1, 20, 100):
        assert_equals_twin_with_mix(inputs, mask, window=window, causal=True)


@random_examples(30)
@given(data=st.data(), seen=st.integers(1, 300), window=st.integers(1, 140), feature_map=st.sampled_from(MAPS))
def test_any_shape_equals_naive(data, seen, window, feature_map):
    causal = data.draw(st.booleans())
    length = data.draw(st.integers(1, seen)) if causal else seen
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    mask = data.draw(st.sampled_from([None, holes]))
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    assert_equals_twin(feature_map, inputs, mask, window=window, causal=causal)


def test_pieces_of_all_sizes_equal_naive(monkeypatch):
    """Long inputs are worked on piece by piece; here short ones are."""
    for numbers in (1, 60000, 150000):
        monkeypatch.setattr("hf_efficient.attention.engines.pieces.NUMBERS", numbers)
        for causal in (False, True):
            options = {"window": 30, "causal": causal}
            assert_equals_twin_with_mix(make_inputs(300), padding_mask("left", 2, 300), **options)
        assert_equals_twin_with_mix(make_inputs(300, 200), window=30, causal=True)


@pytest.mark.parametrize("size", [100.0, -100.0, 3000.0, -3000.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [5, 300])
def test_large_scores(size, causal, window):
    """Scores far beyond what exp can hold, all of one sign: the two kinds of weights keep their ratio."""
    query, key, value = make_inputs(150)
    query, key = query.abs() + 1, (key.abs() + 1) * size
    options = {"window": window, "causal": causal, "scaling": 1.0}
    for feature_map in ("relu", "hedgehog"):  # of bounded size
        weights = map_options(feature_map, draw_weights(feature_map))
        inputs = leaves(query, key, value)
        out = local_linear_attention(*inputs, **options, **weights)
        expected = naive_local_linear_attention(query, key, value, **options, **weights)
        assert_close(out, expected, 1e-10)
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), inputs))
        single = local_linear_attention(*(x.float() for x in (query, key, value)), **options, **_float(weights))
        assert torch.isfinite(single).all()
        assert single.abs().amax((0, 1, 3)).min() > 0


def _float(weights):
    pair = weights["map_weights"]
    return {**weights, "map_weights": pair and tuple(x.float() for x in pair)}


def test_both_kinds_of_weights_count_at_large_scores():
    """Scores of about 40, and a mix that makes the far keys as heavy: the result is neither of the two parts."""
    query, key, value = make_inputs(100)
    query, key = 3 * query.abs(), 3 * key.abs()
    mix = torch.full((HEADS,), 18.0, dtype=torch.float64)
    options = {"window": 5, "scaling": 1.0}
    out = local_linear_attention(query, key, value, log_mix=mix, **options)
    assert_close(out, naive_local_linear_attention(query, key, value, log_mix=mix, **options), 1e-10)
    for other in (-60.0, 100.0):
        changed = local_linear_attention(query, key, value, log_mix=torch.full_like(mix, other), **options)
        assert (out - changed).abs().amax() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_equals_sdpa(dtype, tolerance, causal):
    inputs = leaves(*make_inputs(130, kv_heads=4, dtype=dtype))
    expected = F.scaled_dot_product_attention(*inputs, is_causal=causal)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    for window in (130, 1000):
        mix = torch.randn(HEADS, requires_grad=True)
        out = local_linear_attention(*inputs, window=window, log_mix=mix, causal=causal)
        assert_close(out, expected, tolerance)
        *grads, mix_grad = torch.autograd.grad(out.square().sum(), [*inputs, mix])
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad, 10 * tolerance)
        assert mix_grad.eq(0).all()
        with torch.no_grad():
            assert_close(local_linear_attention(*inputs, window=window, causal=causal), expected, tolerance)


def test_between_its_two_parts():
    """Without the linear part it is `local`; where the window counts for nothing, `linear` over the far keys."""
    inputs = make_inputs(150)
    none, all_linear = torch.full((HEADS,), -80.0), torch.full((HEADS,), 80.0)
    for causal in (False, True):
        options = {"window": 9, "causal": causal}
        near = local_linear_attention(*inputs, log_mix=none, **options)
        assert_close(near, local_attention(*inputs, **options), 1e-12)
    far = local_linear_attention(*inputs, log_mix=all_linear, window=9, causal=True)
    for length in (30, 150):
        cut = (inputs[0][:, :, length - 1 : length], *(x[:, :, : length - 9] for x in inputs[1:]))
        assert_close(far[:, :, length - 1 : length], naive_linear_attention(*cut), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(causal, feature_map):
    weights = draw_weights(feature_map)
    learned = [torch.randn(HEADS, dtype=torch.float64)] + ([] if weights is None else [weights])
    mask = torch.tensor([[False, *[True] * 8]])

    def function(query, key, value, mix, weights=None):
        options = {"window": 2, "causal": causal, "log_mix": mix, **map_options(feature_map, weights)}
        return local_linear_attention(query, key, value, mask, **options)

    assert_gradients(function, [*make_inputs(9, batch=1), *learned])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for feature_map in MAPS:
        options = {"window": 9, "causal": causal, **map_options(feature_map, draw_weights(feature_map))}
        for side in ("left", "right"):
            mask = padding_mask(side, 2, 150)
            assert_padding_is_inert(local_linear_attention, make_inputs(150), mask, junk, **options)


def test_padding_equals_no_padding():
    query, key, value = make_inputs(150, batch=1)
    for real in (slice(40, 150), slice(0, 110)):
        mask = torch.zeros(1, 150, dtype=torch.bool)
        mask[:, real] = True
        short = [tensor[:, :, real] for tensor in (query, key, value)]
        for causal in (False, True):
            out = local_linear_attention(query, key, value, mask, window=9, causal=causal)
            assert_close(out[:, :, real], local_linear_attention(*short, window=9, causal=causal), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        options = {"window": 9, "causal": causal}
        assert_padding_is_inert(local_linear_attention, make_inputs(150), mask, float("nan"), **options)
        assert local_linear_attention(*make_inputs(150), mask, **options).eq(0).all()


@pytest.mark.parametrize("feature_map", MAPS)
def test_causal(feature_map):
    assert_causal(local_linear_attention, window=6, **map_options(feature_map, draw_weights(feature_map)))


@pytest.mark.cover
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("window", [1, 2, 16, 200])
def test_decoding_from_the_state_equals_the_whole(side, window):
    query, key, value = make_inputs(150)
    mask = padding_mask(side, 2, 150)
    for feature_map in MAPS:
        options = {"window": window, "scaling": 0.7, **map_options(feature_map, draw_weights(feature_map))}
        options["log_mix"] = torch.randn(HEADS, dtype=torch.float64)
        whole = local_linear_attention(query, key, value, mask, causal=True, **options)
        for lengths in ([1] * 150, [70, 1, 1, 1, 70, 7], [130, 20]):
            outs, state, start = [], None, 0
            for length in lengths:
                now = slice(start, start + length)
                part = (query[:, :, now], key[:, :, now], value[:, :, now], None if mask is None else mask[:, now])
                out, state = local_linear_decode(*part, state, **options)
                outs.append(out)
                start += length
            assert_close(torch.cat(outs, 2), whole, 1e-12)


def test_decoding_ignores_what_padding_holds():
    query, key, value = make_inputs(40)
    mask = padding_mask("left", 2, 40)
    poisoned = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (key, value)]
    results = []
    for keys, values in ((key, value), poisoned):
        state = None
        for now in (slice(0, 5), slice(5, 30), slice(30, 31), slice(31, 32)):
            part = (query[:, :, now], keys[:, :, now], values[:, :, now], mask[:, now])
            out, state = local_linear_decode(*part, state, window=8)
        results.append(out)
    assert torch.equal(*results)


def test_the_state_has_a_bound():
    config = AttentionConfig("local_linear", window=8, feature_map="hedgehog")
    variant = LocalLinearAttention(config, HeadShape(HEADS, 2, DIM)).bfloat16()
    query, key, value = make_inputs(60, dtype=torch.bfloat16)
    state, sizes = None, []
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 60)):
        part = (x[:, :, start:end] for x in (query, key, value))
        out, state = variant.decode(*part, None, state, scaling=None, bias=None)
        assert out.dtype == torch.bfloat16
        sizes.append([tuple(tensor.shape) for tensor in state])
        assert [tensor.dtype for tensor in state] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bool]
    full = [(2, 2, 2 * DIM, VALUE_DIM + 1), (2, 2, 7, DIM), (2, 2, 7, VALUE_DIM), (2, 7)]
    assert sizes[0] == [full[0], (2, 2, 1, DIM), (2, 2, 1, VALUE_DIM), (2, 1)]
    assert sizes[1:] == [full] * 3


def test_the_weights_are_those_that_are_used():
    variant = LocalLinearAttention(AttentionConfig("local_linear", window=5), HeadShape(HEADS, 2, DIM))
    query, key, value = make_inputs(70)
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": None}
    weights = variant.weights(query, key, None, **options)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    assert_close(weights @ value.repeat_interleave(2, 1), variant(query, key, value, None, **options), 1e-12)


def test_the_mix_starts_where_the_mean_weights_agree():
    for feature_map in MAPS:
        config = AttentionConfig("local_linear", feature_map=feature_map)
        variant = LocalLinearAttention(config, HeadShape(heads=6, kv_heads=2, dim=64))
        assert variant.log_mix.shape == (6,)
        mean = variant.log_mix.exp() * FEATURE_MAPS[feature_map].mean(64)
        assert_close(mean, torch.full((6,), 0.5).exp(), 1e-5)
        torch.nn.init.zeros_(variant.log_mix)
        variant.reset_parameters()
        assert_close(variant.log_mix.exp() * FEATURE_MAPS[feature_map].mean(64), mean, 1e-5)


def test_what_must_differ():
    inputs = make_inputs(200)
    plain = local_linear_attention(*inputs, window=8)
    mix = torch.arange(1.0, 1.0 + HEADS)
    changes = [{"window": 9}, {"causal": True}, {"key_mask": padding_mask("right", 2, 200)}, {"scaling": 1.0}]
    changes += [{"log_mix": mix}, *(map_options(name, draw_weights(name)) for name in MAPS if name != "elu")]
    for changed in changes:
        out = local_linear_attention(*inputs, **{"window": 8, **changed})
        assert (out - plain).abs().max() > 1e-3, changed


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    assert_mean_unbiased(local_linear_attention, window=3, causal=causal)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype, tolerance, causal):
    inputs = make_inputs(300, dtype=dtype)
    options = {"window": 10, "causal": causal}
    out = local_linear_attention(*inputs, **options)
    assert out.dtype == dtype
    expected = naive_local_linear_attention(*(tensor.double() for tensor in inputs), **options)
    assert_close(out, expected, tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = local_linear_attention(*(tensor.float() for tensor in inputs), **options)
    assert_close(cast, expected, 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "feature_map"), [(False, "elu"), (True, "hedgehog")])
def test_compiles_whole(causal, feature_map):
    options = map_options(feature_map, draw_weights(feature_map))
    assert_compiles_whole(local_linear_attention, gradients=True, window=9, causal=causal, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal):
    assert_exports(local_linear_attention, window=9, causal=causal)


def test_macs():
    def macs(length, causal, **options):
        config = AttentionConfig("local_linear", window=10, **options)
        return LocalLinearAttention(config, HeadShape(4, 2, 8)).macs(length, causal)

    assert macs(1000, False) == 2 * 21 * 8 + 2 * 8 * 9
    assert macs(1000, True, feature_map="hedgehog") == 2 * 10 * 8 + 2 * 16 * 9 + 2 * 8 * 8
    assert macs(5, True) == 2 * 5 * 8 + 2 * 8 * 9


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        local_linear_attention(*make_inputs(9, 3), window=2)
    with pytest.raises(ConfigError, match="window must be at least 1"):
        local_linear_attention(*make_inputs(9), window=0)
    with pytest.raises(ConfigError, match=r"log_mix must be \[heads = 4\], got \(2,\)"):
        local_linear_attention(*make_inputs(9), window=2, log_mix=torch.zeros(2))
    with pytest.raises(ConfigError, match="'hedgehog' needs map_weights"):
        local_linear_attention(*make_inputs(9), window=2, feature_map="hedgehog")
