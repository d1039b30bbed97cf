"""The windows of the model itself, computed as windows."""

import pytest
import torch

from hf_efficient import ConfigError, UnsupportedModelError, convert_attention

from ..families import CASES, CAUSAL, PADDED_CASES, make_inputs, make_model, real_logits
from ..helpers import assert_close

OWN_WINDOW = [(name, side) for name, side in PADDED_CASES if CASES[name].own_window]


@pytest.mark.parametrize(("name", "side"), OWN_WINDOW)
def test_native_computes_the_windows_of_the_model_and_changes_no_answer(name, side):
    fields, window = CASES[name].own_window
    model, inputs = make_model(name, **fields), make_inputs(name, side)
    types = getattr(model.config, "layer_types", ["sliding_attention"] * 3)
    native = convert_attention(model, "native")
    [stack] = native.config.block().stacks.values()
    assert [one.kind for one in stack.attention] == [
        "local" if kind == "sliding_attention" else "full" for kind in types
    ]
    assert {(one.window, one.global_tokens) for one in stack.attention if one.kind == "local"} == {(window, 0)}
    assert_close(real_logits(native, inputs), real_logits(model, inputs), 1e-5)
    if name in CAUSAL and side == "left":
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        assert torch.equal(native.generate(**inputs, **options), model.generate(**inputs, **options))


def test_native_needs_a_window():
    with pytest.raises(UnsupportedModelError, match="No layer of this llama has a sliding window"):
        convert_attention(make_model("llama"), "native")
    with pytest.raises(ConfigError, match="Expected an AttentionConfig or a mapping, or 'native', got 'nativ'"):
        convert_attention(make_model("llama"), "nativ")
    model = make_model("gemma3_text", sliding_window=5)
    model.config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match="counts in another way"):
        convert_attention(model, "native")
