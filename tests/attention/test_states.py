"""The window-sized state of local attention, and the cache layer that holds a state."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_efficient import AttentionConfig, UnsupportedModelError
from hf_efficient.attention.cache import StateLayer
from hf_efficient.attention.kinds.local import local_attention, local_decode

from ..helpers import assert_close, leaves, padding_mask, random_examples
from .cases import make_bias, make_inputs

LOCAL = AttentionConfig("local", window=4, global_tokens=1)


def in_steps(inputs, cuts, key_mask=None, bias=None, **options):
    """`local_decode` of the pieces between `cuts`, and the states after each."""
    seen, state, outs, states = inputs[0].shape[2], None, [], []
    for start, end in zip([0, *cuts], [*cuts, seen], strict=True):
        piece = [tensor[:, :, start:end] for tensor in inputs]
        mask = None if key_mask is None else key_mask[:, start:end]
        own = None if bias is None else bias[..., seen - end : seen + end - start - 1]
        out, state = local_decode(*piece, mask, state, bias=own, **options)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 2), states


CUTS = {"token by token": range(1, 150), "chunks": (1, 3, 40, 41, 140), "prefill and tokens": range(100, 150)}


@pytest.mark.cover(2)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("global_tokens", [0, 3])
@pytest.mark.parametrize("window", [1, 2, 20, 70, 500])
def test_local_decoding_equals_the_whole(cuts, side, global_tokens, window):
    inputs, mask = make_inputs(150), padding_mask(side, 2, 150)
    for bias in (None, make_bias(150)):
        options = {"window": window, "global_tokens": global_tokens, "scaling": 0.7, "bias": bias}
        out, _ = in_steps(inputs, cuts, mask, **options)
        assert_close(out, local_attention(*inputs, mask, causal=True, **options), 1e-12)


@random_examples(60)
@given(data=st.data(), seen=st.integers(2, 90), window=st.integers(1, 80), global_tokens=st.integers(0, 5))
def test_any_chunks_equal_the_whole(data, seen, window, global_tokens):
    cuts = sorted(data.draw(st.sets(st.integers(1, seen - 1))))
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.4
    mask = data.draw(st.sampled_from([None, holes]))
    bias = data.draw(st.sampled_from([None, make_bias(seen)]))
    inputs = make_inputs(seen, batch=batch, kv_heads=kv_heads)
    options = {"window": window, "global_tokens": global_tokens, "bias": bias}
    out, _ = in_steps(inputs, cuts, mask, **options)
    assert_close(out, local_attention(*inputs, mask, causal=True, **options), 1e-12)


@pytest.mark.parametrize("global_tokens", [0, 3])
def test_local_decoding_has_the_gradients_of_the_whole(global_tokens):
    inputs, bias, mask = make_inputs(60), make_bias(60), padding_mask("left", 2, 60)
    options = {"window": 9, "global_tokens": global_tokens}
    grads = []
    for stepwise in (True, False):
        *given, own_bias = leaves(*inputs, bias)
        if stepwise:
            out, _ = in_steps(given, (7, 40, 41, 42), mask, own_bias, **options)
        else:
            out = local_attention(*given, mask, causal=True, bias=own_bias, **options)
        grads.append(torch.autograd.grad(out.square().sum(), [*given, own_bias]))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("global_tokens", [0, 2])
def test_padding_is_inert_in_a_state(junk, global_tokens):
    inputs, mask = make_inputs(60), padding_mask("left", 2, 60)
    mask[:, 50] = False
    padded = ~mask[:, None, :, None]
    poisoned = (inputs[0], *(tensor.masked_fill(padded, junk) for tensor in inputs[1:]))
    options = {"window": 9, "global_tokens": global_tokens}
    for cuts in ((30,), (30, 55), range(1, 60)):
        out, states = in_steps(inputs, cuts, mask, **options)
        actual, actual_states = in_steps(poisoned, cuts, mask, **options)
        assert torch.equal(actual, out)
        for state, expected in zip(actual_states[-1], states[-1], strict=True):
            assert torch.equal(state, expected)


@pytest.mark.parametrize("global_tokens", [0, 3])
def test_a_local_state_is_as_large_as_its_window(global_tokens):
    """Tokens, and bytes of storage: a view of the prompt would keep all of it in memory."""

    def held(state):
        return sum(tensor.untyped_storage().nbytes() for tensor in state)

    options = {"window": 20, "global_tokens": global_tokens}
    for cuts in (range(1, 150), (140,), (130, 149)):
        _, states = in_steps(make_inputs(150), cuts, **options)
        for end, state in zip([*cuts, 150], states, strict=True):
            assert state[0].shape[2] == state[1].shape[2] == state[2].shape[1] == min(19, end)
        assert held(states[-1]) <= held(in_steps(make_inputs(19), (), **options)[1][0]) * 20 / 19


def test_what_a_local_state_must_tell_apart():
    inputs, mask = make_inputs(60), torch.ones(2, 60, dtype=torch.bool)
    mask[:, 28] = False
    plain, _ = in_steps(inputs, (30, 31), window=9)
    for changed in ({"window": 8}, {"window": 9, "global_tokens": 1}, {"window": 9, "key_mask": mask}):
        assert (in_steps(inputs, (30, 31), **changed)[0][:, :, 31:] - plain[:, :, 31:]).abs().max() > 1e-3, changed
    bias = make_bias(60)
    far = bias.clone()
    far[..., :40] += 1.0  # the keys more than 19 back
    with_bias, changed = (in_steps(inputs, (30, 31), bias=b, window=9, global_tokens=1)[0] for b in (bias, far))
    assert (changed - with_bias)[:, :, 31:].abs().max() > 1e-3  # the global token is seen at its true distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_local_state_keeps_its_dtype(dtype):
    inputs = make_inputs(60, dtype=dtype)
    options = {"window": 9, "global_tokens": 1}
    out, states = in_steps(inputs, (30, 31, 32), **options)
    assert out.dtype == states[-1][0].dtype == dtype
    expected = local_attention(*(tensor.double() for tensor in inputs), causal=True, **options)
    assert_close(out, expected, {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype])


def layer_with(*state, tokens=5):
    layer = StateLayer(LOCAL)
    layer.expect(LOCAL)
    layer.update(torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1))
    layer.advance(state)
    return layer


def test_a_state_layer_moves_its_rows():
    a, b = torch.arange(6.0).view(3, 2), torch.arange(3)
    layer = layer_with(a, b)
    assert layer.get_seq_length() == 5 and layer.get_max_length() == -1 and layer.get_mask_sizes(2) == (7, 0)
    assert layer.nbytes == 3 * 2 * 4 + 3 * 8
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.state[0], a[[2, 0, 0]]) and torch.equal(layer.state[1], b[[2, 0, 0]])
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    assert layer.state[1].tolist() == [2, 2, 0, 0]
    layer.offload()
    layer.prefetch()
    assert layer.state[1].tolist() == [2, 2, 0, 0]
    layer.reset()
    assert layer.state is None and layer.get_seq_length() == 0 and layer.nbytes == 0
    for move in (layer.reorder_cache, layer.batch_select_indices):
        move(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert layer.state is None


def test_a_state_cannot_be_cropped():
    cache = DynamicCache()
    cache.layers = [layer_with(torch.zeros(1)), DynamicLayer()]
    assert not cache.is_croppable and not cache.is_compileable
    for tokens in (-1, 0):
        with pytest.raises(UnsupportedModelError, match=r"take tokens back .* without assistant_model"):
            cache.crop(tokens)


def test_a_state_layer_knows_its_reader():
    layer, key = layer_with(torch.zeros(1)), torch.zeros(1, 1, 2, 1)
    with pytest.raises(UnsupportedModelError, match="Only the model that filled it"):
        layer.update(key, key)
    with pytest.raises(UnsupportedModelError, match=r"state of .*'window': 4.* continued with .*'window': 5"):
        layer.expect(AttentionConfig("local", window=5, global_tokens=1))
    layer.expect(copy.deepcopy(LOCAL))
    layer.update(key, key)  # and then the attention fails, or never hears of the layer
    with pytest.raises(UnsupportedModelError, match="saw 7 tokens, of which only 5 reached its state"):
        layer.expect(LOCAL)
    layer.reset()
    layer.expect(AttentionConfig("linear"))
