"""Every bad `efficient` block and every absurd size is a `ConfigError` that says where, before memory is allocated."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_efficient import ConfigError
from hf_efficient.attention.config import AttentionConfig
from hf_efficient.models.block import EfficientBlock, StackBlock
from hf_efficient.models.classes import efficient_config_class

from ..families import config_class, make_config


def read(name, block, **fields):
    config = make_config(name).to_dict() | {"efficient": block} | fields
    return efficient_config_class(config_class(name))(**{k: v for k, v in config.items() if k != "model_type"})


def encoder(**entry):
    return {"stacks": {"encoder": entry}}


BAD_BLOCKS = {
    "not a mapping": ("bert", [], "must be a mapping, got list"),
    "zero is not a mapping": ("bert", 0, "must be a mapping, got int"),
    "unknown key": ("bert", {"stack": {}}, "Did you mean 'stacks'"),
    "stacks not a mapping": ("bert", {"stacks": []}, r"efficient\.stacks must be a mapping"),
    "stack not a mapping": ("bert", {"stacks": {"encoder": 1}}, r"efficient\.stacks\.encoder must be a mapping"),
    "unknown stack": ("bert", {"stacks": {"decoder": {}}}, r"'decoder'.* Known: encoder"),
    "unknown stack kept": ("bert", {"kept_layers": {"x": [0, 1, 2]}}, r"efficient\.kept_layers 'x'.* Known: encoder"),
    "kept layers too short": ("bert", {"kept_layers": {"encoder": [0]}}, r"kept_layers\.encoder has 1 entries for 3"),
    "kept layers not numbers": ("bert", {"kept_layers": {"encoder": ["a"]}}, r"kept_layers\.encoder must be a list"),
    "kept layer negative": ("bert", {"kept_layers": {"encoder": [0, 1, -1]}}, "integers from 0"),
    "unknown size": ("bert", encoder(neuron=[1, 1, 1]), r"efficient\.stacks\.encoder 'neuron'.* mean 'neurons'"),
    "too few sizes": ("bert", encoder(neurons=[1, 1]), r"stacks\.encoder\.neurons has 2 entries for 3 layers"),
    "too many sizes": ("bert", encoder(neurons=[1] * 4), r"stacks\.encoder\.neurons has 4 entries for 3 layers"),
    "no sizes": ("bert", encoder(neurons=[]), r"stacks\.encoder\.neurons has 0 entries for 3 layers"),
    "size zero": ("bert", encoder(neurons=[1, 0, 1]), r"stacks\.encoder\.neurons must be .* integers from 1"),
    "size negative": ("bert", encoder(heads=[1, 1, -2]), r"stacks\.encoder\.heads must be .* integers from 1"),
    "size above stock": (
        "bert",
        encoder(neurons=[32, 33, 1]),
        r"stacks\.encoder\.neurons\[1\] is 33; allowed: 1 to 32",
    ),
    "heads above stock": ("bert", encoder(heads=[4, 4, 5]), r"stacks\.encoder\.heads\[2\] is 5; allowed: 1 to 4"),
    "huge size": ("bert", encoder(neurons=[10**12] * 3), "integers from 1"),
    "huge list": ("bert", encoder(neurons=[1] * 100_000), "must be a list"),
    "size a bool": ("bert", encoder(neurons=[True] * 3), r"stacks\.encoder\.neurons must be .* integers"),
    "size a float": ("bert", encoder(neurons=[1.0] * 3), r"stacks\.encoder\.neurons must be .* integers"),
    "size a string": ("bert", encoder(neurons=["1"] * 3), r"stacks\.encoder\.neurons must be .* integers"),
    "sizes a string": ("bert", encoder(neurons="111"), r"stacks\.encoder\.neurons must be a list"),
    "sizes a mapping": ("bert", encoder(neurons={"0": 1}), r"stacks\.encoder\.neurons must be a list"),
    "no cross attention": ("bert", encoder(cross_heads=[1, 1, 1]), "'cross_heads'.* Known: heads, kv_heads, neurons"),
    "attention not a list": (
        "bert",
        encoder(attention={"kind": "local"}),
        r"stacks\.encoder\.attention must be a list",
    ),
    "attention too short": ("bert", encoder(attention=[{"kind": "local"}]), r"encoder\.attention has 1 entries for 3"),
    "attention not a mapping": ("bert", encoder(attention=["local"] * 3), r"encoder\.attention\[0\]: .*mapping"),
    "attention of no kind": (
        "bert",
        encoder(attention=[{}, {}, {"kind": "locla"}]),
        r"efficient\.stacks\.encoder\.attention\[2\]: .*Did you mean 'local'",
    ),
    "attention unknown field": ("bert", encoder(attention=[{"windw": 1}]), r"attention\[0\]: .*mean 'window'"),
    "attention bad window": ("bert", encoder(attention=[{"kind": "local", "window": 0}]), r"\[0\]: window must be"),
    "newer version": ("bert", {"version": 2}, "version 2, .*reads version 1. Upgrade it: pip install -U"),
    "version of another type": ("bert", {"version": [1]}, "Upgrade it"),
    "broken group": ("llama", {"stacks": {"decoder": {"heads": [3, 2, 2], "kv_heads": [1, 1, 1]}}}, "whole groups"),
    "kv_heads missing": ("llama", {"stacks": {"decoder": {"heads": [2, 2, 2]}}}, r"need kv_heads \(1, 1, 1\)"),
    "kv_heads of another": (
        "llama",
        {"stacks": {"decoder": {"heads": [2] * 3, "kv_heads": [2] * 3}}},
        "need kv_heads",
    ),
    "kv_heads alone": ("llama", {"stacks": {"decoder": {"kv_heads": [1] * 3}}}, "kv_heads needs `heads`"),
    "kv_heads without groups": ("bert", encoder(heads=[2] * 3, kv_heads=[1] * 3), r"need kv_heads \(2, 2, 2\)"),
    "more than four times the hidden size": (
        "gpt2",
        {"stacks": {"decoder": {"neurons": [64, 65, 64]}}},
        r"neurons\[1\] is 65; allowed: 1 to 64",
    ),
    "more than mlp_ratio says": ("dinov2", encoder(neurons=[65] * 3), r"neurons\[0\] is 65; allowed: 1 to 64"),
    "more than the config of the tower says": (
        "clip",
        {"stacks": {"vision": {"neurons": [33] * 3}}},
        r"stacks\.vision\.neurons\[0\] is 33; allowed: 1 to 32",
    ),
    "cross attention that the config leaves out": (
        "bert",
        encoder(cross_attention=[{"kind": "linear"}] * 3),
        "no cross attention",
    ),
    "a tower of another model": ("clip", encoder(), r"'encoder'.* Known: text, vision"),
    "too few layers of a tower": ("clip", {"stacks": {"vision": {"attention": [{}]}}}, r"vision\.attention has 1"),
    "heads of one of two stacks": (
        "bart",
        {"stacks": {"decoder": {"heads": [4, 5, 4]}}},
        r"heads\[1\] is 5; .*1 to 4",
    ),
    "bias ties heads": ("t5", encoder(heads=[2, 1, 2]), r"encoder\.heads is \(2, 1, 2\); all layers .* same number"),
}


@pytest.mark.parametrize(("name", "block", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_bad_block_is_refused_and_the_message_says_where(name, block, message):
    with pytest.raises(ConfigError, match=message):
        read(name, block)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("bert", None),
        ("bert", {}),
        ("bert", {"version": 1, "stacks": {}}),
        ("bert", encoder(neurons=[32, 1, 7], heads=[4, 1, 2], attention=[{"kind": "local"}, {}, {"kind": "linear"}])),
        ("bert", {"kept_layers": {"encoder": [0, 3, 11]}}),
        ("llama", {"stacks": {"decoder": {"heads": [4, 2, 2], "kv_heads": [2, 1, 1]}}}),
        ("t5", {"stacks": {"encoder": {"heads": [2] * 3}, "decoder": {"heads": [1] * 3, "cross_heads": [4, 1, 2]}}}),
    ],
)
def test_a_good_block_is_read_and_written_back(name, block):
    config = read(name, block)
    parsed = config.block()
    assert EfficientBlock.from_dict(parsed.to_dict()) == parsed
    assert parsed.is_trivial() == (not (block or {}).get("stacks"))


ABSURD = [
    ("bert", {"hidden_size": 10**12}),
    ("bert", {"hidden_size": 0}),
    ("bert", {"hidden_size": -16}),
    ("bert", {"num_hidden_layers": 10**9}),
    ("bert", {"num_attention_heads": 10**9}),
    ("bert", {"intermediate_size": 10**12}),
    ("bert", {"vocab_size": 10**12}),
    ("bert", {"max_position_embeddings": 10**12}),
    ("bert", {"type_vocab_size": 10**12}),
    ("vit", {"image_size": 10**9}),
    ("vit", {"image_size": [16, 10**9]}),
    ("vit", {"patch_size": 0}),
    ("vit", {"head_dim": 10**12}),
    ("vit", {"head_dim": "8"}),
    ("vit", {"head_dim": 8.0}),
    ("llama", {"num_attention_heads": 0}),
    ("llama", {"num_key_value_heads": 0}),
    ("llama", {"num_key_value_heads": 3}),
    ("llama", {"head_dim": 10**12}),
    ("electra", {"embedding_size": 10**12}),
    ("dinov2", {"mlp_ratio": 10**9}),
    ("gpt2", {"n_positions": 10**12}),
    ("bart", {"decoder_ffn_dim": 10**12}),
    ("marian", {"decoder_vocab_size": 10**12}),
    ("whisper", {"max_source_positions": 10**12}),
    ("clip", {"text_config": {"hidden_size": 10**12}}),
    ("clip", {"vision_config": {"image_size": 10**9}}),
    ("t5", {"d_model": 10**12}),
    ("t5", {"d_kv": 10**12}),
    ("t5", {"d_ff": 10**12}),
    ("t5", {"num_decoder_layers": 10**9}),
]


@pytest.mark.parametrize(("name", "field"), ABSURD)
def test_absurd_stock_sizes_are_refused_when_config_json_is_read(name, field, tmp_path):
    read(name, None).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text()) | {"model_type": f"efficient_{name}", "efficient": {"version": 1}}
    path.write_text(json.dumps(good))
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"efficient_{name}"
    path.write_text(json.dumps(good | field))
    (name, value) = next(iter(field.items()))
    with pytest.raises(ConfigError, match=next(iter(value)) if isinstance(value, dict) else name):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "said"), [("gpt2", "hidden_size", "n_embd"), ("t5", "hidden_size", "d_model")]
)
def test_an_absurd_size_is_found_under_another_name_of_its_field(name, field, said):
    with pytest.raises(ConfigError, match=f"has {said}=1000000000000"):
        read(name, None, **{field: 10**12})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["local", "encoder"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["kind", "window", "encoder", "heads"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
ATTENTION = st.fixed_dictionaries(
    {}, optional={"kind": JSON | st.sampled_from(["local", "full"]), "window": JSON, "global_tokens": JSON, "x": JSON}
)
STACK = st.fixed_dictionaries({}, optional={"attention": JSON | st.lists(ATTENTION), "heads": JSON, "neurons": JSON})
BLOCK = st.fixed_dictionaries(
    {},
    optional={
        "version": JSON | st.just(1),
        "stacks": JSON | st.dictionaries(st.text(max_size=3), STACK, max_size=2),
        "kept_layers": JSON | st.dictionaries(st.text(max_size=3), st.lists(st.integers(-1, 9)), max_size=2),
    },
)


@given(JSON | BLOCK)
def test_whatever_the_block_is_only_a_config_error_escapes(data):
    try:
        block = EfficientBlock.from_dict(data)
    except ConfigError:
        return
    assert EfficientBlock.from_dict(block.to_dict()).to_dict() == block.to_dict()


def test_writing_leaves_out_what_says_nothing():
    full, local = AttentionConfig(), AttentionConfig(kind="local", window=3)
    block = EfficientBlock({"a": StackBlock((full, full)), "b": StackBlock((full, local)), "c": StackBlock((), {})})
    attention = [{"kind": "full"}, {"kind": "local", "window": 3, "global_tokens": 0}]
    assert block.to_dict() == {"version": 1, "stacks": {"b": {"attention": attention}}}
    assert not block.is_trivial() and EfficientBlock({"a": block.stacks["a"]}).is_trivial()
