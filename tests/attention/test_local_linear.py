"""local_linear_attention against its naive twin, SDPA, and the limits it promises."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficient import AttentionConfig
from hf_efficient.attention.kinds import ATTENTIONS
from hf_efficient.attention.local_linear import local_linear_attention
from hf_efficient.attention.naive import naive_local_linear_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ..helpers import assert_close, padding_mask
from .cases import (
    HEADS,
    assert_causal,
    assert_equals_naive,
    assert_mean_unbiased,
    assert_padding_is_inert,
    compiled,
    make_inputs,
)
from .maps import draw_weights, map_options, mapped

MIX = torch.linspace(-1, 1, HEADS, dtype=torch.float64)


def pair(feature_map, **options):
    """The function and its twin, with the weights of the map in the place of a bias."""
    both = local_linear_attention, naive_local_linear_attention
    return [mapped(partial(function, log_mix=MIX, **options), feature_map) for function in both]


@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("feature_map", ["elu", "favor", "hedgehog"])
def test_equals_naive(seen, causal, side, feature_map):
    mask = padding_mask(side, 2, seen)
    for window in (1, 6, 70):
        fast, naive = pair(feature_map, window=window, causal=causal, scaling=0.7)
        assert_equals_naive(fast, naive, make_inputs(seen), mask, draw_weights(feature_map))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equals_naive_at_a_thousand(causal, kv_heads):
    fast, naive = pair("hedgehog", window=33, causal=causal)
    weights = draw_weights("hedgehog", kv_heads)
    assert_equals_naive(fast, naive, make_inputs(1000, kv_heads=kv_heads), padding_mask("left", 2, 1000), weights)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seen=st.integers(1, 200), window=st.integers(1, 90))
def test_any_shape_equals_naive(data, seen, window):
    causal = data.draw(st.booleans())
    length = data.draw(st.integers(1, seen)) if causal else seen
    holes = torch.rand(2, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    mask = data.draw(st.sampled_from([None, holes]))
    fast, naive = pair("elu", window=window, causal=causal)
    assert_equals_naive(fast, naive, make_inputs(seen, length), mask)


@pytest.mark.parametrize("causal", [False, True])
def test_the_mix_learns_as_in_the_twin(causal):
    inputs, grads = make_inputs(140), []
    for function in (local_linear_attention, naive_local_linear_attention):
        mix = MIX.clone().requires_grad_()
        function(*inputs, window=9, causal=causal, log_mix=mix).square().sum().backward()
        grads.append(mix.grad)
    assert_close(grads[0], grads[1], 1e-10)
    assert grads[0].abs().min() > 0


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_equals_sdpa(causal):
    query, key, value = make_inputs(130, kv_heads=4)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    for window in (130, 1000):
        for inputs in ((query, key, value), (query.requires_grad_(), key, value)):
            out = local_linear_attention(*inputs, window=window, causal=causal, log_mix=MIX)
            assert_close(out, expected, 1e-12)
    assert (local_linear_attention(query, key, value, window=60, causal=causal) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_are_stable(causal):
    query, key, value = make_inputs(150)
    inputs = (60 * query, 60 * key, value)
    options = {"window": 9, "causal": causal, "log_mix": MIX}
    out = local_linear_attention(*inputs, **options)
    assert torch.isfinite(out).all()
    assert_close(out, naive_local_linear_attention(*inputs, **options), 1e-10)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right"):
        options = {"window": 9, "causal": causal, "log_mix": MIX}
        assert_padding_is_inert(local_linear_attention, make_inputs(150), padding_mask(side, 2, 150), junk, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_equals_no_padding(causal):
    query, key, value = make_inputs(150, batch=1)
    mask = torch.arange(150)[None] >= 40
    options = {"window": 9, "causal": causal, "log_mix": MIX}
    out = local_linear_attention(query, key, value, mask, **options)
    short = [tensor[:, :, 40:] for tensor in (query, key, value)]
    assert_close(out[:, :, 40:], local_linear_attention(*short, **options), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        options = {"window": 9, "causal": causal}
        assert_padding_is_inert(local_linear_attention, make_inputs(150), mask, float("nan"), **options)
        assert local_linear_attention(*make_inputs(150), mask, **options).eq(0).all()


def test_causal():
    assert_causal(local_linear_attention, window=6, log_mix=MIX)


@pytest.mark.parametrize("feature_map", ["elu", "favor", "hedgehog"])
@pytest.mark.parametrize("window", [1, 16, 400])
def test_decoding_equals_the_whole(feature_map, window):
    """Token by token, and in chunks, from a state whose size does not grow."""
    config = AttentionConfig("local_linear", window=window, feature_map=feature_map)
    variant = ATTENTIONS["local_linear"](config, HeadShape(HEADS, 2, 4)).double()
    variant.reset_parameters()
    query, key, value = make_inputs(150)
    mask = padding_mask("left", 2, 150)
    with torch.no_grad():
        whole = variant(query, key, value, mask, causal=True, scaling=None, dropout=0.0, bias=None)
        for cuts in ((0, 70, 71, 72, 73, 120, 150), (0, 1, 2, 150), tuple(range(151))):
            state, parts, sizes = None, [], []
            for start, end in itertools.pairwise(cuts):
                new = [tensor[:, :, start:end] for tensor in (query, key, value)]
                out, state = variant.decode(*new, mask[:, start:end], state, scaling=None, bias=None)
                parts.append(out)
                sizes.append(sum(tensor.numel() for tensor in state))
            real = mask[:, None, :, None]
            assert_close(torch.cat(parts, 2).masked_fill(~real, 0), whole.masked_fill(~real, 0), 1e-11)
        assert window > 150 or len(set(sizes[window + 5 :])) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    inputs = [tensor.requires_grad_() for tensor in (*make_inputs(9, batch=1), MIX.clone())]
    mask = torch.tensor([[False, *[True] * 8]])

    def function(query, key, value, mix):
        return local_linear_attention(query, key, value, mask, window=2, causal=causal, log_mix=mix)

    assert torch.autograd.gradcheck(function, inputs)


def test_what_must_differ():
    inputs = make_inputs(200)
    plain = local_linear_attention(*inputs, window=8)
    changes = ({"window": 9}, {"causal": True}, {"scaling": 1.0}, {"log_mix": MIX}, {"feature_map": "relu"})
    for changed in (*changes, {"key_mask": padding_mask("right", 2, 200)}):
        assert (local_linear_attention(*inputs, **{"window": 8, **changed}) - plain).abs().max() > 1e-3, changed


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    assert_mean_unbiased(local_linear_attention, window=3, causal=causal)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    inputs = make_inputs(300, dtype=dtype)
    out = local_linear_attention(*inputs, window=10)
    assert out.dtype == dtype
    assert_close(out, naive_local_linear_attention(*(tensor.double() for tensor in inputs), window=10), tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole(causal):
    options = {"window": 9, "causal": causal}
    function = compiled(local_linear_attention, **options)
    for seen in (150, 301, 192):
        inputs, mask = make_inputs(seen), padding_mask("left", 2, seen)
        assert_close(function(*inputs, mask), local_linear_attention(*inputs, mask, **options), 1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return local_linear_attention(query, key, value, mask, window=9, causal=causal)

    auto = torch.export.Dim.AUTO
    example = (*make_inputs(200), padding_mask("right", 2, 200))
    program = torch.export.export(Module(), example, dynamic_shapes=[{0: auto, 2: auto}] * 3 + [{0: auto, 1: auto}])
    for batch, seen in ((1, 70), (3, 301), (2, 192)):
        inputs = (*make_inputs(seen, batch=batch), padding_mask("left", batch, seen))
        assert_close(program.module()(*inputs), Module()(*inputs), 1e-11)


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        local_linear_attention(*make_inputs(9, 3), window=2)
    with pytest.raises(ConfigError, match="window must be at least 1"):
        local_linear_attention(*make_inputs(9), window=0)
    with pytest.raises(ConfigError, match="Did you mean 'favor'"):
        local_linear_attention(*make_inputs(9), window=2, feature_map="favour")
    assert map_options("elu", None) == {"feature_map": "elu", "map_weights": None}
