"""Run a function as the forward of a model that is wrapped for distributed training.

    result = call_inside(ddp_model, model, lambda forward: loss_of(forward(**inputs)))

DDP, FSDP and DeepSpeed do their work in hooks around the wrapper's forward. A loss with parameters of its own
(projections) that is computed after that forward breaks DDP ("Expected to mark a variable ready only once"), and
calling the inner model directly skips gradient synchronisation without a word. So the whole loss runs inside:
Lightning's and TRL's forward redirection.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def call_inside(wrapped: nn.Module, inner: nn.Module, function: Callable[[Callable], T]) -> T:
    """Call `wrapped()` with `inner.forward` replaced by `function(original_forward)`, for this one call.

    `original_forward` still has accelerate's autocast around it.
    """
    original = inner.forward
    is_patched = "forward" in vars(inner)  # by accelerate's mixed precision or its device hooks

    def restore() -> None:
        if is_patched:
            inner.forward = original
        else:
            vars(inner).pop("forward", None)

    def redirected() -> T:
        restore()
        return function(original)

    inner.forward = redirected
    try:
        return wrapped()
    finally:
        restore()
