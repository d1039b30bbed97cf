"""Inputs for the attention functions and their comparison with the naive twins."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..helpers import assert_close, leaves

DIM, VALUE_DIM, HEADS = 4, 5, 4


def make_inputs(
    seen: int, length: int | None = None, *, batch: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [B,4,T,4], key [B,K,S,4], value [B,K,S,5]."""
    query = torch.randn(batch, HEADS, length or seen, DIM, dtype=dtype)
    key = torch.randn(batch, kv_heads, seen, DIM, dtype=dtype)
    return query, key, torch.randn(batch, kv_heads, seen, VALUE_DIM, dtype=dtype)


def make_bias(seen: int, length: int | None = None) -> Tensor:
    return torch.randn(1, HEADS, seen + (length or seen) - 1, dtype=torch.float64)


def run(function: Callable, inputs: tuple, key_mask: Tensor | None, bias: Tensor | None, **options: object) -> tuple:
    """The output, and the gradients of (query, key, value[, bias]) under a fixed random direction."""
    query, key, value, bias = leaves(*inputs, bias)
    extra = {} if bias is None else {"bias": bias}
    out = function(query, key, value, key_mask, **options, **extra)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out * direction).sum(), [query, key, value, *extra.values()])
    return out, grads


def assert_equals_naive(
    fast: Callable,
    naive: Callable,
    inputs: tuple,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: object,
) -> None:
    """Outputs and all gradients to 1e-10 in float64."""
    out, grads = run(fast, inputs, key_mask, bias, **options)
    expected, expected_grads = run(naive, inputs, key_mask, bias, **options)
    assert_close(out, expected, 1e-10)
    for name, grad, expected_grad in zip(("query", "key", "value", "bias"), grads, expected_grads, strict=False):
        assert_close(grad, expected_grad, 1e-10, f"gradient of {name}")


def assert_padding_is_inert(
    function: Callable, inputs: tuple, key_mask: Tensor, junk: float, **options: object
) -> None:
    """`junk` in padded keys and values changes neither the output nor a gradient, and they get none themselves."""
    padded = ~key_mask[:, None, :, None]
    poisoned = (inputs[0], *(tensor.masked_fill(padded, junk) for tensor in inputs[1:]))
    out, grads = run(function, inputs, key_mask, None, **options)
    actual, actual_grads = run(function, poisoned, key_mask, None, **options)
    assert torch.equal(actual, out)
    assert torch.isfinite(out).all()
    for grad, actual_grad in zip(grads, actual_grads, strict=True):
        assert torch.equal(actual_grad, grad)
    for grad in actual_grads[1:]:
        assert grad.masked_select(padded).eq(0).all()


def assert_causal(function: Callable, **options: object) -> None:
    """Changing the keys from position 40 on changes nothing before it, and something after."""
    query, key, value = make_inputs(90)
    before = function(query, key, value, causal=True, **options)
    key, value = key.clone(), value.clone()
    key[:, :, 40:], value[:, :, 40:] = torch.randn_like(key[:, :, 40:]), torch.randn_like(value[:, :, 40:])
    after = function(query, key, value, causal=True, **options)
    assert_close(after[:, :, :40], before[:, :, :40], 1e-12)
    assert (after[:, :, 40:] - before[:, :, 40:]).abs().max() > 1e-3


def assert_mean_unbiased(function: Callable, **options: object) -> None:
    """With dropout an output differs, and the mean of many comes back to the output without it."""
    inputs = make_inputs(12, batch=1)
    plain = function(*inputs, **options)
    draws = torch.stack([function(*inputs, dropout=0.3, **options) for _ in range(2000)])
    assert not torch.allclose(draws[0], plain)
    error = (draws.mean(0) - plain).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5.5, f"{error.max():.1f} standard errors from the mean"


def compiled(function: Callable, **options: object) -> Callable:
    """The function compiled whole, with symbolic lengths."""
    torch._dynamo.reset()
    return torch.compile(lambda *inputs: function(*inputs, **options), fullgraph=True, backend="eager", dynamic=True)
