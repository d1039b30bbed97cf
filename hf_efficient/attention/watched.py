"""Attention of modules that compute it themselves: their forward runs as it is, and what is attention in it is ours.

    route(module)                  # it gets a class of its own, whose forward is the stock one, watched
    module(hidden_states)          # calls the variant of the module in place of softmax(q k^T) v

While such a forward runs, the first product of queries and keys is not computed: `Scores` stand in for it and note
what is done to them. Their product with the values is then one call of our attention. All else of the module's code,
rotary positions and caches among it, runs as it is. Whatever is not known goes on as the stock code would; a converted
module that comes to its end that way is an error, for it would stay dense in silence.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .deferred import KNOWN, SOFTMAX, Scores, by_heads, mapped, scores_in
from .dispatch import efficient_attention_forward, variant_of
from .variant import OWN

ADDED, FUSED, EINSUM = "baddbmm", "scaled_dot_product_attention", "einsum"
PRODUCTS = ("matmul", "bmm")
_OPEN = FunctionType(  # the same, but that what it calls is seen
    F.multi_head_attention_forward.__code__, {**vars(F), "has_torch_function": lambda tensors: False}
)
_OPEN.__defaults__ = F.multi_head_attention_forward.__defaults__


class Watch(TorchFunctionMode):
    """What is done with tensors while the forward of one module runs.

    Attributes:
        attend: gives the output `[..., T, E]` for scores that are weights and for values `[..., S, E]`; None: not.
        calls: how often attention was computed.
        others: how often there was a softmax, or the like, that belongs to no attention that is known.
        weights: what attention gave as its weights, if it was asked for them.
    """

    def __init__(self, module: nn.Module, attend: "Attend", wants_weights: bool = False):
        super().__init__()
        self.module, self.attend, self.wants_weights = module, attend, wants_weights
        self.calls = self.others = 0
        self.weights: Tensor | None = None
        self._is_busy = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self.done(func, args, kwargs or {})

    def done(self, func: Callable, args: tuple, kwargs: Mapping[str, Any], name: str = "") -> Any:
        """What a function gives, among whose arguments there may be scores. Exporters put functions of other names in
        the place of methods: then `name` says which method it is."""
        given = scores_in((args, kwargs))
        if self._is_busy and not given:  # of what is computed here
            return func(*args, **kwargs)
        was_busy, self._is_busy = self._is_busy, True
        try:
            return self._known(func, name or getattr(func, "__name__", ""), given, args, kwargs)
        finally:
            self._is_busy = was_busy

    def _known(self, func: Callable, written: str, given: list[Scores], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        name, result = written.strip("_"), None
        changes = name == "setitem" or (written.endswith("_") and not written.startswith("__"))
        if name in KNOWN and given:  # asked by a function of torch
            return func(*mapped(lambda scores: scores.ghost, args), **kwargs)
        if func is F.multi_head_attention_forward and not given:
            return self._opened(*args, **kwargs)
        if not given:
            result = self._begun(name, args, kwargs)
        elif len(given) == 1 and not written.startswith("__i"):
            result = self._product(given[0], name, args, kwargs) if given[0].is_weights else None
            result = given[0].then(name, func, args, kwargs) if result is None else result
        is_first = bool(given) and bool(args) and args[0] is given[0]
        if isinstance(result, Scores) and changes and is_first:
            vars(given[0]).update(vars(result))
            return given[0]
        if result is not None:
            return result
        self.others += name == SOFTMAX or any(one.is_weights for one in given)
        if changes and is_first:
            given[0].written = given[0].tensor()
        return func(*mapped(Scores.tensor, args), **mapped(Scores.tensor, kwargs))

    def _begun(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The scores, where a function multiplies queries and keys; the output, where it is attention as a whole."""
        if name == FUSED:
            return self._fused(*args, **kwargs)
        if name == ADDED:
            added, query, key = (*args, *(kwargs[one] for one in ("batch1", "batch2") if one in kwargs))
            pair = query, key, None
        else:
            pair = _factors(name, args, kwargs)
        if pair is None or pair[2] is not None or not _may_meet(*pair[:2]):
            return None
        scores = Scores(self, pair[0], pair[1].mT)
        if name == ADDED:
            scores = scores * kwargs.get("alpha", 1)
            return scores + added * kwargs["beta"] if kwargs.get("beta", 1) else scores
        return scores

    def _product(self, weights: Scores, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The output of attention, where a function multiplies weights and values."""
        pair = _factors(name, args, kwargs)
        if pair is None or pair[0] is not weights or not _may_meet(weights.ghost, pair[1]):
            return None
        output = self.attend(self, weights, pair[1])
        self.calls += output is not None
        return output if output is None or pair[2] is None else output.permute(pair[2])

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """torch's fused attention, step by step."""
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        if not _may_meet(query, key.mT):
            return None
        scores = Scores(self, query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(query.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = F.dropout(F.softmax(scores, dim=-1), dropout_p, True) if dropout_p else F.softmax(scores, dim=-1)
        return self._product(weights, "matmul", (weights, value), {})

    def _opened(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """torch's whole multi-head attention, which is one function for those who watch."""
        given = signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given.arguments["need_weights"] = False
        was_busy, self._is_busy = self._is_busy, False
        try:
            with self:
                output, _ = _OPEN(*given.args, **given.kwargs)
        finally:
            self._is_busy = was_busy
        if self.weights is None or not given.arguments.get("average_attn_weights", True):
            return output, self.weights
        return output, self.weights.mean(1)

    def settled(self, output: Any) -> Any:
        """What a forward gives, without scores in it: weights as attention gave them, if it was asked for them."""

        def found(scores: Scores) -> Tensor | None:
            if not scores.is_weights or scores.written is not None:
                return scores.tensor()
            return None if self.weights is None else self.weights.reshape(*scores.shape[:-1], self.weights.shape[-1])

        return mapped(found, output)


Attend = Callable[[Watch, Scores, Tensor], Tensor | None]


def _factors(name: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Tensor, list[int] | None] | None:
    """The factors `[..., T, X]` and `[..., X, S]` of a product, and the order of the dimensions of what it gives, if
    that is not `[..., T, S]`; None: it is none."""
    if name == EINSUM and isinstance(args[0], str) and not kwargs:
        operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
        return _einsum_factors(args[0].replace(" ", ""), *operands) if len(operands) == 2 else None
    factors = (*args, *(kwargs[one] for one in ("other", "mat2") if one in kwargs))
    return (*factors, None) if name in PRODUCTS and len(factors) == 2 else None


def _einsum_factors(equation: str, left: Any, right: Tensor) -> tuple[Any, Tensor, list[int] | None] | None:
    terms, _, output = equation.partition("->")
    first, _, second = terms.partition(",")
    summed, lead = set(first) & set(second) - set(output), [one for one in output if one in first and one in second]
    rows, columns = set(first) - set(second), set(second) - set(first)
    if not output or "." in equation or {len(summed), len(rows), len(columns)} != {1}:
        return None
    (inner,), (row,), (column,) = summed, rows, columns
    natural = [*lead, row, column]
    if sorted(natural) != sorted(output) or sorted((*lead, row, inner)) != sorted(first):
        return None
    if isinstance(left, Scores) and [*lead, row, inner] != list(first):
        return None
    if not isinstance(left, Scores):
        left = left.permute([first.index(one) for one in (*lead, row, inner)])
    right = right.permute([second.index(one) for one in (*lead, inner, column)])
    return left, right, None if natural == list(output) else [natural.index(one) for one in output]


def _may_meet(left: Tensor, right: Tensor) -> bool:
    """Whether `[..., T, X]` and `[..., X, S]` are of the same heads, or the latter of one that all share."""
    if not isinstance(right, Tensor) or not left.ndim == right.ndim > 2 or left.shape[-1] != right.shape[-2]:
        return False
    if not (left.is_floating_point() and right.is_floating_point()):
        return False
    lead, other = left.shape[:-2], right.shape[:-2]
    return lead == other or (len(lead) > 1 and (*lead[:-1], 1) == tuple(other))


def _converted(watch: Watch, weights: Scores, value: Tensor) -> Tensor | None:
    """The variant of the module."""
    heads = variant_of(watch.module).shape.heads
    reading = weights.read(heads)
    if reading is None:
        return None
    values = by_heads(value, heads)  # [N, H, S, E]
    dtype = torch.promote_types(torch.promote_types(reading.query.dtype, reading.key.dtype), value.dtype)
    output, watch.weights = efficient_attention_forward(
        watch.module,
        reading.query.to(dtype),
        reading.key.to(dtype),
        values.to(dtype),
        reading.mask,
        scaling=reading.scaling,
        dropout=reading.dropout,
        output_attentions=watch.wants_weights,
    )
    # [N, T, H, E] -> [..., T, E]
    return output.transpose(1, 2).reshape(*weights.shape[:-1], -1).to(value.dtype)


def route(module: nn.Module) -> None:
    """From now on the module computes its attention by its variant, while it has one."""
    module.__class__ = _routed(type(module))


@contextmanager
def routing(modules: Collection[nn.Module], attend: Attend) -> Iterator[None]:
    """The modules compute their attention another way meanwhile."""
    before = {module: type(module) for module in modules}
    try:
        for module, stock in before.items():
            module.__class__ = _watched_class(stock, attend)
        yield
    finally:
        for module, stock in before.items():
            module.__class__ = stock


@cache
def _routed(stock: type[nn.Module]) -> type[nn.Module]:
    """One class for each, so that copies of modules have the same."""
    return _watched_class(stock, None)


def _watched_class(stock: type[nn.Module], attend: Attend | None) -> type[nn.Module]:
    names = list(signature(stock.forward).parameters)[1:]

    @wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if attend is None and variant_of(self) is None:
            return stock.forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        watch = Watch(self, attend or _converted, bool(given.get("output_attentions")))
        return _watched(stock.forward, watch, args, kwargs)

    def reduced(self: nn.Module, protocol: int) -> tuple:
        return _made_again, (stock,), vars(self)

    body = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "forward": forward, OWN: True}
    return type(stock.__name__, (stock,), {**body, "__reduce_ex__": reduced})


def _made_again(stock: type[nn.Module]) -> nn.Module:
    """A copy of a routed module, before its state is set."""
    routed = _routed(stock)
    return routed.__new__(routed)


@torch.compiler.disable
def _watched(forward: Callable, watch: Watch, args: tuple, kwargs: dict[str, Any]) -> Any:
    """
    Raises:
        UnsupportedModelError: attention was computed in a way that is not known.
    """
    with watch:
        output = forward(watch.module, *args, **kwargs)
    if watch.others or not watch.calls:
        raise UnsupportedModelError(
            f"{type(watch.module).__name__} computed its attention itself in a way that cannot be replaced: not as "
            "softmax(q k^T + masks and biases) times the values."
        )
    return watch.settled(output)
