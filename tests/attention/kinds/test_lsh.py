"""lsh_attention against its naive twin, SDPA, and the limits it promises; by blocks, and by a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.attention.engines import bucketed
from hf_efficient.attention.kinds import lsh
from hf_efficient.attention.kinds.local import local_attention
from hf_efficient.attention.kinds.lsh import LshAttention, draw_rotations, hash_buckets, lsh_attention
from hf_efficient.attention.naive import naive_lsh_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples
from ..cases import (
    DIM,
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

BLOCKS, DENSE = 0, 1 << 40  # the number of pairs up to which the mask is dense


@pytest.fixture(params=[BLOCKS, DENSE], ids=["blocks", "dense"])
def form(request, monkeypatch):
    """Both ways of evaluation, whatever the length."""
    monkeypatch.setattr(lsh, "DENSE", request.param)


@pytest.fixture
def by_blocks(monkeypatch):
    monkeypatch.setattr(lsh, "DENSE", BLOCKS)


def hashing(num_hashes: int = 2, num_buckets: int = 4, block_size: int = 6, **options: object) -> dict:
    rotations = draw_rotations(num_hashes, DIM, num_buckets, seed=0).double()
    return {"rotations": rotations, "block_size": block_size, **options}


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_equals_naive(form, seen, causal, side):
    mask = padding_mask(side, 2, seen)
    for num_hashes, num_buckets, block_size in ((1, 1, 5), (2, 4, 3), (3, 8, 70), (2, 64, 64)):
        options = hashing(num_hashes, num_buckets, block_size, causal=causal)
        assert_equals_naive(lsh_attention, naive_lsh_attention, make_inputs(seen), mask, **options)
    for kv_heads in (1, 4):
        inputs = make_inputs(seen, kv_heads=kv_heads)
        assert_equals_naive(lsh_attention, naive_lsh_attention, inputs, mask, make_bias(seen), scaling=1.0, **options)


@pytest.mark.cover
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [8, 130])
def test_equals_naive_at_a_thousand(causal, block_size):
    mask, bias = padding_mask("left", 2, 1000), make_bias(1000)
    options = hashing(3, 8, block_size, causal=causal)
    assert_equals_naive(lsh_attention, naive_lsh_attention, make_inputs(1000), mask, bias, **options)


@pytest.mark.cover(2)
@pytest.mark.parametrize(("seen", "length"), [(5, 1), (40, 1), (150, 1), (150, 3), (150, 63), (300, 200)])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_queries_at_the_end_equal_naive(form, seen, length, side):
    inputs, mask = make_inputs(seen, length), padding_mask(side, 2, seen)
    for bias in (None, make_bias(seen, length)):
        assert_equals_naive(lsh_attention, naive_lsh_attention, inputs, mask, bias, **hashing(causal=True))


@random_examples(40)
@given(data=st.data(), seen=st.integers(1, 200), block_size=st.integers(1, 90), num_hashes=st.integers(1, 4))
def test_any_shape_equals_naive(data, seen, block_size, num_hashes):
    causal = data.draw(st.booleans())
    length = data.draw(st.integers(1, seen)) if causal else seen
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3
    mask = data.draw(st.sampled_from([None, holes]))
    bias = data.draw(st.sampled_from([None, make_bias(seen, length)]))
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    options = hashing(num_hashes, data.draw(st.sampled_from([1, 2, 6, 30])), block_size, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh, "DENSE", data.draw(st.sampled_from([BLOCKS, DENSE])))
        patch.setattr(bucketed, "GATHERED", data.draw(st.sampled_from([1, 5000, 1 << 21])))
        assert_equals_naive(lsh_attention, naive_lsh_attention, inputs, mask, bias, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_over_everything_equals_sdpa(form, dtype, tolerance, causal):
    query, key, value = make_inputs(130, kv_heads=4, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    for block_size in (130, 1000):  # passed on to `full_attention`
        out = lsh_attention(query, key, value, **hashing(2, 1, block_size, causal=causal))
        assert_close(out, expected, tolerance)
    # Not passed on: all rows but the last, which does not see the first key.
    out = lsh_attention(query, key, value, **hashing(2, 1, 129, causal=causal))
    assert_close(out[:, :, :-1], expected[:, :, :-1], tolerance)
    assert (out - expected)[:, :, -1].abs().max() > 100 * tolerance


def test_one_bucket_is_a_window(form):
    inputs = make_inputs(150)
    out = lsh_attention(*inputs, **hashing(1, 1, 20, causal=True))
    assert_close(out, local_attention(*inputs, window=20, causal=True), 1e-12)


def test_a_key_found_twice_counts_once(form):
    inputs, once = make_inputs(150), hashing(1)
    twice = {**once, "rotations": once["rotations"].repeat(3, 1, 1)}
    assert_close(lsh_attention(*inputs, **twice), lsh_attention(*inputs, **once), 1e-12)


def test_buckets():
    x, rotations = torch.randn(2, 3, 500, DIM), draw_rotations(2, DIM, 8, seed=0)
    projected = torch.einsum("bhnd,rdm->rbhnm", x, rotations)
    expected = torch.cat([projected, -projected], -1).argmax(-1)
    assert torch.equal(hash_buckets(x, rotations), expected)
    assert torch.equal(hash_buckets(3 * x, rotations), expected)
    assert expected.unique().numel() == 8
    opposite = (expected + 4) % 8
    assert torch.equal(hash_buckets(-x, rotations), opposite)


@pytest.mark.cover(2)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(form, dtype, tolerance):
    inputs = make_inputs(200, dtype=dtype)
    out = lsh_attention(*inputs, **hashing())
    assert out.dtype == dtype
    expected = naive_lsh_attention(*(tensor.double() for tensor in inputs), **hashing())
    assert_close(out, expected, tolerance)
    halves, singles = leaves(*inputs), leaves(*(tensor.float() for tensor in inputs))
    lsh_attention(*halves, **hashing()).float().square().sum().backward()
    lsh_attention(*singles, **hashing()).square().sum().backward()
    for half, single in zip(halves, singles, strict=True):
        assert half.grad.dtype == dtype
        assert_close(half.grad / single.grad.abs().max(), single.grad / single.grad.abs().max(), tolerance)


def test_autocast_does_not_round(form):
    inputs = leaves(*make_inputs(200, dtype=torch.float32))
    expected = lsh_attention(*inputs, **hashing())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lsh_attention(*inputs, **hashing())
    assert torch.equal(out, expected)
    grads, expected_grads = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(by_blocks, causal, dropout):
    mask = torch.tensor([[False, *[True] * 8]])

    def function(query, key, value, bias):
        torch.manual_seed(0)  # the same entries are dropped each time
        options = hashing(block_size=2, causal=causal, dropout=dropout)
        return lsh_attention(query, key, value, mask, bias=bias, **options)

    assert_gradients(function, [*make_inputs(9, batch=1), make_bias(9)])


def test_there_is_no_second_derivative(by_blocks):
    query, key, value = leaves(*make_inputs(20))
    out = lsh_attention(query, key, value, **hashing())
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.cover(2)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(form, junk, causal):
    for side in ("left", "right"):
        mask = padding_mask(side, 2, 150)
        assert_padding_is_inert(lsh_attention, make_inputs(150), mask, junk, **hashing(causal=causal))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_equals_no_padding(form, side, causal):
    query, key, value = make_inputs(150, batch=2)
    real = slice(40, None) if side == "left" else slice(None, 110)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1] = False
    mask[1, real] = True
    out = lsh_attention(query, key, value, mask, **hashing(causal=causal))
    alone = lsh_attention(*(x[1:, :, real] for x in (query, key, value)), **hashing(causal=causal))
    assert_close(out[1:, :, real], alone, 1e-12)


def test_rows_without_keys_are_zero(form):
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        options = hashing(causal=causal)
        assert_padding_is_inert(lsh_attention, make_inputs(150), mask, float("nan"), **options)
        assert lsh_attention(*make_inputs(150), mask, **options).eq(0).all()


def test_causal(form):
    assert_causal(lsh_attention, **hashing())
    assert_causal(lsh_attention, **hashing(1, 1, 9))


@pytest.mark.parametrize("length", [1, 2, 70])
def test_decoding_equals_the_whole(form, length):
    query, key, value = make_inputs(150)
    mask = padding_mask("left", 2, 150)
    whole = lsh_attention(query, key, value, mask, **hashing(causal=True))
    for seen in range(80, 151) if length == 1 else (80, 119, 150):
        new = slice(seen - length, seen)
        inputs = query[:, :, new], key[:, :, :seen], value[:, :, :seen], mask[:, :seen]
        assert_close(lsh_attention(*inputs, **hashing(causal=True)), whole[:, :, new], 1e-12)


def test_what_must_differ(form):
    inputs = make_inputs(200)
    plain = lsh_attention(*inputs, **hashing())
    other = {"rotations": draw_rotations(2, DIM, 4, seed=1).double()}
    changes = (hashing(block_size=7), hashing(3), hashing(2, 8), other, {"scaling": 1.0}, {"causal": True})
    changes += ({"bias": make_bias(200)}, {"key_mask": padding_mask("right", 2, 200)})
    for changed in changes:
        assert (lsh_attention(*inputs, **{**hashing(), **changed}) - plain).abs().max() > 1e-3, changed


def test_finds_the_keys_that_matter():
    """Queries and keys in 16 tight groups: little is seen, but most of the softmax. Without groups it is otherwise."""
    centres = torch.randn(16, 32)
    group = torch.randint(16, (2, 1024))
    tight = (5 * F.normalize(centres[group[i]], dim=-1) + 0.3 * torch.randn(1024, 32) for i in (0, 1))
    options = {"rotations": draw_rotations(4, 32, 16, seed=0), "block_size": 32}

    def found(query: torch.Tensor, key: torch.Tensor) -> tuple[float, float]:
        """The share of the softmax on the keys that are seen, and the share of keys that are seen."""
        query, key, everyone = query[None, None], key[None, None], torch.eye(1024)[None, None]
        seen = lsh_attention(query, key, everyone, **options) > 0
        weights = F.scaled_dot_product_attention(query, key, everyone)
        return (weights * seen).sum(-1).mean().item(), seen.float().mean().item()

    mass, seen = found(*tight)
    random_mass, random_seen = found(torch.randn(1024, 32), torch.randn(1024, 32))
    assert seen < 0.2
    assert random_seen < 0.3
    assert mass > 4 * seen
    assert mass > 2 * random_mass


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False, "bias": make_bias(12)}])
def test_dropout_is_unbiased(form, options):
    assert_mean_unbiased(lsh_attention, **hashing(block_size=3), **options)


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_compiles_whole(form, causal, dropout):
    options = hashing(causal=causal, dropout=dropout)
    assert_compiles_whole(lsh_attention, gradients=True, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("num_buckets", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal, num_buckets):
    options = hashing(2, num_buckets, causal=causal)  # drawn here: a program draws anew at each call
    assert_exports(lsh_attention, ((1, 1), (1, 2), (1, 70), (3, 301), (2, 1000)), **options)


def test_the_variant_draws_by_its_seed():
    def make(**options: object) -> LshAttention:
        return LshAttention(AttentionConfig("lsh", block_size=4, num_buckets=4, **options), HeadShape(4, 2, DIM))

    variant, same, other = make(), make(), make(seed=1)
    assert list(variant.state_dict()) == ["rotations"]
    assert variant.rotations.shape == (2, DIM, 2)
    assert torch.equal(variant.rotations, same.rotations)
    assert not torch.equal(variant.rotations, other.rotations)
    inputs = make_inputs(50, dtype=torch.float32)
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": None}
    out = variant(*inputs, None, **options)
    expected = lsh_attention(*inputs, rotations=variant.rotations, block_size=4, causal=True)
    assert torch.equal(out, expected)
    weights = variant.weights(inputs[0], inputs[1], None, **options)
    assert_close(weights.sum(-1), torch.ones(2, 4, 50), 1e-5)
    assert_close(weights @ inputs[2].repeat_interleave(2, 1), out, 1e-5)
    assert not torch.equal(other(*inputs, None, **options), out)


def test_the_variant_with_one_bucket_hashes_nothing():
    config = AttentionConfig("lsh", block_size=64, num_buckets=1)
    variant = LshAttention(config, HeadShape(4, 2, DIM))
    inputs = make_inputs(50, dtype=torch.float32)
    out = variant(*inputs, None, causal=False, scaling=None, dropout=0.0, bias=None)
    assert_close(out, F.scaled_dot_product_attention(*inputs, enable_gqa=True), 1e-5)
    cheap, dear = (LshAttention(AttentionConfig("lsh", num_buckets=n), HeadShape(4, 2, DIM)) for n in (2, 64))
    assert variant.macs(8192, True) < cheap.macs(8192, True) < dear.macs(8192, True)


def test_misfits_are_refused():
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        lsh_attention(*make_inputs(9, 3), **hashing())
    with pytest.raises(ConfigError, match="block_size must be at least 1"):
        lsh_attention(*make_inputs(9), **hashing(block_size=0))
    with pytest.raises(UnsupportedModelError, match=r"rotations must be \[rounds, 4, buckets / 2\], got \(2, 3, 2\)"):
        lsh_attention(*make_inputs(9), rotations=draw_rotations(2, 3, 4, seed=0), block_size=2)
