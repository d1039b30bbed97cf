"""kernel_attention against its naive twin, and the convolution under it against all pairs and against an FFT."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_efficient import AttentionConfig
from hf_efficient.attention.engines.convolution import BLOCK, TOP, convolve, make_tables
from hf_efficient.attention.engines.feature_maps import draw_projection
from hf_efficient.attention.kinds.kernel import DENSE, KERNELS, KernelAttention, kernel_attention
from hf_efficient.attention.kinds.linear import linear_attention
from hf_efficient.attention.naive import naive_kernel_attention
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError, UnsupportedModelError

from ...helpers import assert_close, leaves, padding_mask, random_examples
from ..cases import (
    DIM,
    HEADS,
    assert_causal,
    assert_compiles_whole,
    assert_exports,
    assert_gradients,
    assert_mean_unbiased,
    assert_padding_is_inert,
    make_inputs,
)

PROJECTION = draw_projection(6, DIM, seed=3).double()
WIDTHS = (2.0, 30.0, 200.0, 5000.0)  # of the four heads: from a token to more than any text here


def make_options(kv_heads: int = 2, features: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Learned parts that differ from head to head, the same in every call."""
    options = {"log_width": torch.tensor(WIDTHS, dtype=dtype).log()}
    if features:
        options["log_temperature"] = torch.linspace(-0.5, 0.5, kv_heads, dtype=dtype)
        options["projection"] = PROJECTION.to(dtype)
    return options


def attend(query: Tensor, key: Tensor, *args: Tensor, **options: object) -> Tensor:
    return kernel_attention(query, key, *args, **{**make_options(key.shape[1], dtype=query.dtype), **options})


def by_position(query: Tensor, *args: Tensor, **options: object) -> Tensor:
    return kernel_attention(query, *args, **{**make_options(features=False, dtype=query.dtype), **options})


def assert_equals_naive(
    inputs: tuple[Tensor, ...], mask: Tensor | None, features: bool = True, **options: object
) -> None:
    """Outputs, and gradients of inputs and learned parts, to 1e-10. Positions alone: nothing depends on q and k."""
    found = []
    parts = make_options(inputs[1].shape[1], features)
    for function in (kernel_attention, naive_kernel_attention):
        given = leaves(*inputs, parts["log_width"], parts.get("log_temperature"))
        learned = {"log_width": given[3], "log_temperature": given[4], "projection": parts.get("projection")}
        out = function(*given[:3], mask, **learned, **options)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = given if features else given[2:4]
        found.append((out, *torch.autograd.grad(out, wanted, direction)))
    names = ("output", "query", "key", "value", "log_width", "log_temperature") if features else ("", "value", "width")
    for name, actual, expected in zip(names, *found, strict=True):
        assert_close(actual, expected, 1e-10, name)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 7, 63, 65, 130, 257, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("features", [False, True])
def test_equals_naive(seen, causal, side, features):
    mask = padding_mask(side, 2, seen)
    for kv_heads in (1, 2, 4) if seen < 300 else (2,):
        assert_equals_naive(make_inputs(seen, kv_heads=kv_heads), mask, features, causal=causal)


@pytest.mark.cover(2)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seen", [100, 1000])
def test_every_kernel_equals_naive(kernel, causal, seen):
    assert_equals_naive(make_inputs(seen, batch=1), None, kernel=kernel, causal=causal)


@pytest.mark.cover(2)
@pytest.mark.parametrize(("seen", "length"), [(5, 1), (300, 1), (300, 3), (700, 65), (700, DENSE + 1), (700, 699)])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("features", [False, True])
def test_queries_at_the_end_equal_naive(seen, length, side, features):
    inputs, mask = make_inputs(seen, length), padding_mask(side, 2, seen)
    assert_equals_naive(inputs, mask, features, causal=True)


@random_examples(25)
@given(data=st.data(), seen=st.integers(1, 800), causal=st.booleans(), features=st.booleans(), holes=st.booleans())
def test_any_shape_equals_naive(data, seen, causal, features, holes):
    length = data.draw(st.integers(1, seen)) if causal else seen
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 4]))
    mask = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.3 if holes else None
    inputs = make_inputs(seen, length, batch=batch, kv_heads=kv_heads)
    assert_equals_naive(inputs, mask, features, causal=causal, kernel=data.draw(st.sampled_from(list(KERNELS))))


@pytest.mark.cover
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_convolution_equals_all_pairs_for_every_width(causal, kernel):
    """Deep enough for three levels of blocks, and an FFT agrees."""
    length = 4 * TOP * BLOCK + 5
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    x = torch.randn(1, 1, length, 2, dtype=torch.float64)
    for width in (0.1, 3.0, 20.0, 90.0, 400.0, 3000.0, 1e6):

        def weigh(distance: Tensor, width: float = width) -> Tensor:
            return KERNELS[kernel](distance.double() / width)[None, None]

        weights = weigh(distance.abs())[0, 0]
        expected = (weights.tril() if causal else weights) @ x
        out = convolve(None, None, x, make_tables(weigh, length, causal, torch.float64, x.device))[:, :, 0]
        assert_close(out / expected.abs().max(), expected / expected.abs().max(), 1e-13)
        around = weigh(torch.arange(1 - length, length).abs())[0, 0]  # distances of query minus key
        around = around.masked_fill(torch.arange(1 - length, length) < 0, 0) if causal else around
        spectrum = torch.fft.rfft(around, 4 * length)[:, None] * torch.fft.rfft(x, 4 * length, dim=2)
        by_fft = torch.fft.irfft(spectrum, 4 * length, dim=2)[:, :, length - 1 : 2 * length - 1]
        assert_close(out / expected.abs().max(), by_fft / expected.abs().max(), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_single_precision_is_good_to_a_millionth(causal, features):
    """Of the size of the values, in every row: also in the first ones of a causal sum."""
    inputs = make_inputs(1500, batch=1, dtype=torch.float32)
    parts = make_options(features=features, dtype=torch.float32)
    parts["log_width"] = torch.tensor([1.0, 25.0, 64.0, 5000.0]).log()  # of the four heads
    out = kernel_attention(*inputs, causal=causal, **parts)
    wide = {name: part.double() for name, part in parts.items()}
    assert_close(out, naive_kernel_attention(*(x.double() for x in inputs), causal=causal, **wide), 5e-6)


def test_an_endless_width_is_linear_attention():
    query, key, value = make_inputs(600, kv_heads=4)
    endless = {"log_width": torch.full((HEADS,), 1e9, dtype=torch.float64).log()}
    unit = (x / x.norm(dim=-1, keepdim=True) * DIM**0.25 for x in (query, key))  # favor divides by D**(1/4)
    for causal in (False, True):
        mean = value.cumsum(2) / torch.arange(1, 601)[:, None] if causal else value.mean(2, keepdim=True)
        assert_close(by_position(query, key, value, causal=causal, **endless), mean.expand_as(value), 1e-9)
    options = {"log_temperature": torch.zeros(HEADS), "projection": PROJECTION, **endless}
    out = kernel_attention(query, key, value, **options)
    expected = linear_attention(*unit, value, feature_map="favor", map_weights=(PROJECTION, PROJECTION))
    assert_close(out, expected, 1e-5)  # TINY, and no feature at its limit


def test_no_width_sees_itself_alone():
    query, key, value = make_inputs(600, kv_heads=4)
    for causal in (False, True):
        assert_close(attend(query, key, value, causal=causal, log_width=torch.full((4,), -4.0)), value, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, monkeypatch):
    for module, name, small in (
        ("kinds.kernel", "DENSE", 1),
        ("engines.convolution", "BLOCK", 2),
        ("engines.convolution", "TOP", 3),
    ):
        monkeypatch.setattr(f"hf_efficient.attention.{module}.{name}", small)
    parts = make_options()
    mask = torch.tensor([[False, *[True] * 8]])

    def function(query, key, value, width, temperature):
        options = {"log_width": width, "log_temperature": temperature, "projection": PROJECTION, "causal": causal}
        return kernel_attention(query, key, value, mask, **options)

    learned = (parts["log_width"], parts["log_temperature"])
    assert_gradients(function, [*make_inputs(9, batch=1), *learned])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_inert(junk, causal):
    for side in ("left", "right"):
        for seen in (150, 300):
            mask = padding_mask(side, 2, seen)
            assert_padding_is_inert(attend, make_inputs(seen), mask, junk, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("function", [attend, by_position])
def test_padding_equals_no_padding(causal, side, function):
    inputs, mask = make_inputs(700, batch=3), padding_mask(side, 3, 700)
    out = function(*inputs, mask, causal=causal)
    for row in range(3):
        kept = mask[row]
        alone = function(*(tensor[row : row + 1, :, kept] for tensor in inputs), causal=causal)
        assert_close(out[row : row + 1, :, kept], alone, 1e-12)


def test_rows_without_keys_are_zero():
    for seen in (150, 300):
        mask = torch.zeros(2, seen, dtype=torch.bool)
        for causal in (False, True):
            assert_padding_is_inert(attend, make_inputs(seen), mask, float("nan"), causal=causal)
            assert attend(*make_inputs(seen), mask, causal=causal).eq(0).all()
            assert by_position(*make_inputs(seen), mask, causal=causal).eq(0).all()


@pytest.mark.parametrize("function", [attend, by_position])
def test_causal(function):
    assert_causal(function)
    query, key, value = make_inputs(700)
    before = function(query, key, value, causal=True)
    for first in (1, 64, 130, 400):
        changed = [x.clone() for x in (key, value)]
        for x in changed:
            x[:, :, first:] = 1e6 * torch.randn_like(x[:, :, first:])
        after = function(query, *changed, causal=True)
        assert torch.equal(after[:, :, :first], before[:, :, :first])  # to the bit: no product touches the future
        assert (after[:, :, first:] - before[:, :, first:]).abs().max() > 1e-3


@pytest.mark.parametrize("function", [attend, by_position])
def test_decoding_equals_the_whole(function):
    query, key, value = make_inputs(700)
    mask = padding_mask("left", 2, 700)
    whole = function(query, key, value, mask, causal=True)
    for seen, length in ((60, 1), (700, 1), (700, 3), (500, 300)):
        inputs = (query[:, :, seen - length : seen], key[:, :, :seen], value[:, :, :seen], mask[:, :seen])
        assert_close(function(*inputs, causal=True), whole[:, :, seen - length : seen], 1e-12)


def test_what_must_differ():
    inputs = make_inputs(300)
    plain = attend(*inputs)
    mask = padding_mask("right", 2, 300)
    changes = [{"causal": True}, {"key_mask": mask}, *({"kernel": name} for name in KERNELS if name != "gaussian")]
    for name, part in make_options().items():
        changes.append({name: part + 0.3})
    for changed in changes:
        assert (attend(*inputs, **changed) - plain).abs().max() > 1e-3, changed
    assert (by_position(*inputs) - plain).abs().max() > 1e-3
    assert torch.equal(attend(*inputs, scaling=5.0), plain)
    assert_close(attend(3 * inputs[0], 2 * inputs[1], inputs[2]), plain, 1e-4)  # lengths are divided out, but for TINY


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_unbiased(causal):
    assert_mean_unbiased(attend, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_sums_in_single(causal):
    inputs = make_inputs(1000, batch=1, dtype=torch.bfloat16)
    parts = make_options()
    expected = naive_kernel_attention(*(tensor.double() for tensor in inputs), causal=causal, **parts)
    half = kernel_attention(*inputs, causal=causal, **parts)
    assert half.dtype == torch.bfloat16
    assert_close(half, expected.bfloat16(), 2**-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kernel_attention(*(tensor.float() for tensor in inputs), causal=causal, **parts)
    assert_close(cast, expected, 1e-5)


def test_what_the_backward_pass_computes_again_is_not_rounded_by_autocast():
    query, key, value = (tensor.float() for tensor in make_inputs(300))
    grads = []
    for enabled in (False, True):
        (given,) = leaves(value)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(by_position(query, key, given).square().sum(), given)
    assert_close(grads[1], grads[0], 1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "features"), [(False, True), (True, False)])
def test_compiles_whole(causal, features):
    assert_compiles_whole(attend if features else by_position, graphs=2, causal=causal)


@pytest.mark.thorough
@pytest.mark.parametrize("function", [by_position, attend])
@pytest.mark.parametrize("causal", [False, True])
def test_exports_with_any_length(causal, function):
    assert_exports(function, ((1, 20), (3, 301), (2, 256), (1, 1500)), causal=causal)


@pytest.mark.parametrize("feature_dim", [None, 0, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_starts_wide_and_gives_its_weights(feature_dim, causal):
    attention = KernelAttention(AttentionConfig("kernel", feature_dim=feature_dim, seed=4), HeadShape(HEADS, 2, DIM))
    attention.reset_parameters()
    shapes = {name: tuple(part.shape) for name, part in attention.state_dict().items()}
    with_features = {"log_temperature": (2,), "projection": (16 if feature_dim is None else feature_dim, DIM)}
    assert shapes == {"log_width": (HEADS,), **(with_features if feature_dim != 0 else {})}
    assert attention.log_width.exp().gt(100).all()
    query, key, value = make_inputs(300, dtype=torch.float32)
    mask = padding_mask("left", 2, 300)
    options = {"causal": causal, "scaling": None, "dropout": 0.0}
    weights = attention.weights(query, key, mask, **options)
    out = attention(query, key, value, mask, **options)
    assert_close(weights @ value.repeat_interleave(2, 1), out, 1e-5)
    assert_close(weights.sum(-1), mask[:, None].expand(-1, HEADS, -1).float(), 1e-5)
    out.square().sum().backward()
    assert all(parameter.grad.abs().gt(0).all() for parameter in attention.parameters())


def test_the_seed_draws_the_features():
    made = [KernelAttention(AttentionConfig("kernel", seed=seed), HeadShape(2, 2, DIM)) for seed in (0, 0, 1)]
    assert torch.equal(made[0].projection, made[1].projection)
    assert not torch.equal(made[0].projection, made[2].projection)


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'gaussian'"):
        attend(*make_inputs(4), kernel="gausian")
    with pytest.raises(UnsupportedModelError, match="3 queries and 9 keys"):
        attend(*make_inputs(9, 3))
    with pytest.raises(UnsupportedModelError, match="6 queries and 4 keys"):
        attend(*make_inputs(4, 6), causal=True)
