"""topk_attention and its decoding against the naive twin, SDPA, and the limits they promise."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient import AttentionConfig
from hf_efficient.attention.engines import gathered
from hf_efficient.attention.kinds.topk import TopkAttention, topk_attention, topk_decode
from hf_efficient.attention.naive import naive_full_attention, naive_topk_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples, selected
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
    make_inputs,
)

SMALL = {"block_size": 4, "top_k": 3}


@pytest.fixture(params=[1 << 21, 600], ids=["whole", "pieces"])
def _pieces(request, monkeypatch):
    """Small inputs are done at once; a lower limit sends them through the pieces of large ones."""
    monkeypatch.setitem(gathered.PIECE, "cpu", request.param)


def make_mask(side, seen, batch=2):
    if side == "holes":
        return torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    return padding_mask(side, batch, seen)


def decode(inputs, mask, steps, **options):
    """The outputs of `topk_decode` for so many tokens at a time, one after the other."""
    outs, state, begin = [], None, 0
    for length in steps:
        new = [x[:, :, begin : begin + length] for x in inputs]
        new_mask = None if mask is None else mask[:, begin : begin + length]
        out, state = topk_decode(*new, new_mask, state, **options)
        outs.append(out)
        begin += length
        assert all(len(tensor) == len(inputs[0]) for tensor in state)
    return torch.cat(outs, 2)


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
def test_equals_naive(seen, causal, side):
    mask = make_mask(side, seen)
    for block_size, top_k, global_tokens, kv_heads in ((4, 3, 0, 2), (2, 2, 1, 1), (8, 1, 0, 4), (3, 5, 7, 2)):
        options = {"block_size": block_size, "top_k": top_k, "global_tokens": global_tokens, "causal": causal}
        inputs = make_inputs(seen, kv_heads=kv_heads)
        assert_equals_naive(topk_attention, naive_topk_attention, inputs, mask, **options)
    assert_equals_naive(topk_attention, naive_topk_attention, inputs, mask, **options, scaling=1.0)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_naive_at_a_thousand(causal, monkeypatch):
    monkeypatch.setitem(gathered.PIECE, "cpu", 30_000)
    options = {"block_size": 16, "top_k": 5, "causal": causal, "global_tokens": 2}
    mask = padding_mask("left", 2, 1000)
    assert_equals_naive(topk_attention, naive_topk_attention, make_inputs(1000), mask, **options)


@random_examples(60)
@given(data=st.data(), seen=st.integers(1, 80), block_size=st.integers(1, 20), global_tokens=st.integers(0, 5))
def test_any_shape_equals_naive(data, seen, block_size, global_tokens):
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    mask = data.draw(st.sampled_from([None, make_mask("holes", seen, batch)]))
    options = {"block_size": block_size, "global_tokens": global_tokens, "causal": data.draw(st.booleans())}
    options["top_k"] = data.draw(st.integers(1, 9))
    inputs = make_inputs(seen, batch=batch, kv_heads=kv_heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gathered.PIECE, "cpu", data.draw(st.sampled_from([1, 5000, 1 << 20])))
        assert_equals_naive(topk_attention, naive_topk_attention, inputs, mask, **options)


@pytest.mark.parametrize(
    ("causal", "others"), [(False, [2, 2, 5, 2, 2, 2, 2, 2]), (True, [None, 0, 1, 2, 2, 2, 2, 2])]
)
def test_finds_the_block_that_fits(causal, others):
    """All queries look for what is in block 2, then for block 5; among the rest, which are equal, the last wins."""
    query, key, _ = make_inputs(32)
    query, key = torch.ones_like(query), torch.zeros_like(key)
    key[:, :, 8:12], key[:, :, 20:24] = 2, 1
    values = torch.eye(32, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = topk_attention(query, key, values, block_size=4, top_k=2, causal=causal)
    for block, other in enumerate(others):
        seen = {key // 4 for key in weights[0, 0, 4 * block + 3].nonzero().flatten().tolist()}
        assert seen == {block, other} - {None}


@pytest.mark.parametrize("causal", [False, True])
def test_heads_of_a_group_choose_for_themselves(causal):
    query, key, value = make_inputs(80, kv_heads=1)
    options = {**SMALL, "causal": causal}
    alone = [topk_attention(query[:, head : head + 1], key, value, **options) for head in range(HEADS)]
    assert_close(topk_attention(query, key, value, **options), torch.cat(alone, 1), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_the_choice_has_no_gradient(causal):
    """Far from a change of the choice, the gradient is that of softmax over the chosen blocks."""
    inputs, mask = make_inputs(9, batch=1), torch.tensor([[False, *[True] * 8]])
    for piece in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(gathered.PIECE, "cpu", piece)
            options = {"block_size": 2, "top_k": 2, "global_tokens": 1, "causal": causal}
            assert_gradients(lambda *x, o=options: topk_attention(*x, mask, **o), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_equal_sdpa(dtype, tolerance, causal, monkeypatch):
    query, key, value = make_inputs(130, kv_heads=4, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    for top_k in (33, 100):
        out = topk_attention(query, key, value, block_size=4, top_k=top_k, causal=causal)
        assert_close(out, expected, tolerance)
    monkeypatch.setattr("hf_efficient.attention.kinds.topk.sees_all", lambda *sizes: False)
    for global_tokens in (0, 2):  # through the blocks
        options = {"block_size": 4, "top_k": 33, "causal": causal, "global_tokens": global_tokens}
        assert_close(topk_attention(query, key, value, **options), expected, tolerance)


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype, causal):
    inputs = make_inputs(200, dtype=dtype)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    options = {**SMALL, "global_tokens": 1, "causal": causal}
    out = topk_attention(*inputs, **options)
    assert out.dtype == dtype
    expected = naive_topk_attention(*(tensor.double() for tensor in inputs), **options)
    assert_close(out, expected, tolerance)


@pytest.mark.usefixtures("_pieces")
def test_autocast():
    inputs = leaves(*make_inputs(200, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = topk_attention(*inputs, **SMALL, global_tokens=1)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    assert_close(out, naive_topk_attention(*inputs, **SMALL, global_tokens=1), 3e-2)


@pytest.mark.cover(2)
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right", "holes"):
        for global_tokens in (0, 2):
            options = {**SMALL, "causal": causal, "global_tokens": global_tokens}
            assert_padding_is_inert(topk_attention, make_inputs(150), make_mask(side, 150), junk, **options)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_queries_are_zero_and_inert(causal, side):
    mask = make_mask(side, 150)
    query, key, value = make_inputs(150)
    options = {**SMALL, "causal": causal, "global_tokens": 2, "key_mask": mask}
    expected = topk_attention(query, key, value, **options)
    query, key, value = leaves(query.masked_fill(~mask[:, None, :, None], float("nan")), key, value)
    out = topk_attention(query, key, value, **options)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert out.masked_select(~mask[:, None, :, None]).eq(0).all()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_padding_equals_no_padding(causal, ties):
    query, key, value = make_inputs(150)
    if ties:  # equal scores must be decided by what a row holds, not by its length
        query, key = query.sign(), torch.ones_like(key)
    for real in (torch.arange(150) >= 43, torch.arange(150) < 107, make_mask("holes", 150)[0]):
        mask = torch.stack([real, torch.ones(150, dtype=torch.bool)])
        short = [tensor[:1, :, real] for tensor in (query, key, value)]
        options = {**SMALL, "causal": causal, "global_tokens": 2}
        out = topk_attention(query, key, value, mask, **options)
        assert_close(out[:1, :, real], topk_attention(*short, **options), 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        options = {**SMALL, "global_tokens": 2, "causal": causal}
        assert_padding_is_inert(topk_attention, make_inputs(150), mask, float("nan"), **options)
        assert topk_attention(*make_inputs(150), mask, **options).eq(0).all()


def test_causal():
    for options in (SMALL, {"block_size": 16, "top_k": 2, "global_tokens": 2}):
        assert_causal(topk_attention, **options)


@pytest.mark.parametrize("at", [41, 42, 43, 44])
def test_no_later_query_takes_part_in_the_choice(at):
    """The other queries of a block come after its first: they must not change what the first sees."""
    query, key, value = make_inputs(90)
    options = {**SMALL, "causal": True}
    before = topk_attention(query, key, value, **options)
    changed = query.clone()
    changed[:, :, at:] = 10 * torch.randn_like(query[:, :, at:])
    assert torch.equal(topk_attention(changed, key, value, **options)[:, :, :at], before[:, :, :at])


@pytest.mark.cover(2)
@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
@pytest.mark.parametrize("global_tokens", [0, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_decoding_equals_the_whole(side, global_tokens, ties):
    query, key, value = inputs = make_inputs(70)
    if ties:
        inputs = (query.sign(), torch.ones_like(key), value)
    mask, options = make_mask(side, 70), {**SMALL, "global_tokens": global_tokens}
    whole = topk_attention(*inputs, mask, **options, causal=True)
    for steps in ([1] * 70, [23, *[1] * 47], [7] * 10, [30, 1, 1, 33, 5], [70], [1, 69]):
        assert_close(decode(inputs, mask, steps, **options), whole, 1e-12)


def test_decoding_keeps_junk_out():
    mask = make_mask("holes", 50)
    query, key, value = make_inputs(50)
    expected = decode((query, key, value), mask, [20, *[1] * 20, 10], **SMALL)
    key, value = (x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (key, value))
    assert torch.equal(decode((query, key, value), mask, [20, *[1] * 20, 10], **SMALL), expected)


def test_states_can_be_reordered():
    inputs = make_inputs(50)
    mask, order = make_mask("left", 50), torch.tensor([1, 0, 1])
    first = [x[:, :, :39] for x in inputs]
    _, state = topk_decode(*first, mask[:, :39], None, **SMALL)
    rest = [x[order, :, 39:] for x in inputs]
    out, _ = topk_decode(*rest, mask[order, 39:], tuple(x[order] for x in state), **SMALL)
    whole = topk_attention(*inputs, mask, **SMALL, causal=True)
    assert_close(out, whole[order, :, 39:], 1e-12)


def test_decoding_in_half_precision():
    inputs = make_inputs(60, dtype=torch.bfloat16)
    whole = topk_attention(*inputs, **SMALL, causal=True)
    out = decode(inputs, None, [30, *[1] * 30], **SMALL)
    assert out.dtype == torch.bfloat16
    assert_close(out, whole, 2e-2)


def test_what_must_differ():
    inputs = make_inputs(200)
    plain = topk_attention(*inputs, **SMALL)
    assert (naive_full_attention(*inputs) - plain).abs().max() > 1e-3
    changes = [{"block_size": 5}, {"top_k": 4}, {"global_tokens": 1}, {"causal": True}, {"scaling": 1.0}]
    for changed in (*changes, {"key_mask": padding_mask("right", 2, 200)}):
        assert (topk_attention(*inputs, **{**SMALL, **changed}) - plain).abs().max() > 1e-3, changed


def test_dropout_is_unbiased():
    assert_mean_unbiased(topk_attention, block_size=2, top_k=2, global_tokens=1)


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "global_tokens"), list(product((False, True), (0, 2))))
def test_compiles_whole(causal, global_tokens):
    assert_compiles_whole(topk_attention, **SMALL, causal=causal, global_tokens=global_tokens)


@pytest.mark.parametrize(
    ("causal", "global_tokens"), selected(product((False, True), (0, 2)), lambda causal, count: causal and count == 2)
)
def test_exports_with_any_length(causal, global_tokens):
    options = {**SMALL, "causal": causal, "global_tokens": global_tokens}
    options["masked"] = not global_tokens  # the other half of what they share is that of `strided`
    assert_exports(topk_attention, ((1, 70), (3, 301), (2, 192), (2, 3), (1, 1)), **options)


def test_weights_cost_and_decoding_of_the_module():
    config = AttentionConfig("topk", **SMALL, global_tokens=1)
    variant = TopkAttention(config, HeadShape(HEADS, 2, DIM))
    query, key, value = make_inputs(50)
    options = {"causal": True, "scaling": 0.7, "dropout": 0.0, "bias": None}
    weights, whole = variant.weights(query, key, None, **options), variant(query, key, value, None, **options)
    assert_close(weights.sum(-1), torch.ones(2, HEADS, 50, dtype=torch.float64), 1e-12)
    assert_close(weights @ value.repeat_interleave(2, 1), whole, 1e-12)
    out, state = variant.decode(*(x[:, :, :49] for x in (query, key, value)), None, None, scaling=0.7, bias=None)
    last, _ = variant.decode(*(x[:, :, 49:] for x in (query, key, value)), None, state, scaling=0.7, bias=None)
    assert_close(torch.cat([out, last], 2), whole, 1e-12)
    assert variant.macs(1000, False) == 2 * (3 * 4 + 1) * DIM + 250 * DIM // 4
    assert variant.macs(10, True) == 2 * 10 * DIM + 3 * DIM // 4


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        topk_attention(*make_inputs(9, 3), **SMALL)
    with pytest.raises(UnsupportedModelError, match="first query of a block"):
        topk_attention(*make_inputs(9, 3), **SMALL, causal=True)
    for name, value in (("block_size", 0), ("top_k", 0), ("global_tokens", -1)):
        with pytest.raises(ConfigError, match=f"{name} must be at least"):
            topk_attention(*make_inputs(9), **{**SMALL, name: value})
