"""transformers' table of attention functions, changed for a while.

with changed_interface() as functions:
    functions["sdpa"] = noting(functions["sdpa"])
    model(**inputs)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_CHANGING = RLock()  # the table is there once for all threads


@contextmanager
def changed_interface() -> Iterator[AttentionInterface]:
    """The functions by implementation. What is written to them goes again afterwards (what is registered stays), and
    other threads that would change them wait meanwhile."""
    with _CHANGING:
        before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
        try:
            yield ALL_ATTENTION_FUNCTIONS
        finally:
            ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
            ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)
