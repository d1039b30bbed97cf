"""additive_attention against its naive twin, Fastformer, softmax attention at its start, and its own decoding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_efficient import AttentionConfig
from hf_efficient.attention.engines.prefix import CHUNK
from hf_efficient.attention.kinds.additive import (
    AdditiveAttention,
    AdditiveParts,
    additive_attention,
    additive_decode,
)
from hf_efficient.attention.naive import naive_additive_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples
from ..cases import (
    DIM,
    HEADS,
    assert_compiles_whole,
    assert_exports,
    assert_gradients,
    assert_mean_unbiased,
    assert_padding_is_inert,
)

LENGTHS = [1, 2, 7, 63, 65, 130, 300]


def make_inputs(length: int, *, batch: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random query [B,4,T,4], key and value [B,K,T,4]."""
    return [torch.randn(batch, heads, length, DIM, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads)]


def make_parts(dtype: torch.dtype = torch.float64, dim: int = DIM) -> AdditiveParts:
    """Random learned parts, the same in every call."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((HEADS, dim), (HEADS, dim), (HEADS, dim, dim), (HEADS, dim), (HEADS, dim))
    return AdditiveParts(
        *(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    )


PARTS = make_parts()


def attend(*args: Tensor, **options: object) -> Tensor:
    return additive_attention(*args, parts=PARTS, **options)


def assert_equals_naive(inputs: list[Tensor], mask: Tensor | None, **options: object) -> None:
    """Outputs, and gradients of inputs and learned parts, to 1e-10."""
    found = []
    for function in (additive_attention, naive_additive_attention):
        given = leaves(*inputs, *PARTS)
        out = function(*given[:3], mask, parts=AdditiveParts(*given[3:]), **options)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append((out, *torch.autograd.grad(out, given, direction)))
    names = ("output", "query", "key", "value", *AdditiveParts._fields)
    for name, actual, expected in zip(names, *found, strict=True):
        assert_close(actual, expected, 1e-10, name)


@pytest.mark.cover(2)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_naive(length, causal, side, kv_heads):
    inputs, mask = make_inputs(length, kv_heads=kv_heads), padding_mask(side, 2, length)
    assert_equals_naive(inputs, mask, causal=causal)
    assert_equals_naive(inputs, mask, causal=causal, scaling=1.0)


@random_examples(30)
@given(data=st.data(), length=st.integers(1, 300), causal=st.booleans(), holes=st.booleans())
def test_any_shape_equals_naive(data, length, causal, holes):
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) > 0.3 if holes else None
    assert_equals_naive(make_inputs(length, batch=batch, kv_heads=kv_heads), mask, causal=causal)


def test_three_levels_of_chunks_equal_naive():
    length = CHUNK * CHUNK + CHUNK + 1
    inputs = make_inputs(length, batch=1, kv_heads=1)
    assert_close(attend(*inputs, causal=True), naive_additive_attention(*inputs, parts=PARTS, causal=True), 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    mask = torch.tensor([[False, True, True, False, True]])

    def function(query, key, value, *parts):
        return additive_attention(query, key, value, mask, parts=AdditiveParts(*parts), causal=causal, scaling=0.7)

    assert_gradients(function, [*make_inputs(5, batch=1), *make_parts()])


def test_fastformer_is_a_special_case():
    """The paper's equations 3 to 8, one head, W_v its transformation, the query added, nothing else."""
    query, key, value = make_inputs(50, batch=1, kv_heads=4)
    parts = PARTS._replace(
        query_gain=torch.ones_like(PARTS.query_gain), pooled_gain=torch.zeros_like(PARTS.query_gain)
    )
    out = additive_attention(query, key, value, parts=parts)
    for head in range(HEADS):
        q, k, v = query[0, head], key[0, head], value[0, head]
        alpha = torch.softmax(q @ parts.query_score[head] / DIM**0.5, 0)
        products = (alpha[:, None] * q).sum(0) * k
        beta = torch.softmax(products @ parts.key_score[head] / DIM**0.5, 0)
        u = (beta[:, None] * products).sum(0) * v
        assert_close(out[0, head], F.linear(u, parts.value_map[head]) + q, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_starts_as_softmax_attention_of_the_mean_query(causal):
    attention = AdditiveAttention(AttentionConfig("additive"), HeadShape(HEADS, 2, DIM))
    attention.reset_parameters()
    query, key, value = make_inputs(70)
    mask = padding_mask("left", 2, 70)
    same = query[:, :, :1].expand_as(query)
    allowed = mask[:, None, None, :] & (torch.ones(70, 70).tril().bool() if causal else True)
    expected = F.scaled_dot_product_attention(same, key, value, allowed, enable_gqa=True)
    options = {"causal": causal, "scaling": None, "dropout": 0.0}
    real = mask[:, None, :, None]
    assert_close(attention.attend(same, key, value, mask, **options) * real, expected * real, 1e-12)
    if not causal:
        mean = (query * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
        expected = F.scaled_dot_product_attention(mean, key, value, mask[:, None, None, :], enable_gqa=True)
        assert_close(attention.attend(query, key, value, mask, **options), expected.expand_as(query), 1e-12)
    assert (
        attention.attend(query, key, value, mask, **options) - attention.attend(same, key, value, mask, **options)
    ).abs().max() > 1e-3


def test_every_learned_part_learns_from_the_start():
    """A value map of zeros must not cut off the gradient of the scores."""
    attention = AdditiveAttention(AttentionConfig("additive"), HeadShape(HEADS, 2, DIM))
    attention.reset_parameters()
    out = attention(*make_inputs(20), None, causal=False, scaling=None, dropout=0.0)
    out.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.shape[0] == HEADS, name
        assert parameter.grad.abs().amax(tuple(range(1, parameter.ndim))).gt(1e-6).all(), name


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right"):
        mask = padding_mask(side, 2, 150)
        assert_padding_is_inert(attend, tuple(make_inputs(150)), mask, junk, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_query_is_inert(causal):
    """It would be pooled with the others."""
    query, key, value = make_inputs(90)
    mask = padding_mask("right", 2, 90)
    poisoned = query.masked_fill(~mask[:, None, :, None], float("nan"))
    assert torch.equal(
        attend(poisoned, key, value, mask, causal=causal), attend(query, key, value, mask, causal=causal)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_no_padding(causal, side):
    inputs = make_inputs(150, batch=3)
    mask = padding_mask(side, 3, 150)
    out = attend(*inputs, mask, causal=causal)
    for row in range(3):
        kept = mask[row]
        alone = attend(*(tensor[row : row + 1, :, kept] for tensor in inputs), causal=causal)
        assert_close(out[row : row + 1, :, kept], alone, 1e-12)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(2, 150, dtype=torch.bool)
    for causal in (False, True):
        assert_padding_is_inert(attend, tuple(make_inputs(150)), mask, float("nan"), causal=causal)
        assert attend(*make_inputs(150), mask, causal=causal).eq(0).all()


def test_causal():
    """Also that the future's scores, which could be the highest, are no reference for those of the past."""
    before, length = make_inputs(90), 40
    out = attend(*before, causal=True)
    for size in (1.0, 1e6):
        after = [tensor.clone() for tensor in before]
        for tensor in after:
            tensor[:, :, length:] = size * torch.randn_like(tensor[:, :, length:])
        changed = attend(*after, causal=True)
        assert torch.equal(changed[:, :, :length], out[:, :, :length])
        assert (changed[:, :, length:] - out[:, :, length:]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [[1] * 90, [40, 50], [40, *[1] * 50], [33, 32, 25]])
@pytest.mark.parametrize("side", [None, "left"])
def test_decoding_equals_the_whole(steps, side):
    inputs, mask = make_inputs(90), padding_mask(side, 2, 90)
    whole = attend(*inputs, mask, causal=True)
    state, outs, start = None, [], 0
    for count in steps:
        new = [tensor[:, :, start : start + count] for tensor in inputs]
        real = None if mask is None else mask[:, start : start + count]
        out, state = additive_decode(*new, real, state, parts=PARTS)
        outs.append(out)
        start += count
    assert_close(torch.cat(outs, 2), whole, 1e-12)


def test_the_state_has_a_constant_size_of_its_own():
    for length in (1, 500):
        _, state = additive_decode(*make_inputs(length, kv_heads=2), None, None, parts=PARTS)
        assert [tuple(part.shape) for part in state] == [(2, 4), (2, 4, 4), (2, 4), (2, 4, 4), (2, 4, 4)]
        assert all(part.untyped_storage().nbytes() == part.numel() * 8 for part in state)


def test_no_overflow_in_single_precision():
    """Scores of +-1000 and more: their exponentials are out of reach."""
    inputs = [300 * tensor for tensor in make_inputs(200, dtype=torch.float32)]
    for causal in (False, True):
        out = additive_attention(*inputs, parts=make_parts(torch.float32), causal=causal)
        expected = naive_additive_attention(*(x.double() for x in inputs), parts=PARTS, causal=causal)
        assert_close(out / expected.abs().max(), expected / expected.abs().max(), 1e-4)


def test_what_must_differ():
    inputs = make_inputs(50)
    plain = attend(*inputs)
    for changed in ({"causal": True}, {"scaling": 1.0}, {"key_mask": padding_mask("right", 2, 50)}):
        assert (attend(*inputs, **changed) - plain).abs().max() > 1e-3, changed
    for name in AdditiveParts._fields:
        parts = PARTS._replace(**{name: 2 * getattr(PARTS, name)})
        assert (additive_attention(*inputs, parts=parts) - plain).abs().max() > 1e-3, name
    assert_close(attend(*inputs, scaling=DIM**-0.5), plain, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    def function(query, key, value, **options):
        return attend(query, key[..., :DIM], value[..., :DIM], **options)

    assert_mean_unbiased(function, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_sums_in_single(causal):
    inputs = make_inputs(1200, batch=1, dtype=torch.bfloat16)
    parts = make_parts(torch.bfloat16)
    wide = AdditiveParts(*(part.double() for part in parts))
    expected = naive_additive_attention(*(tensor.double() for tensor in inputs), parts=wide, causal=causal)
    out = additive_attention(*inputs, parts=parts, causal=causal)
    assert out.dtype == torch.bfloat16
    assert_close(out.double() / expected.abs().max(), expected / expected.abs().max(), 2**-8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = additive_attention(*(tensor.float() for tensor in inputs), parts=parts, causal=causal)
    assert_close(cast / expected.abs().max(), expected / expected.abs().max(), 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole(causal):
    assert_compiles_whole(attend, make_inputs, causal=causal)


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_exports_with_any_length(causal):
    assert_exports(attend, ((1, 20), (3, 301), (2, 256)), make_inputs, causal=causal)


def test_misfits_are_refused():
    query, key, value = make_inputs(4)
    with pytest.raises(UnsupportedModelError, match="decode from its state"):
        attend(query[:, :, -1:], key, value, causal=True)
    with pytest.raises(UnsupportedModelError, match="must be alike"):
        attend(query, key, value[..., :3])
    attention = AdditiveAttention(AttentionConfig("additive"), HeadShape(HEADS, 2, DIM))
    with pytest.raises(UnsupportedModelError, match="no weight for each pair"):
        attention.weights(query, key, None)
