"""Which layer gets which attention."""

import pytest

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, efficient_config
from hf_efficient.attention.dispatch import variant_of
from hf_efficient.conversion.mixing import CROSS, only, read_layers, spread, spread_layers
from hf_efficient.models.anatomy import Anatomy

from ..families import make_inputs, make_model

FULL = AttentionConfig()
LOCAL = AttentionConfig("local", window=2)
LINEAR = AttentionConfig("linear")


def kinds(model):
    """{stack: [self-attention kinds], stack.cross_attention: [...]} as the modules have it."""
    found = {}
    for stack in Anatomy.of(model).stacks:
        names = (stack.name, f"{stack.name}.{CROSS}")
        for name, attention in zip(names, stack.attentions.values(), strict=False):
            variants = [variant_of(layer.get_submodule(attention.module)) for layer in stack.layers]
            found[name] = ["full" if variant is None else variant.config.kind for variant in variants]
    return found


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        ("all", range(12)),
        (":", range(12)),
        (3, [3]),
        ("3", [3]),
        ("1-4", [1, 2, 3, 4]),
        ("3::4", [3, 7, 11]),
        ("::5", [0, 5, 10]),
        ("8:", [8, 9, 10, 11]),
        (":2", [0, 1]),
        ("2:9:3", [2, 5, 8]),
    ],
)
def test_keys_name_layers(key, layers):
    assert list(read_layers(key, 12)[1]) == list(layers)


@pytest.mark.parametrize("key", ["", "a", "1-", "-1", -1, 1.5, True, None, "::0", "1:2:3:4", "0x1", "٣"])
def test_other_keys_are_refused(key):
    with pytest.raises(ConfigError, match="names no layers"):
        read_layers(key, 12)


@pytest.mark.parametrize("key", [12, "12", "10-12", "4-3", "12:", "5:5"])
def test_layers_that_do_not_exist_are_refused(key):
    with pytest.raises(ConfigError, match=r"does not exist: this model has layers 0 to 11"):
        read_layers(key, 12)


def test_the_more_special_key_wins_in_any_order():
    asked = {"all": LOCAL, "::2": LINEAR, "4-5": FULL, 5: LINEAR}
    expected = {0: LINEAR, 1: LOCAL, 2: LINEAR, 3: LOCAL, 4: FULL, 5: LINEAR}
    assert spread_layers(asked, 6) == expected
    assert spread_layers(dict(reversed(asked.items())), 6) == expected


@pytest.mark.parametrize(
    "asked", [{1: LOCAL, "1": LINEAR}, {"0-2": LOCAL, "2-3": LINEAR}, {"::2": LOCAL, "::4": LINEAR}]
)
def test_equally_special_keys_must_not_overlap(asked):
    with pytest.raises(ConfigError, match="is given twice"):
        spread_layers(asked, 6)


@pytest.mark.parametrize("asked", [None, "local", [LOCAL], {0: "local"}, {0: {"kind": "local"}}])
def test_only_configs_are_taken(asked):
    with pytest.raises(ConfigError, match=r"[Ee]xpected an AttentionConfig"):
        spread_layers(asked, 6)


def test_stacks_are_spread_apart():
    stacks, crossed = {"encoder": 3, "decoder": 2}, {"decoder": 2}
    both = spread({0: LOCAL}, stacks, crossed)
    assert both == {name: {"attention": {0: LOCAL}, CROSS: {}} for name in stacks}
    apart = spread({"encoder": LOCAL, "decoder": {1: LINEAR}, CROSS: LINEAR}, stacks, crossed)
    assert apart["encoder"] == {"attention": dict.fromkeys(range(3), LOCAL), CROSS: {}}
    assert apart["decoder"] == {"attention": {1: LINEAR}, CROSS: dict.fromkeys(range(2), LINEAR)}
    with pytest.raises(ConfigError, match="Did you mean 'decoder'"):
        spread({"encoder": LOCAL, "decodr": LOCAL}, stacks, crossed)
    with pytest.raises(ConfigError, match="no cross attention to convert"):
        spread({CROSS: LINEAR}, {"encoder": 3}, {})


def test_one_config_for_some_layers():
    assert only(LOCAL, None) is LOCAL
    assert only(LOCAL, "::2") == {"::2": LOCAL}
    assert only(LOCAL, (0, 2)) == {0: LOCAL, 2: LOCAL}
    assert only(LOCAL, 2) == {2: LOCAL}


def test_nothing_to_convert_is_refused():
    for asked in ([], ()):
        with pytest.raises(ConfigError, match="`layers` is empty"):
            only(LOCAL, asked)
    with pytest.raises(ConfigError, match="is empty, so there is nothing to convert"):
        spread_layers({}, 6)
    with pytest.raises(ConfigError, match=r"AttentionConfig\.from_dict\(\{'kind': 'local'\}\)"):
        spread_layers({"kind": "local"}, 6)
    for key in ("3-1", "2:2"):
        with pytest.raises(ConfigError, match="has layers 0 to 5, none of which is in this range"):
            spread_layers({key: LOCAL}, 6)


def test_stacks_and_layers_do_not_stand_side_by_side():
    with pytest.raises(ConfigError, match="Layer 'all' cannot stand beside the names of stacks"):
        spread({"all": LOCAL, "decoder": LOCAL}, {"encoder": 3, "decoder": 3}, {})
    with pytest.raises(ConfigError, match=r"Unknown stack 'encoder'\. Did you mean 'decoder'"):
        spread({"encoder": LOCAL}, {"decoder": 3}, {})


def test_a_model_is_mixed_as_asked():
    model = make_model("bert")
    assert kinds(convert_attention(model, {"all": LOCAL, "2::3": FULL, 0: LINEAR})) == {
        "encoder": ["linear", "local", "full"]
    }
    assert kinds(convert_attention(model, LOCAL, layers="::2")) == {"encoder": ["local", "full", "local"]}
    assert efficient_config(model.config, {"1-2": LOCAL}).efficient["stacks"]["encoder"]["attention"] == [
        {"kind": "full"},
        {"kind": "local", "window": 2, "global_tokens": 0},
        {"kind": "local", "window": 2, "global_tokens": 0},
    ]


def test_encoder_decoder_and_cross_attention_are_chosen_apart(tmp_path):
    model, inputs = make_model("t5"), make_inputs("t5", "right")
    asked = {"encoder": {"all": LOCAL, 1: FULL}, CROSS: {2: LINEAR}}
    mixed = convert_attention(model, asked)
    expected = {
        "encoder": ["local", "full", "local"],
        "decoder": ["full"] * 3,
        f"decoder.{CROSS}": ["full"] * 2 + ["linear"],
    }
    assert kinds(mixed) == expected
    uncrossed = convert_attention(model, {"encoder": asked["encoder"]})
    assert (mixed(**inputs)[0] - uncrossed(**inputs)[0]).abs().max() > 1e-3
    mixed.save_pretrained(tmp_path)
    loaded = type(mixed).from_pretrained(tmp_path)
    assert kinds(loaded) == expected
    assert (loaded(**inputs)[0] - mixed(**inputs)[0]).abs().max() == 0
    # A second conversion keeps what it does not name.
    again = convert_attention(mixed, {"decoder": LOCAL})
    assert kinds(again) == expected | {"decoder": ["local"] * 3}
    assert kinds(convert_attention(again, {"encoder": FULL, "decoder": FULL, CROSS: FULL})) == {
        name: ["full"] * 3 for name in expected
    }


def test_cross_attention_needs_a_kind_for_two_sequences():
    with pytest.raises(UnsupportedModelError, match=r"cannot serve cross attention\. Kinds that can: .*linear"):
        convert_attention(make_model("t5"), {CROSS: LOCAL})
    with pytest.raises(ConfigError, match="no cross attention to convert"):
        convert_attention(make_model("llama"), {CROSS: LINEAR})
