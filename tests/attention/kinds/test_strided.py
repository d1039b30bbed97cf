"""strided_attention against its naive twin, SDPA, and the limits it promises."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient import AttentionConfig
from hf_efficient.attention.engines import gathered
from hf_efficient.attention.engines.blocks import lay_out
from hf_efficient.attention.kinds.strided import StridedAttention, _spread, strided_attention
from hf_efficient.attention.naive import naive_strided_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples
from ..cases import (
    DIM,
    HEADS,
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

SMALL = {"block_size": 4, "num_blocks": 3}


@pytest.fixture(params=[1 << 21, 600], ids=["whole", "pieces"])
def _pieces(request, monkeypatch):
    """Small inputs are done at once; a lower limit sends them through the pieces of large ones."""
    monkeypatch.setitem(gathered.PIECE, "cpu", request.param)


def holes_mask(batch, seen):
    return torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
def test_equals_naive(seen, causal, side):
    mask = holes_mask(2, seen) if side == "holes" else padding_mask(side, 2, seen)
    for block_size, num_blocks, global_tokens in ((4, 3, 0), (1, 1, 1), (8, 0, 0), (3, 5, 7)):
        options = {"block_size": block_size, "num_blocks": num_blocks, "global_tokens": global_tokens}
        options["causal"] = causal
        assert_equals_naive(strided_attention, naive_strided_attention, make_inputs(seen), mask, **options)
        options["scaling"] = 1.0
        inputs, bias = make_inputs(seen, kv_heads=1), make_bias(seen)
        assert_equals_naive(strided_attention, naive_strided_attention, inputs, mask, bias, **options)


@pytest.mark.cover
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("causal", [False, True])
def test_equals_naive_at_a_thousand(causal):
    mask, bias = padding_mask("left", 2, 1000), make_bias(1000)
    options = {"block_size": 16, "num_blocks": 5, "causal": causal, "global_tokens": 2}
    assert_equals_naive(strided_attention, naive_strided_attention, make_inputs(1000), mask, bias, **options)


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(("seen", "length"), [(5, 1), (40, 1), (150, 1), (150, 3), (150, 63), (300, 200)])
@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
@pytest.mark.parametrize("global_tokens", [0, 3])
def test_queries_at_the_end_equal_naive(seen, length, side, global_tokens):
    inputs = make_inputs(seen, length)
    mask = holes_mask(2, seen) if side == "holes" else padding_mask(side, 2, seen)
    for bias in (None, make_bias(seen, length)):
        options = {**SMALL, "causal": True, "global_tokens": global_tokens}
        assert_equals_naive(strided_attention, naive_strided_attention, inputs, mask, bias, **options)


@random_examples(60)
@given(data=st.data(), seen=st.integers(1, 100), block_size=st.integers(1, 20), global_tokens=st.integers(0, 5))
def test_any_shape_equals_naive(data, seen, block_size, global_tokens):
    causal = data.draw(st.booleans())
    length = data.draw(st.integers(1, seen)) if causal else seen
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    mask = data.draw(st.sampled_from([None, holes_mask(batch, seen)]))
    bias = data.draw(st.sampled_from([None, make_bias(seen, length)]))
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    options = {"block_size": block_size, "global_tokens": global_tokens, "causal": causal}
    options["num_blocks"] = data.draw(st.integers(0, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gathered.PIECE, "cpu", data.draw(st.sampled_from([1, 5000, 1 << 20])))
        assert_equals_naive(strided_attention, naive_strided_attention, inputs, mask, bias, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 5, 12])
def test_blocks_are_spread_evenly(causal, num_blocks):
    tokens = torch.zeros(1, 1, 37, 1)
    chosen = _spread(lay_out(tokens, tokens, None, 4), num_blocks, causal, missing=37)[0, :, 0]
    for i, row in enumerate(chosen.tolist()):
        own, *others = row
        total, eligible = 10, i if causal else 9
        back = [(own - j) % total for j in others if j < 37]
        assert own == i
        assert len(back) == len(set(back)) == min(num_blocks, eligible)
        assert all(1 <= distance <= eligible for distance in back)
        if back:
            assert back[0] == 1
        if len(back) > 1:
            assert back[-1] == eligible
            steps = [far - near for near, far in pairwise(back)]
            assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_equal_sdpa(dtype, tolerance, causal, monkeypatch):
    query, key, value = make_inputs(130, kv_heads=4, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    for _ in range(2):
        for global_tokens in (0, 2):
            for num_blocks in (32, 100):
                options = {"block_size": 4, "num_blocks": num_blocks, "global_tokens": global_tokens}
                out = strided_attention(query, key, value, causal=causal, **options)
                assert_close(out, expected, tolerance)
        monkeypatch.setattr(
            "hf_efficient.attention.kinds.strided.sees_all", lambda *sizes: False
        )  # through the blocks


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    inputs = make_inputs(200, kv_heads=2, dtype=dtype)
    out = strided_attention(*inputs, **SMALL, global_tokens=1)
    assert out.dtype == dtype
    expected = naive_strided_attention(*(tensor.double() for tensor in inputs), **SMALL, global_tokens=1)
    assert_close(out, expected, tolerance)


@pytest.mark.usefixtures("_pieces")
def test_autocast():
    query, key, value = (x.requires_grad_() for x in make_inputs(200, dtype=torch.float32))
    bias = make_bias(200).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = strided_attention(query, key, value, **SMALL, global_tokens=1, bias=bias)
        out.sum().backward()  # inside, where what is done again must not be cast again
    assert out.dtype == torch.bfloat16
    assert all(torch.isfinite(x.grad).all() and x.grad.dtype == torch.float32 for x in (query, key, value, bias))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("global_tokens", [0, 1])
@pytest.mark.parametrize("piece", [1, 1000])
def test_gradcheck(causal, global_tokens, piece, monkeypatch):
    monkeypatch.setitem(gathered.PIECE, "cpu", piece)
    mask = torch.tensor([[False, *[True] * 6]])

    def function(query, key, value, bias):
        options = {"block_size": 2, "num_blocks": 1, "causal": causal, "global_tokens": global_tokens, "bias": bias}
        return strided_attention(query, key, value, mask, **options)

    assert_gradients(function, [*make_inputs(7, batch=1), make_bias(7)])


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for mask in (padding_mask("left", 2, 150), padding_mask("right", 2, 150), holes_mask(2, 150)):
        for global_tokens in (0, 2):
            options = {**SMALL, "causal": causal, "global_tokens": global_tokens}
            assert_padding_is_inert(strided_attention, make_inputs(150), mask, junk, **options)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_queries_are_zero_and_inert(causal, side):
    mask = holes_mask(2, 150) if side == "holes" else padding_mask(side, 2, 150)
    query, key, value = make_inputs(150)
    options = {**SMALL, "causal": causal, "global_tokens": 2, "key_mask": mask}
    expected = strided_attention(query, key, value, **options)
    query, key, value = leaves(query.masked_fill(~mask[:, None, :, None], float("nan")), key, value)
    out = strided_attention(query, key, value, **options)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert out.masked_select(~mask[:, None, :, None]).eq(0).all()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("causal", [False, True])
def test_padding_equals_no_padding(causal):
    query, key, value = make_inputs(150, batch=2)
    for real in (torch.arange(150) >= 43, torch.arange(150) < 107, holes_mask(1, 150)[0]):
        mask = torch.stack([real, torch.ones(150, dtype=torch.bool)])
        short = [tensor[:1, :, real] for tensor in (query, key, value)]
        options = {**SMALL, "causal": causal, "global_tokens": 2}
        out = strided_attention(query, key, value, mask, **options)
        assert_close(out[:1, :, real], strided_attention(*short, **options), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        for global_tokens in (0, 2):
            options = {**SMALL, "global_tokens": global_tokens, "causal": causal}
            assert_padding_is_inert(strided_attention, make_inputs(150), mask, float("nan"), **options)
            assert strided_attention(*make_inputs(150), mask, **options).eq(0).all()


def test_causal():
    for options in (SMALL, {"block_size": 16, "num_blocks": 2, "global_tokens": 2}):
        assert_causal(strided_attention, **options)


@pytest.mark.parametrize("side", [None, "left", "holes"])
def test_decoding_equals_the_whole(side):
    query, key, value = make_inputs(150)
    mask = holes_mask(2, 150) if side == "holes" else padding_mask(side, 2, 150)
    options = {**SMALL, "causal": True, "global_tokens": 2}
    whole = strided_attention(query, key, value, mask, **options)
    for seen, length in [(seen, 1) for seen in range(1, 151)] + [(60, 7), (150, 3), (150, 70), (149, 149)]:
        seen_mask = None if mask is None else mask[:, :seen]
        new = query[:, :, seen - length : seen]
        step = strided_attention(new, key[:, :, :seen], value[:, :, :seen], seen_mask, **options)
        assert_close(step, whole[:, :, seen - length : seen], 1e-12)


def test_what_must_differ():
    inputs = make_inputs(200)
    plain = strided_attention(*inputs, **SMALL)
    mask = padding_mask("right", 2, 200)
    changes = [{"block_size": 5}, {"num_blocks": 4}, {"global_tokens": 1}, {"bias": make_bias(200)}]
    for changed in (*changes, {"causal": True}, {"key_mask": mask}, {"scaling": 1.0}):
        assert (strided_attention(*inputs, **{**SMALL, **changed}) - plain).abs().max() > 1e-3, changed
    # A global token changes queries that do not see its block, and sees far keys itself.
    difference = (strided_attention(*inputs, **SMALL, global_tokens=1) - plain).abs().amax((0, 1, 3))
    assert difference[0] > 1e-3
    assert difference[30] > 1e-3


def test_dropout_is_unbiased():
    assert_mean_unbiased(strided_attention, block_size=2, num_blocks=2, global_tokens=1)


def test_dropout_is_the_same_going_back(monkeypatch):
    """The gradient of v is the transposed weights, so that each output must equal v's share of it."""
    monkeypatch.setitem(gathered.PIECE, "cpu", 1)
    query, key, value = leaves(*make_inputs(50))
    for seed in range(3):
        torch.manual_seed(seed)
        out = strided_attention(query, key, value, **SMALL, dropout=0.4)
        state = torch.get_rng_state()
        (grad,) = torch.autograd.grad(out.sum(), value)
        assert torch.equal(torch.get_rng_state(), state)
        assert_close((grad * value).sum(), out.sum(), 1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "global_tokens"), list(product((False, True), (0, 2))))
def test_compiles_whole(causal, global_tokens):
    assert_compiles_whole(strided_attention, **SMALL, causal=causal, global_tokens=global_tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal, global_tokens):
    options = {**SMALL, "causal": causal, "global_tokens": global_tokens}
    options["masked"] = bool(global_tokens)  # the other half of what they share is that of `topk`
    assert_exports(strided_attention, ((1, 70), (3, 301), (2, 192), (2, 3), (1, 1)), **options)


def test_the_layout_in_memory_changes_nothing(monkeypatch):
    monkeypatch.setitem(gathered.PIECE, "cpu", 3000)
    inputs, mask = make_inputs(150), padding_mask("left", 2, 150)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    padded = [torch.cat([x, x], 2)[:, :, :150] for x in inputs]
    expected = strided_attention(*inputs, mask, **SMALL)
    for tensors in (by_token, padded, [inputs[0], by_token[1], inputs[2]], [*by_token[:2], inputs[2]]):
        out = strided_attention(*tensors, mask, **SMALL)
        assert_close(out, expected, 1e-12)
    assert out.transpose(1, 2).is_contiguous()  # what the layers reshape to


def test_weights_and_cost():
    config = AttentionConfig("strided", **SMALL, global_tokens=1)
    variant = StridedAttention(config, HeadShape(HEADS, 2, DIM))
    query, key, value = make_inputs(50)
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": make_bias(50)}
    weights = variant.weights(query, key, None, **options)
    assert_close(weights.sum(-1), torch.ones(2, HEADS, 50, dtype=torch.float64), 1e-12)
    assert_close(weights @ value.repeat_interleave(2, 1), variant(query, key, value, None, **options), 1e-12)
    assert variant.macs(1000, False) == 2 * (4 * 4 + 1) * DIM
    assert variant.macs(10, True) == 2 * 10 * DIM


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        strided_attention(*make_inputs(9, 3), **SMALL)
    for name, value in (("block_size", 0), ("num_blocks", -1), ("global_tokens", -1)):
        with pytest.raises(ConfigError, match=f"{name} must be at least"):
            strided_attention(*make_inputs(9), **{**SMALL, name: value})
