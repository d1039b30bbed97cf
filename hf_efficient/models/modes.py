"""Settings that a measurement changes and always puts back.

with evaluating(model), using_threads(1):
    model(**inputs)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import check_positive


@contextmanager
def eval_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each submodule is in the mode it was in before, whatever was done to it meanwhile."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Eval mode and inference mode."""
    with eval_mode(*models), torch.inference_mode():
        yield


@contextmanager
def using_threads(threads: int | None) -> Iterator[int]:
    """Run with this many CPU threads (None: as they are; ConfigError if not positive); yields the number in use."""
    before = torch.get_num_threads()
    if threads is not None:
        check_positive("threads", threads, otherwise=" or None")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was asked; nothing to wait for elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
