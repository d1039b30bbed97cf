"""Two messages of libraries that come at every import on a CPU and mean nothing there; our commands leave them out.

    silence()

Only these, and only in our commands: who imports hf_efficient as a library hears all that torchao and torch say.
"""

import logging
import re

MESSAGES = {  # logger -> the message
    "torchao": r"Failed to load \S*torchao/_C\S*\.so: ",  # its kernels for GPUs, and for other versions of Python
    "torch.utils._pytree": r"<enum '\w+'> is an Enum subclass and is now natively supported by torch\.compile",
}


class _Silent(logging.Filter):
    """Lets all pass but one message."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


FILTERS = {name: _Silent(pattern) for name, pattern in MESSAGES.items()}


def silence() -> None:
    """Called before torch is imported; twice does no harm."""
    for name, silent in FILTERS.items():
        logging.getLogger(name).addFilter(silent)
