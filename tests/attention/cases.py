"""Inputs for the attention functions and their comparison with the naive twins."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..helpers import THOROUGH, assert_close, leaves, padding_mask

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


def assert_gradients(function: Callable, inputs: Sequence[Tensor]) -> None:
    """Those of finite differences, in float64: along random directions, with `--thorough` entry by entry."""
    fast = THOROUGH not in os.environ
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs], fast_mode=fast)


def assert_mean_unbiased(function: Callable, **options: object) -> None:
    """With dropout an output differs, and the mean of many comes back to the output without it.

    The draws are the rows of large batches, so that they must also differ from row to row.
    """
    inputs = make_inputs(12, batch=1)
    plain = function(*inputs, **options)
    rows = [tensor.expand(200, -1, -1, -1) for tensor in inputs]
    draws = torch.cat([function(*rows, dropout=0.3, **options) for _ in range(10)])
    assert not torch.allclose(draws[:1], plain)
    error = (draws.mean(0) - plain[0]).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5.5, f"{error.max():.1f} standard errors from the mean"


def assert_compiles_whole(
    function: Callable, make: Callable = make_inputs, *, gradients: bool = False, graphs: int = 1, **options: Any
) -> None:
    """One graph for every length. The other sizes are those of a model: as symbols they would cost minutes.

    With `dropout` in the options the results need only be finite; some kinds take short texts by another graph.
    Most rows are thorough: by default every kind is compiled in a model, and exported for any length.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = torch.compile(lambda *inputs: function(*inputs, **options), fullgraph=True, backend="eager", dynamic=True)
    for seen in (150, 301, 192):
        inputs, mask = make(seen), padding_mask("left", 2, seen)
        inputs = leaves(*inputs) if gradients else inputs
        torch._dynamo.mark_static(mask, 0)
        for tensor in inputs:
            for dim in (0, 1, 3):
                torch._dynamo.mark_static(tensor, dim)
        results = _with_gradients(whole(*inputs, mask), inputs)
        assert all(torch.isfinite(result).all() for result in results)
        if not options.get("dropout"):
            expected = _with_gradients(function(*inputs, mask, **options), inputs)
            assert_close(results[0], expected[0], 1e-12)
            for actual, gradient in zip(results[1:], expected[1:], strict=True):
                assert_close(actual, gradient, 1e-10, "gradient")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def _with_gradients(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (out, *(torch.autograd.grad(out.square().sum(), inputs) if out.requires_grad else ()))


def assert_exports(
    function: Callable,
    sizes: Sequence[tuple[int, int]] = ((1, 70), (3, 301), (2, 192)),
    make: Callable = make_inputs,
    masked: bool = True,
    real_only: bool = False,
    **options: Any,
) -> None:
    """A program made of 2 rows of 200 takes each (batch, length); `real_only`: padded queries may give anything."""

    class Module(nn.Module):
        def forward(self, query, key, value, mask=None):
            return function(query, key, value, mask, **options)

    def arguments(batch: int, seen: int, side: str) -> tuple[Tensor, ...]:
        mask = padding_mask(side, batch, seen)
        return (*make(seen, batch=batch), mask) if masked else tuple(make(seen, batch=batch))

    auto = torch.export.Dim.AUTO
    shapes = [{0: auto, 2: auto}] * 3 + [{0: auto, 1: auto}] * masked
    program = torch.export.export(Module(), arguments(2, 200, "right"), dynamic_shapes=shapes).module()
    for batch, seen in sizes:
        inputs = arguments(batch, seen, "left")
        out, expected = program(*inputs), function(*inputs, **options)
        assert out.isfinite().all()
        real = inputs[-1][:, None, :, None] if real_only else 1
        assert_close(out * real, expected * real, 1e-12, f"{batch} x {seen}")
