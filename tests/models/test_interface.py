"""The table of attention functions: what is put into it for a while goes again, by one thread at a time."""

import threading

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.models.interface import changed_interface


def test_changes_go_again_also_nested_and_after_an_error():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), changed_interface() as functions:
        functions["sdpa"] = max
        with changed_interface() as inner:
            inner["sdpa"], inner["only here"] = min, min
        assert functions["sdpa"] is max and "only here" not in functions
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_another_thread_waits():
    events = []

    def change():
        with changed_interface():
            events.append("other")

    with changed_interface():
        other = threading.Thread(target=change)
        other.start()
        other.join(0.1)
        events.append("first")
    other.join()
    assert events == ["first", "other"]
