"""Scores of queries and keys that are not computed until it is known what becomes of them.

    scores = Scores(watch, query, key)
    weights = F.softmax(scores * 0.125 + mask, dim=-1)     # still none: what is done is noted
    weights.read(heads=12)                                 # Reading(query, key, mask, 0.125, dropout=0.0)

What is noted is all that is done to scores on their way to softmax(c q k^T + b): scaled, masks and biases added or
filled in, reshaped, cast; softmax, dropout. `Scores.tensor` does the same things to the product itself, so whatever
else is done to them is done as the code at hand would have done it. See `watched` for who makes them.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import HIDDEN

SCORES = object()  # where they stand among the arguments of a step
LOWEST = -6e4  # a lower bound no higher than that of half precision hides nothing
SHAPES = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")
PLAIN = ("contiguous", "clone")
SCALES, SHIFTS = ("mul", "multiply", "div", "divide", "true_divide", "truediv"), ("add", "sub", "subtract")
FILLS, BOUNDS, SOFTMAX = ("masked_fill", "where"), ("max", "maximum", "clamp", "clamp_min"), "softmax"
KNOWN = ("size", "dim", "numel", "is_floating_point", "is_complex", "get_device")  # without the scores


class Step(NamedTuple):
    """One thing that was done to scores like the `ghost`: `func(*args, **kwargs)`, with `SCORES` in their place."""

    name: str
    func: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    ghost: Tensor


class Reading(NamedTuple):
    """Scores as attention takes them: query `[N, H, T, D]`, key `[N, K, S, D]`, what is added to the scores
    `[N or 1, H or 1, T or 1, S]` (a hidden pair has less than `HIDDEN`), and the dropout of the weights."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    dropout: float


class Scores:
    """The product of queries `[..., T, D]` and keys `[..., S, D]`, and what was done to it since, none of it computed.

    It may be used as a tensor: what is not known is done to the tensor that it stands for.
    """

    def __init__(
        self, watch: Any, query: Tensor, key: Tensor, steps: tuple[Step, ...] = (), ghost: Tensor | None = None
    ):
        self.watch, self.query, self.key, self.steps = watch, query, key, steps
        if ghost is None:
            dtype, kind = torch.promote_types(query.dtype, key.dtype), query.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
            ghost = torch.empty((), dtype=dtype, device=query.device)
            ghost = ghost.expand(*query.shape[:-1], key.shape[-2])
        self.ghost = ghost  # of the same shape and dtype, without memory
        self.written: Tensor | None = None  # after something was written into them: they are this tensor from then on

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.ghost, name)
        if isinstance(value, Tensor):  # mT
            return self.watch.done(getattr, (self, name), {})
        if not callable(value) or name in KNOWN:
            return value
        return lambda *args, **kwargs: self.watch.done(getattr(Tensor, name), (self, *args), kwargs, name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return scores_in((args, kwargs))[0].watch.done(func, args, kwargs or {})

    @property
    def is_weights(self) -> bool:
        return any(step.name == SOFTMAX for step in self.steps)

    def tensor(self, hides: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What they stand for. `hides` changes the scores right before their softmax."""
        if self.written is not None:
            return self.written
        scores = self.query @ self.key.mT
        for step in self.steps:
            if hides is not None and step.name == SOFTMAX:
                scores = hides(scores)
            scores = step.func(*(scores if one is SCORES else one for one in step.args), **step.kwargs)
        return scores

    def then(self, name: str, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> "Scores | None":
        """The same after one thing more; None: it is not known."""
        place = next((i for i, one in enumerate(args) if one is self), None)
        if self.written is not None or place is None:
            return None
        args = tuple(SCORES if one is self else one for one in args)
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        ghost = self.ghost
        if name in SHAPES:
            ghost = getattr(ghost, name)(*args[1:], **kwargs)
            if ghost.ndim < 3 or ghost.shape[-2:] != self.ghost.shape[-2:]:
                return None
        elif name in CASTS:
            ghost = getattr(ghost.new_empty(()), name)(*args[1:], **kwargs).expand(ghost.shape)
        elif name == SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if self.is_weights or dim not in (-1, ghost.ndim - 1):
                return None
            ghost = ghost.new_empty((), dtype=kwargs.get("dtype") or ghost.dtype).expand(ghost.shape)
        elif name not in PLAIN:
            is_known = self._known_weights if self.is_weights else self._known_scores
            fits = all(_fits(one.shape, ghost.shape) for one in tensors)
            if not (is_known(name, place, args, kwargs) and fits):
                return None
            for one in tensors if name in SCALES + SHIFTS else ():
                ghost = ghost.new_empty((), dtype=torch.result_type(ghost, one)).expand(ghost.shape)
        step = Step(name, func, args, kwargs, self.ghost)
        return Scores(self.watch, self.query, self.key, (*self.steps, step), ghost)

    def _known_scores(self, name: str, place: int, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        if name in SCALES:
            return len(args) == 2 and not kwargs and (place == 0 or name in ("mul", "multiply"))
        if name in BOUNDS:
            return _bound(name, args, kwargs) is not None
        if name in FILLS:
            is_known = place == 0 if name == "masked_fill" else place > 0 and args[0].dtype == torch.bool
            return len(args) == 3 and not kwargs and is_known
        return name in SHIFTS

    def _known_weights(self, name: str, place: int, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        if name == "masked_fill":  # pairs that are hidden anyway
            return place == 0 and len(args) == 3 and not kwargs and _number(args[2]) == 0
        return name in ("dropout", "nan_to_num")

    def read(self, heads: int) -> Reading | None:
        """As attention takes them, if they are softmax(c q k^T + b); None: they are more than that."""
        lead = self.query.shape[:-2]
        if lead[-1] % heads or (len(lead) > 1 and lead[-1] != heads):
            return None
        reading = _Reader(lead, heads)
        for step in self.steps:
            if not reading.take(step):
                return None
        query, key, factor, bias = self.query, self.key, reading.factor, reading.bias
        query = query.reshape(-1, heads, *query.shape[-2:])
        if isinstance(factor, Tensor):
            query, factor = query * factor, 1.0
        if bias is not None:
            bias = bias.expand(-1, -1, -1, key.shape[-2])
        return Reading(query, by_heads(key, heads), bias, float(factor), reading.dropout)


def by_heads(given: Tensor, heads: int) -> Tensor:
    """Keys or values `[..., H, S, D]` or `[N * H, S, D]` as `[N, H, S, D]`; `H` is 1 where all heads share them."""
    are_shared = given.ndim > 3 and given.shape[-3] == 1
    return given.reshape(-1, 1 if are_shared else heads, *given.shape[-2:])


def _method(func: Callable, swapped: bool = False) -> Callable:
    def method(self: Scores, *args: Any) -> Any:
        given = (*args, self) if swapped else (self, *args)
        return self.watch.done(func, given, {})

    return method


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    setattr(Scores, f"__{_name}__", _method(getattr(operator, _name)))
    setattr(Scores, f"__r{_name}__", _method(getattr(operator, _name), swapped=True))
for _name in ("pow", "neg", "invert", "getitem", "setitem", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"):
    setattr(Scores, f"__{_name.strip('_')}__", _method(getattr(operator, _name)))
for _func in (len, iter, bool, float):
    setattr(Scores, f"__{_func.__name__}__", _method(_func))


class _Reader:
    """Takes steps one by one: after each the scores are `factor` times the product, plus `bias`, but where `filled`
    they are `bias` alone."""

    def __init__(self, lead: torch.Size, heads: int):
        self.lead, self.heads = lead, heads
        self.factor: Any = 1.0
        self.bias: Tensor | None = None
        self.filled: Tensor | None = None  # whatever the product is there
        self.dropout = 0.0
        self.is_weights = False

    def take(self, step: Step) -> bool:
        """Whether the step is one of the sort that keeps to the form."""
        if step.name in (*SHAPES, *CASTS, *PLAIN, *BOUNDS, "nan_to_num"):
            return True
        if step.name == SOFTMAX:
            self.is_weights = True
            return self.filled is None or self._is_hidden(self.filled)
        if step.name == "dropout":
            rate, trains = _arguments(step, ("p", 0.5), ("training" if "training" in step.kwargs else "train", True))
            self.dropout = 1 - (1 - self.dropout) * (1 - rate * bool(trains))
            return True
        if step.name in FILLS:
            return self._fill(step)
        other = next(one for one in step.args if one is not SCORES)
        if isinstance(other, Tensor) and other.ndim:
            other = self._placed(other, step.ghost.shape)
        if other is None:
            return False
        if step.name in SHIFTS:
            return self._add(other, step)
        return self._scale(1 / other if step.name not in ("mul", "multiply") else other)

    def _add(self, other: Any, step: Step) -> bool:
        other = other * step.kwargs.get("alpha", 1)
        if step.name != "add":
            if step.args[0] is not SCORES:  # b - scores
                self._scale(-1.0)
            else:
                other = -other
        if isinstance(other, Tensor) and other.ndim:
            self.bias = other if self.bias is None else self.bias + other
        elif self.bias is not None:  # else it is the same for all pairs, and changes no softmax
            self.bias = self.bias + other
        return True

    def _scale(self, other: Any) -> bool:
        if isinstance(other, Tensor) and other.ndim and other.shape[-1] != 1:  # 1 at pairs that stay, 0 at others
            if not ((other == 0) | (other == 1)).all():
                return False
            gone = other == 0
            self.bias = torch.zeros_like(other) if self.bias is None else self.bias * other
            self.filled = gone if self.filled is None else self.filled | gone
            return True
        self.factor = self.factor * other
        self.bias = None if self.bias is None else self.bias * other
        return True

    def _fill(self, step: Step) -> bool:
        if step.name == "masked_fill":
            mask, value = step.args[1], step.args[2]
        else:  # where(mask, scores, value) or where(mask, value, scores)
            mask, is_first = step.args[0], step.args[1] is SCORES
            mask, value = (~mask, step.args[2]) if is_first else (mask, step.args[1])
        placed = self._placed(mask.bool(), step.ghost.shape)
        if placed is None:
            return False
        if self.is_weights:
            return self._is_hidden(placed)
        value = self._placed(value, step.ghost.shape) if isinstance(value, Tensor) and value.ndim else value
        if value is None:
            return False
        bias = self.bias if self.bias is not None else step.ghost.new_zeros(())
        self.bias = torch.where(placed, value, bias)
        self.filled = placed if self.filled is None else self.filled | placed
        return True

    def _is_hidden(self, pairs: Tensor) -> bool:
        """Whether these pairs have no weight. What is exported was proven before."""
        if torch.compiler.is_exporting():
            return True
        return self.bias is not None and not (pairs & (self.bias > HIDDEN)).any()

    def _placed(self, given: Tensor, shape: torch.Size) -> Tensor | None:
        """What was broadcast to scores of this shape, as `[N or 1, H or 1, T or 1, S or 1]`."""
        given = given.reshape(*(1,) * (len(shape) - given.ndim), *given.shape)
        lead, places = given.shape[:-2], given.shape[-2:]
        if all(one == 1 for one in lead):
            return given.reshape(1, 1, *places)
        if len(lead) == 1:  # [N * H, ...]
            return given.reshape(-1, self.heads, *places)
        if shape[-3] != self.heads:
            return None
        if any(one != 1 for one in lead[:-1]):
            given = given.expand(*shape[:-3], -1, -1, -1)
        return given.reshape(-1, *given.shape[-3:])


def _fits(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether what has a shape is broadcast to the whole, and no further."""
    return len(shape) <= len(whole) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False)
    )


def _arguments(step: Step, *wanted: tuple[str, Any]) -> list[Any]:
    """Arguments behind the first, by their names and defaults."""
    behind = dict(enumerate(step.args[1:]))
    return [step.kwargs.get(name, behind.get(place, default)) for place, (name, default) in enumerate(wanted)]


def _number(value: Any) -> float | None:
    """The number that a tensor of one element, or a number, is."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _bound(name: str, args: tuple, kwargs: Mapping[str, Any]) -> float | None:
    """A lower bound that no score reaches; None for any other."""
    if name in ("clamp", "clamp_min"):
        known = {**dict(zip(("min", "max"), args[1:], strict=False)), **kwargs}
        value = known.get("min") if known.get("max") is None else None
    else:
        value = next((one for one in args if one is not SCORES), None) if len(args) == 2 and not kwargs else None
        if not isinstance(value, Tensor):  # `max` along a dimension
            return None
    if torch.compiler.is_exporting() and isinstance(value, Tensor) and value.numel() == 1:
        return LOWEST
    number = _number(value)
    return number if number is not None and number <= LOWEST else None


def scores_in(value: Any) -> list[Scores]:
    """Those in tuples, lists and mappings, such as arguments."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return [one for part in value for one in scores_in(part)]
    return [value] if isinstance(value, Scores) else []


def mapped(function: Callable[[Scores], Any], value: Any) -> Any:
    """The same tuples, lists and mappings with something else in the place of scores."""
    if isinstance(value, Scores):
        return function(value)
    if not scores_in(value):
        return value
    if isinstance(value, Mapping):
        return type(value)(**{name: mapped(function, one) for name, one in value.items()})
    changed = [mapped(function, one) for one in value]
    return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
