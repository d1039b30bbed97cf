"""The first tokens of a causal model stay in sight unless told otherwise; what was saved before keeps its number."""

import json

import pytest
import torch
import transformers

from hf_efficient import AttentionConfig, ConfigError, convert_attention
from hf_efficient.attention.config import KINDS
from hf_efficient.conversion.convert import efficient_config
from hf_efficient.models.block import EfficientBlock

from ..families import make_inputs, make_model
from ..helpers import assert_close

LOCAL = AttentionConfig("local", window=2)


def globals_of(model):
    return {
        name: [one.get("global_tokens") for one in stack.get("attention", [])]
        for name, stack in model.config.efficient["stacks"].items()
    }


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"decoder": [4] * 3}),
        ("gpt2", {"decoder": [4] * 3}),
        ("bart", {"encoder": [0] * 3, "decoder": [4] * 3}),
        ("t5", {"encoder": [0] * 3, "decoder": [4] * 3}),
        ("bert", {"encoder": [0] * 3}),
        ("vit", {"encoder": [0] * 3}),
    ],
)
def test_decoders_keep_four_first_tokens(family, expected):
    model = make_model(family)
    assert globals_of(convert_attention(model, LOCAL)) == expected
    none = convert_attention(model, AttentionConfig("local", window=2, global_tokens=0))
    assert globals_of(none) == {name: [0] * 3 for name in expected}
    one = convert_attention(model, AttentionConfig("local", window=2, global_tokens=1))
    assert globals_of(one) == {name: [1] * 3 for name in expected}
    config = efficient_config(model.config, attention=LOCAL)
    assert config.efficient == convert_attention(model, LOCAL).config.efficient


def test_a_default_is_the_number_that_it_stands_for():
    model, inputs = make_model("llama"), make_inputs("llama", "left")
    four = convert_attention(model, AttentionConfig("local", window=2, global_tokens=4))
    none = convert_attention(model, AttentionConfig("local", window=2, global_tokens=0))
    default = convert_attention(model, LOCAL)
    assert torch.equal(default(**inputs)[0], four(**inputs)[0])
    assert (default(**inputs)[0] - none(**inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_only_kinds_that_would_lose_them_are_given_some(kind):
    config = AttentionConfig(kind)
    expected = {"local": 4, "topk": 4, "strided": 0}.get(kind)
    assert config.resolve(causal=True).global_tokens == expected
    assert config.resolve(causal=False).global_tokens == (None if expected is None else 0)
    assert AttentionConfig(kind, global_tokens=0).resolve(causal=True).global_tokens == (
        None if expected is None else 0
    )
    if expected is None:
        with pytest.raises(ConfigError, match="global_tokens=1 has no meaning"):
            AttentionConfig(kind, global_tokens=1)


def test_a_window_of_the_model_needs_none():
    fields = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model, inputs = make_model("qwen3", use_sliding_window=True, **fields), make_inputs("qwen3", "left")
    own = convert_attention(model, AttentionConfig("local", window=4), layers=[0, 2])
    assert globals_of(own) == {"decoder": [0, None, 0]}
    real = inputs["attention_mask"].bool()
    assert_close(own(**inputs)[0][real], model(**inputs)[0][real], 1e-5)
    assert globals_of(convert_attention(model, LOCAL)) == {"decoder": [0, 4, 0]}
    mistral = make_model("mistral", sliding_window=4)
    assert globals_of(convert_attention(mistral, LOCAL)) == {"decoder": [0] * 3}


@pytest.mark.parametrize("said", [None, 0, 2])
def test_saved_before_it_stays_what_it_was(said, tmp_path):
    """A config.json without the number means none, also in a decoder."""
    number = AttentionConfig("local", window=2, global_tokens=said or 0)
    model, inputs = convert_attention(make_model("llama"), number), make_inputs("llama", "left")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for one in saved["efficient"]["stacks"]["decoder"]["attention"]:
        assert one.pop("global_tokens") == (said or 0), "the number is always written"
        if said is not None:
            one["global_tokens"] = said
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = type(model).from_pretrained(tmp_path)
    assert globals_of(convert_attention(loaded, {0: AttentionConfig()}))["decoder"][1:] == [said or 0] * 2
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert EfficientBlock.from_dict(saved["efficient"]) == model.config.block()


@pytest.mark.parametrize("kind", [LOCAL, AttentionConfig("topk", block_size=2, top_k=2)], ids=["local", "topk"])
def test_they_are_kept_while_decoding(kind):
    model = convert_attention(make_model("llama", transformers.LlamaForCausalLM), kind)
    ids = torch.randint(3, 50, (2, 11))
    whole, cache, steps = model(ids, use_cache=False).logits, None, []
    for part in ids.split([5, *[1] * 6], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole, 1e-5)
