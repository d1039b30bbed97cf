"""A real model is converted only if it stays what it was where the new attention sees everything."""

import pytest
import torch

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.models.derive import family_for
from hf_efficient.models.family import ABILITIES, Attention, Family, Stack
from hf_efficient.models.registry import register_family

from ..helpers import assert_close
from ..models.derive.toy import documented

LOCAL = AttentionConfig("local", window=2)
DEEP = {  # from the fourth layer on, later tokens are hidden by a mask alone
    "        for block in self.blocks:\n            states = block(states, mask)": (
        "        causal = create_causal_mask(self.config, states, attention_mask, None)\n"
        "        for index, block in enumerate(self.blocks):\n"
        "            states = block(states, mask if index < 3 else causal)"
    ),
    "import create_bidirectional_mask": "import create_bidirectional_mask, create_causal_mask",
}


def output(model, ids):
    with torch.no_grad():
        return model(input_ids=ids)[0]


def test_a_layer_that_only_the_real_model_has_is_noticed(monkeypatch):
    toy = documented(monkeypatch, "toy_with_deep_layers", **DEEP)
    shallow, deep = (toy.ToyModel(toy.ToyConfig(depth=depth)).eval() for depth in (3, 5))
    converted = convert_attention(shallow, AttentionConfig("local", window=64))
    ids = torch.arange(3, 12)[None]
    assert_close(output(converted, ids), output(shallow, ids), 1e-5)
    again = convert_attention(convert_attention(shallow, LOCAL), AttentionConfig("local", window=3))
    assert not torch.allclose(output(again, ids), output(shallow, ids), atol=1e-3)
    family = family_for(deep.config, deep)
    assert not any(family.why_not(ability) for ability in ABILITIES)  # the tiny model has three layers
    with pytest.raises(UnsupportedModelError, match=r"everything in view \(output.last_hidden_state is .* off\)"):
        convert_attention(deep, LOCAL)


def test_an_entry_that_names_another_module_has_no_effect(monkeypatch):
    toy = documented(monkeypatch, "toy_with_an_entry", **{'"toy"': '"toy_with_an_entry"'})
    fields = {"num_layers": "depth", "hidden": "dim", "heads": "n_heads", "neurons": "mlp_dim"}
    model = toy.ToyModel(toy.ToyConfig())
    for module, error in (("first", "The conversion had no effect: ToyModel does not call"), ("mixer", None)):
        stack = Stack("encoder", "blocks", Attention(module), ("wide",), "narrow", causal=False, **fields)
        register_family(Family("toy_with_an_entry", "ToyConfig", (stack,)))
        if error:
            with pytest.raises(UnsupportedModelError, match=error):
                convert_attention(model, LOCAL)
        else:
            assert type(convert_attention(model, LOCAL)).__name__ == "EfficientToyModel"
