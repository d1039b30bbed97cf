"""A disk that is full or fails, told in one message that says what to do.

    with clear_disk_errors("out/bbc-news", "Give the same command again: it goes on after the last finished stage."):
        model.save_pretrained("out/bbc-news/1-prune.partial")

The libraries that write for us say it each in their own way: OSError, SafetensorError or a RuntimeError of torch.save.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CheckpointError, HfEfficientError

FAULTS = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space, or ask for a larger quota.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EIO: "Check the disk.",
}
# What torch.save says, without the reason, when it cannot write on.
_CUT_SHORT = ("PytorchStreamWriter failed writing file", "inline_container.cc")


@contextmanager
def clear_disk_errors(folder: str | os.PathLike, then: str) -> Iterator[None]:
    """Any such error within is a CheckpointError that names `folder`, and says what to do `then`."""
    try:
        yield
    except HfEfficientError:
        raise
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        raise CheckpointError(f"{os.fspath(folder)} could not be written: {fault} {then}") from error


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, and how to mend it; None for any other error."""
    text = str(error)
    for number, advice in FAULTS.items():
        name = os.strerror(number)
        if (isinstance(error, OSError) and error.errno == number) or f"{name} (os error {number})" in text:
            return f"{name}. {advice}"
    if isinstance(error, RuntimeError) and any(words in text for words in _CUT_SHORT):
        return f"a file was cut short, so the disk is full or fails. {FAULTS[errno.ENOSPC]}"
    return None
