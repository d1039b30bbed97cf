"""Recipes: what is read, what is refused and how, and that nothing but ConfigError comes out of a faulty one."""

import copy
import math
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.errors import ConfigError
from hf_efficient.io.yaml import MAX_CHARACTERS, parse, plain
from hf_efficient.recipes.recipe import STAGES, Recipe, shipped_recipes
from hf_efficient.stages.attention import LongerSettings, TransferSettings
from hf_efficient.stages.settings import TrainingSettings

from ..helpers import random_examples

BASE = {
    "name": "demo",
    "task": "text-classification",
    "model": {"name_or_path": "bundled:minilm-l6"},
    "data": {"name_or_path": "bundled:bbc-news", "max_length": 64},
    "teacher": {"epochs": 1},
    "stages": [
        {"attention": {"kind": "local", "window": 8}},
        {"prune": {"ratio": 0.5}},
        {"distill": {"losses": {"kd": 1, "ce": 0.5}}},
    ],
}


def changed(path, value):
    """BASE with one value replaced: `changed(["stages", 1, "prune", "ratio"], 2)`."""
    data = copy.deepcopy(BASE)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return data


def refused(data):
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_round_trips(name, tmp_path):
    recipe = Recipe.from_yaml(name)
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = Recipe.from_yaml(path)
    assert again == recipe and again.fingerprint() == recipe.fingerprint()


def test_both_demos_are_shipped():
    assert set(shipped_recipes()) >= {"bbc-news", "digits"}


def test_digits_model_config_is_one_that_transformers_builds():
    import transformers

    config = dict(Recipe.from_yaml("digits").model.config)
    built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForImageClassification.from_config(built)
    assert model.config.hidden_size == 64 and sum(p.numel() for p in model.parameters()) < 300_000


def test_defaults_are_written_out_and_numbers_normalised():
    recipe = Recipe.from_dict(BASE)
    assert recipe.seed == 0 and recipe.measure.repeats == 20
    assert recipe.teacher == TrainingSettings(epochs=1.0)
    assert [stage.name for stage in recipe.stages] == ["attention", "prune", "distill"]
    assert recipe.stages[0].settings.config == AttentionConfig(kind="local", window=8)
    assert recipe.stages[1].to_dict()["prune"]["calibration_samples"] == 256
    assert recipe.stages[2].settings.losses == {"kd": 1.0, "ce": 0.5}


def test_fingerprint_same_for_other_spellings_and_differs_for_other_recipes():
    recipe = Recipe.from_dict(BASE)
    spelt_out = dict(reversed(recipe.to_dict().items()))
    assert Recipe.from_dict(spelt_out).fingerprint() == recipe.fingerprint()
    assert Recipe.from_dict(changed(["teacher", "epochs"], 1.0)).fingerprint() == recipe.fingerprint()
    other_order = changed(["stages", 2, "distill", "losses"], {"ce": 0.5, "kd": 1})
    assert Recipe.from_dict(other_order).fingerprint() == recipe.fingerprint()
    others = [
        changed(["seed"], 1),
        changed(["teacher"], None),
        changed(["stages", 1, "prune", "ratio"], 0.25),
        changed(["stages"], BASE["stages"][::-1]),
    ]
    digests = {Recipe.from_dict(other).fingerprint() for other in others}
    assert len(digests) == len(others) and recipe.fingerprint() not in digests


# Each: where, what, and the words that the message must hold.
REFUSED = [
    (["stages", 1, "prune"], {"ratoi": 0.5}, ["stages[1].prune.ratoi", "Did you mean 'ratio'", "importance"]),
    (["stages", 1, "prune", "ratio"], 1.5, ["stages[1].prune", "1.5", "between 0 and 1"]),
    (["stages", 1, "prune", "ratio"], "half", ["stages[1].prune", "'half'", "between 0 and 1"]),
    (["stages", 1, "prune", "granularity"], 5, ["stages[1].prune"]),
    (["stages", 1, "prune", "importance"], "taylr", ["stages[1].prune", "Did you mean 'taylor'"]),
    (["stages", 1, "prune", "batch_size"], 0, ["stages[1].prune.batch_size", "from 1 to", "got 0"]),
    (["stages", 0, "attention", "kind"], "loca1", ["stages[0].attention", "Did you mean 'local'", "linear"]),
    (["stages", 0, "attention", "windou"], 1, ["stages[0].attention.windou", "Did you mean 'window'"]),
    (["stages", 0, "attention", "window"], "8", ["stages[0].attention", "'8'"]),
    (["stages", 0, "attention", "layers"], [], ["stages[0].attention.layers", "list of layer numbers"]),
    (["stages", 0, "attention", "layers"], [0, 0], ["stages[0].attention.layers", "twice"]),
    (["stages", 0, "attention", "layers"], {"0": {}}, ["stages[0].attention", "kind, window", "inside each layer"]),
    (["stages", 0], {"attenton": {}}, ["stages[0]", "Did you mean 'attention'"]),
    (["stages", 0], {"attention": {}, "prune": {}}, ["stages[0]", "one stage"]),
    (["stages", 0], "prune", ["stages[0]", "one stage", "'prune'"]),
    (["stages", 0], {"attention": 3}, ["stages[0].attention must be a mapping", "got 3"]),
    (["stages"], {"prune": {}}, ["stages must be a list"]),
    (["stages"], [{"prune": {}}] * 101, ["at most 100 stages"]),
    (["stages", 2, "distill", "losses"], {"kdd": 1}, ["stages[2].distill.losses", "Did you mean 'kd'"]),
    (["stages", 2, "distill", "losses"], {"kd": 0}, ["stages[2].distill.losses", "above 0"]),
    (["stages", 2, "distill", "losses"], {"kd": -1}, ["stages[2].distill.losses", "0 to 1e6"]),
    (["stages", 2, "distill", "temperature"], 0, ["stages[2].distill.temperature", "above 0", "got 0"]),
    (["teacher", "epohcs"], 1, ["teacher.epohcs", "Did you mean 'epochs'"]),
    (["teacher", "epochs"], True, ["teacher.epochs", "got True"]),
    (["teacher", "batch_size"], 1.5, ["teacher.batch_size", "an integer from 1", "got 1.5"]),
    (["teacher", "learning_rate"], math.nan, ["recipe.teacher.learning_rate", "finite", "nan"]),
    (["teacher", "learning_rate"], math.inf, ["recipe.teacher.learning_rate", "finite", "inf"]),
    (["seed"], 10**5000, ["recipe.seed", "64 bits", "too large to show"]),
    (["seed"], -1, ["seed must be an integer", "got -1"]),
    (["seed"], None, ["seed must be an integer", "got None"]),
    (["task"], "text-clasification", ["task", "Did you mean 'text-classification'"]),
    (["task"], ["seq2seq"], ["task must be one of", "seq2seq"]),
    (["name"], "../etc", ["name must be", "'../etc'"]),
    (["name"], 3, ["name must be", "got 3"]),
    (["models"], {}, ["recipe.models", "Did you mean 'model'"]),
    (["model"], "bert", ["model must be a mapping", "'bert'"]),
    (["model"], {}, ["model.name_or_path or config"]),
    (["model", "config"], {"model_type": "bert"}, ["model.name_or_path or config", "one of them"]),
    (["model"], {"config": {"hidden_size": 4}}, ["model.config.model_type"]),
    (["model", "name_or_path"], "bundled:minilm", ["model.name_or_path", "Did you mean 'minilm-l6'"]),
    (["model", "name_or_path"], "./no/such/folder", ["model.name_or_path", "no such model folder"]),
    (["model", "trust_remote_code"], "yes", ["model.trust_remote_code must be true or false", "'yes'"]),
    (["data", "name_or_path"], None, ["data.name_or_path must be text", "got None"]),
    (["data", "name_or_path"], "bundled:bbc-new", ["data.name_or_path", "Did you mean 'bbc-news'"]),
    (["model", "tokenizer"], "bundled:minilm-l6", ["model.tokenizer", "has its own tokenizer"]),
    (["model"], {"config": {"model_type": "bert"}}, ["model.tokenizer or model.tokenizer_size must be given"]),
    (
        ["model"],
        {"config": {"model_type": "bert"}, "tokenizer_size": 5},
        ["tokenizer_size must be an integer from 300"],
    ),
    (["data", "name_or_path"], "a\0b", ["recipe.data.name_or_path"]),
    (["data", "image_column"], "image", ["data.image_column has no meaning", "text_column"]),
    (["data", "test_fraction"], 1, ["data.test_fraction", "got 1"]),
    (["data", "limit"], 0, ["data.limit", "from 1", "got 0"]),
    (["measure"], None, ["measure must be a mapping"]),
    (["measure"], {"metrics": "f1"}, ["measure.metrics must be a list", "'f1'"]),
    (["measure"], {"metrics": ["f1", "f1"]}, ["measure.metrics must be a list of up to 20 different names"]),
    (["measure"], {"metrics": ["recal"]}, ["measure.metrics", "Did you mean 'recall'", "needs trust_remote_code"]),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_path_given_and_allowed(path, value, words):
    message = refused(changed(path, value))
    assert all(word in message for word in words), message
    assert len(message) < 1000


def test_the_base_of_those_refusals_is_accepted():
    assert Recipe.from_dict(copy.deepcopy(BASE)).task == "text-classification"


@pytest.mark.parametrize("key", ["name", "task", "model", "data"])
def test_missing_section_is_named(key):
    assert f"must say its {key}" in refused({name: value for name, value in BASE.items() if name != key})


def attention(settings_of):
    """The attention stage of BASE with other settings, and that it survives being written."""
    recipe = Recipe.from_dict(changed(["stages", 0, "attention"], settings_of))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    return recipe.stages[0].settings


FULL_ATTENTION, LOCAL = AttentionConfig(), AttentionConfig(kind="local", window=4)
LOCAL_YAML = {"kind": "local", "window": 4}


def test_attention_in_some_layers_and_by_layer():
    some = attention(LOCAL_YAML | {"layers": [3, 1]})
    assert some.layers == (1, 3) and some.config == LOCAL
    assert attention(LOCAL_YAML | {"layers": "3::4"}).layers == "3::4"
    by_layer = attention({"layers": {0: {"kind": "full"}, "2-4": LOCAL_YAML, "all": {"kind": "linear"}}})
    assert by_layer.config == {"0": FULL_ATTENTION, "2-4": LOCAL, "all": AttentionConfig("linear")}
    assert by_layer.layers is None


def test_attention_by_stack():
    stacks = {"encoder": LOCAL_YAML, "decoder": {"all": LOCAL_YAML, "0": {}}, "cross_attention": {"kind": "linear"}}
    stage = attention({"layers": stacks})
    by_layer = {"all": LOCAL, "0": FULL_ATTENTION}
    assert stage.config == {"encoder": LOCAL, "decoder": by_layer, "cross_attention": AttentionConfig("linear")}


def test_attention_stages_are_what_mixing_spreads():
    """What a stage reads goes to `convert_attention` as it is."""
    from hf_efficient.conversion.mixing import spread

    stage = attention({"layers": {"all": LOCAL_YAML, "1::2": {"kind": "full"}, 3: {"kind": "linear"}}})
    found = spread(stage.config, {"encoder": 5}, {})["encoder"]["attention"]
    assert [found[layer].kind for layer in range(5)] == ["local", "full", "local", "linear", "local"]


@pytest.mark.parametrize("key", ["a", "-1", "1-", "0-999999999", "²", "", "1:2:0"])
def test_layer_patterns_refused(key):
    for settings_of in ({"layers": {key: {"kind": "full"}}}, LOCAL_YAML | {"layers": key}):
        message = refused(changed(["stages", 0, "attention"], settings_of))
        assert "stages[0].attention.layers" in message and "names no layers" in message


@pytest.mark.parametrize("key", ["4-2", "5:5", "99999"])
def test_layers_that_no_model_has_are_refused(key):
    message = refused(changed(["stages", 0, "attention"], {"layers": {key: {"kind": "full"}}}))
    assert f"stages[0].attention.layers: Layer {key!r} does not exist" in message


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"0-2": {}, "1-4": {}}, "Layer 1 is given twice"),
        ({"encoder": {}, "decodr": {}}, "Did you mean 'decoder'"),
        ({"encoder": {"0": {"kind": "locla"}}}, r"layers\.encoder\.0: .*Did you mean 'local'"),
        ({"encoder": {"first": {}}}, r"layers\.encoder: 'first' names no layers"),
        ({"decoder": 3}, r"layers\.decoder must be a mapping"),
        ({"all": {}, "decoder": {}}, "Layer 'all' cannot stand beside the names of stacks"),
        ({"encoder": {"windw": 3}}, "Did you mean 'window'"),
        ({}, "is empty"),
    ],
)
def test_mixing_refused(layers, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(changed(["stages", 0, "attention"], {"layers": layers}))


def test_longer_inputs_and_transfer():
    stage = attention(LOCAL_YAML | {"positions": 2048, "transfer": {"max_steps": 50}})
    assert stage.longer == LongerSettings(positions=2048) and stage.longer.position_method == "tile"
    assert stage.transfer == TransferSettings(max_steps=50) and stage.transfer.learning_rate == 1e-2
    other = attention({"positions": 64, "position_method": "interpolate", "layers": {"1-2": LOCAL_YAML}})
    assert other.longer.position_method == "interpolate" and other.transfer is None
    assert attention({"positions": 64, "rope": "yarn"}).longer.rope == "yarn"
    assert set(attention(LOCAL_YAML).to_dict()) == {"kind", "window"}  # only what was asked for


def test_transfer_settings_can_be_overridden():
    recipe = Recipe.from_dict(BASE).with_overrides({"attention.transfer.max_steps": "50"})
    assert recipe.stages[0].settings.transfer == TransferSettings(max_steps=50)
    again = recipe.with_overrides({"attention.transfer.learning_rate": 0.1, "attention.positions": "1024"})
    assert again.stages[0].settings.transfer == TransferSettings(max_steps=50, learning_rate=0.1)
    assert again.stages[0].settings.longer.positions == 1024
    assert again.with_overrides({"attention.transfer": "null"}).stages[0].settings.transfer is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positions": 1}, r"stages\[0\]\.attention\.positions must be an integer from 2"),
        ({"positions": "2048"}, "got '2048'"),
        (
            {"positions": 64, "position_method": "tiel"},
            r"position_method must be one of tile, interpolate, got 'tiel'",
        ),
        ({"positions": 64, "rope": "ntk"}, r"rope must be one of linear, dynamic, yarn, or null, got 'ntk'"),
        ({"rope": "yarn"}, r"attention\.positions must say how many tokens"),
        ({"position_method": "interpolate"}, "positions must say"),
        ({"transfer": True}, r"stages\[0\]\.attention\.transfer must be a mapping"),
        ({"transfer": {"epohcs": 1}}, r"attention\.transfer\.epohcs: unknown key\. Did you mean 'epochs'"),
        ({"transfer": {"max_steps": 0}}, r"attention\.transfer\.max_steps must be an integer from 1"),
        ({"transfer": {"losses": {"kd": 1}}}, "unknown key"),
        ({"positons": 64}, "Did you mean 'positions'"),
        ({"decoder": {"window": 3}}, r"stages\[0\]\.attention: decoder must stand under `layers`"),
        ({"kind": ["local"]}, "Unknown attention kind"),
    ],
)
def test_longer_inputs_and_transfer_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(changed(["stages", 0, "attention"], LOCAL_YAML | settings))


def test_overrides_beat_yaml_and_leave_the_original_alone():
    recipe = Recipe.from_dict(BASE)
    before = recipe.to_dict()
    other = recipe.with_overrides(
        {"prune.ratio": "0.25", "data.limit": 100, "teacher.learning_rate": "1e-4", "prune.granularity": "[head]"}
    )
    assert other.stages[1].settings.config.ratio == 0.25
    assert other.stages[1].settings.config.granularity == ("head",)
    assert other.data.limit == 100 and other.teacher.learning_rate == 1e-4
    assert recipe.to_dict() == before and other.fingerprint() != recipe.fingerprint()
    assert recipe.with_overrides({}) == recipe


def test_metrics_of_others_are_a_wish_that_your_own_word_allows():
    ours = Recipe.from_dict(changed(["measure"], {"metrics": ["f1", "mae"]}))
    assert ours.allowed(False) == ours and ours.to_dict()["measure"]["metrics"] == ["f1", "mae"]
    assert "metrics" not in Recipe.from_dict(BASE).to_dict()["measure"]
    theirs = changed(["measure"], {"metrics": ["f1", "someone/metric"]})
    theirs["model"] = theirs["model"] | {"trust_remote_code": True}
    with pytest.raises(ConfigError, match=r"of the metrics someone/metric .*may do anything on this machine"):
        Recipe.from_dict(theirs).allowed(False)
    assert Recipe.from_dict(theirs).allowed(True).measure.metrics == ["f1", "someone/metric"]
    with pytest.raises(ConfigError, match=r"measure\.metrics are computed from classes, which causal-lm has not"):
        Recipe.from_dict(changed(["task"], "causal-lm") | {"measure": {"metrics": ["f1"]}, "stages": []})


def test_overrides_can_set_false_zero_and_null():
    recipe = Recipe.from_dict(changed(["model", "trust_remote_code"], True) | {"seed": 3})
    other = recipe.with_overrides({"model.trust_remote_code": "false", "seed": "0", "teacher": "null"})
    assert (other.model.trust_remote_code, other.seed, other.teacher) == (False, 0, None)
    assert other.with_overrides({"teacher.epochs": 2}).teacher == TrainingSettings(epochs=2.0)
    replaced = recipe.with_overrides({"attention": "{kind: linear}"})
    assert replaced.stages[0].settings.config == AttentionConfig(kind="linear")


def test_overrides_address_one_of_several_stages_by_number():
    recipe = Recipe.from_dict(BASE | {"stages": [{"prune": {"ratio": 0.2}}, {"distill": None}, {"prune": {}}]})
    for key in ("stages.2.ratio", "stages.2.prune.ratio"):
        other = recipe.with_overrides({key: "0.7"})
        ratios = [s.settings.config.ratio for s in other.stages if s.name == "prune"]
        assert ratios == [0.2, 0.7]
    with pytest.raises(ConfigError, match=r"2 stages are called 'prune'; use stages\.0\.ratio or stages\.2\.ratio"):
        recipe.with_overrides({"prune.ratio": 0.7})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"prun.ratio": 0.5}, "Did you mean 'prune'"),
        ({"prune.ratoi": 0.5}, r"stages\[1\]\.prune\.ratoi"),
        ({"stages.9.ratio": 0.5}, "there are 3 stages"),
        ({"stages.-1.ratio": 0.5}, "there are 3 stages"),
        ({"stages": "abc", "prune.ratio": 0.5}, "not a list"),
        ({"stages": ["abc"], "prune.ratio": 0.5}, "one stage"),
        ({"name.first": 1}, "not a mapping"),
        ({"seed": "[1"}, "override seed is not valid YAML"),
        ({"": 1}, "section or stage"),
        ({"data.": 1}, "unknown key"),
    ],
)
def test_overrides_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(BASE).with_overrides(overrides)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "alias"),
        ("a: &a [*a]", "alias"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("name: !!python/name:os.system", "not valid YAML"),
        ("name: !mine x", "not valid YAML"),
        ("seed: 1\nseed: 2", "given twice"),
        ("name: 'x", "not valid YAML"),
        ("[" * 5000, "nested deeper"),
        ("x: " + "9" * 5000, "not valid YAML"),
        ("x: 2024-99-99", "not valid YAML"),
        ("x: 2024-01-01", "must be text"),
        ("x: .nan", "finite"),
        ("x: .inf", "finite"),
        ("x: 1e999", "finite"),
        ("x: !!binary aGk=", "must be text"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("x" * (MAX_CHARACTERS + 1), "characters"),
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("\x01", "not valid YAML"),
        ("x: " + ":".join(["1"] * 30_000), "unknown key"),  # in YAML 1.1 an enormous number of base 60
        ("seed: 1" + "0" * 3000, "64 bits"),
    ],
)
def test_hostile_yaml_is_refused_quickly(text, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        Recipe.from_yaml(path)
    assert time.monotonic() - start < 5


def test_shared_references_that_unfold_are_refused():
    value = ["x"]
    for _ in range(15):
        value = [value] * 9
    with pytest.raises(ConfigError, match="more than"):
        plain(value, "recipe")
    itself = {}
    itself["again"] = itself
    with pytest.raises(ConfigError, match="nested deeper"):
        plain(itself, "recipe")


def test_yaml_numbers_with_exponent_are_numbers():
    assert parse("[1e-4, 1.5E3, -2e2, .5e1, 1.0e-4]") == [1e-4, 1500.0, -200.0, 5.0, 1e-4]
    assert parse("[e4, 1e, 0x10, 'a1e4']") == ["e4", "1e", 16, "a1e4"]
    assert parse("[0, -3, 1_000, 1.5, -.5, 1.]") == [0, -3, 1000, 1.5, -0.5, 1.0]


def test_yaml_has_no_numbers_of_base_60():
    assert parse("{1:3: a, b: 1:30, c: 1:30.5}") == {"1:3": "a", "b": "1:30", "c": "1:30.5"}


def test_file_not_found_suggests(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"Did you mean 'mine\.yaml'"):
        Recipe.from_yaml(tmp_path / "mien.yaml")
    with pytest.raises(ConfigError, match="Did you mean 'bbc-news'"):
        Recipe.from_yaml("bbc-new")
    with pytest.raises(ConfigError, match="No such recipe"):
        Recipe.from_yaml("x" * 5000)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="UTF-8"):
        Recipe.from_yaml(tmp_path / "latin.yaml")


def test_a_local_model_that_exists_is_accepted_and_data_is_looked_for_later(tmp_path):
    data = changed(["data", "name_or_path"], str(tmp_path / "rows.csv")) | {"model": {"name_or_path": str(tmp_path)}}
    assert Recipe.from_dict(data).data.name_or_path.endswith("rows.csv")


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=4)
    | st.sampled_from([10**4000, -(2**64), "~nobody", "/" * 300, "x" * 5000, "\ud800", "bundled:", "kd", "1-4", "."])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*prefix, key))


FULL = Recipe.from_yaml("bbc-news").to_dict()
FULL["stages"].insert(
    0, {"attention": {"layers": {"encoder": {"all": {}, "1::2": {"kind": "local"}}}, "transfer": {}}}
)
FULL["stages"].insert(0, {"attention": {"layers": "0:3", "positions": 1024}})
PATHS = [list(path) for path in paths(FULL) if path]


@random_examples(500, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), value=VALUES, extra=st.none() | st.text(max_size=8))
def test_fuzz_only_config_errors_come_out(path, value, extra):
    data = copy.deepcopy(FULL)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1] if extra is None or not isinstance(target, dict) else extra] = value
    try:
        recipe = Recipe.from_dict(data)
    except ConfigError as error:
        assert str(error)
    else:
        assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@random_examples(200)
@given(VALUES)
def test_fuzz_whole_recipes_are_refused(value):
    with pytest.raises(ConfigError):
        Recipe.from_dict(value)


@random_examples(200)
@given(key=st.text(max_size=12) | st.sampled_from(["prune.ratio", "stages.1.ratio", "data", "stages"]), value=VALUES)
def test_fuzz_overrides(key, value):
    recipe = Recipe.from_dict(FULL)
    try:
        other = recipe.with_overrides({key: value})
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(other, Recipe)


def test_every_stage_reads_its_defaults():
    for name, kind in STAGES.items():
        stage = kind.read({"kind": "local"} if name == "attention" else {}, f"stages[0].{name}")
        assert isinstance(stage, kind) and kind.read(stage.to_dict(), name) == stage


def test_import_is_light():
    code = (
        "import sys, hf_efficient.recipes.recipe as r, hf_efficient.data.datasets; r.shipped_recipes();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_attention_stage_says_what_it_does():
    with pytest.raises(ConfigError, match=r"stages\[0\]\.attention is empty: give a kind"):
        Recipe.from_dict(changed(["stages", 0, "attention"], {}))


def test_a_pattern_of_zeros_says_the_ratio(tmp_path):
    text = Recipe.from_dict(
        BASE | {"stages": [{"prune": {"granularity": ["weight"], "mask_structure": "1:4"}}]}
    ).to_yaml()
    (tmp_path / "zeros.yaml").write_text(text.replace("'1:4'", "1:4"))  # YAML 1.1 would read minutes
    recipe = Recipe.from_yaml(tmp_path / "zeros.yaml")
    assert recipe.stages[0].settings.config.ratio == 0.75
    other = recipe.with_overrides({"prune.mask_structure": "2:4"})
    assert other.stages[0].settings.config.ratio == 0.5 and other.stages[0].settings.config.structure == (2, 4)


def test_distillation_takes_the_options_of_its_arguments():
    plain = Recipe.from_dict(BASE | {"stages": [{"distill": {}}]})
    assert not {"divergence", "layer_map", "prune"} & plain.to_dict()["stages"][0]["distill"].keys()
    asked = {"divergence": "jsd", "jsd_beta": 0.3, "layer_map": [[1, 2]], "temperature_final": 1.0, "pooling": "cls"}
    recipe = Recipe.from_dict(BASE | {"stages": [{"distill": asked}]})
    assert recipe.stages[0].settings.options == asked
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.fingerprint() != plain.fingerprint()
    other = recipe.with_overrides({"distill.divergence": "reverse", "distill.layer_map": "last"})
    assert other.stages[0].settings.options == asked | {"divergence": "reverse", "layer_map": "last"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("divergence", "revers", "Did you mean 'reverse'"),
        ("jsd_beta", 1.0, "between 0 and 1"),
        ("jsd_beta", "half", "jsd_beta: "),
        ("layer_map", "lastt", "Unknown layer_map"),
        ("relation_heads", 0, "1 or more"),
        ("temperature_final", -1, "above 0"),
    ],
)
def test_a_wrong_option_of_distillation_is_named(name, value, said):
    with pytest.raises(ConfigError, match=rf"stages\[0\]\.distill\.{name}: .*{said}" if ":" not in said else name):
        Recipe.from_dict(BASE | {"stages": [{"distill": {name: value}}]})


def test_distillation_may_prune():
    asked = {"ratio": 0.4, "granularity": ["weight"], "importance": "movement", "start": 0.1, "every": 3}
    recipe = Recipe.from_dict(BASE | {"stages": [{"distill": {"prune": asked}}]})
    gradual = recipe.stages[0].settings.prune
    assert gradual.config.importance == "movement" and gradual.config.ratio == 0.4
    assert (gradual.start, gradual.end, gradual.every) == (0.1, 0.7, 3)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    other = recipe.with_overrides({"distill.prune.ratio": 0.6, "distill.prune.every": 5})
    assert other.stages[0].settings.prune.config.ratio == 0.6 and other.stages[0].settings.prune.every == 5
    pattern = recipe.with_overrides({"distill.prune": "{granularity: weight, mask_structure: '1:4'}"})
    assert Recipe.from_dict(pattern.to_dict()).stages[0].settings.prune.config.ratio == 0.75
    without = recipe.with_overrides({"distill.prune": None})
    assert without.stages[0].settings.prune is None and "prune" not in without.to_dict()["stages"][0]["distill"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (
            {"distill": {"prune": {"ratoi": 0.4}}},
            r"stages\[0\]\.distill\.prune\.ratoi: unknown key. Did you mean 'ratio'",
        ),
        ({"distill": {"prune": {"steps": 4}}}, r"stages\[0\]\.distill\.prune\.steps: unknown key"),
        ({"distill": {"prune": {"start": 0.8}}}, r"stages\[0\]\.distill\.prune: start and end .* got 0.8, 0.7"),
        ({"distill": {"prune": {"start": "now"}}}, r"stages\[0\]\.distill\.prune: start must be a number, got 'now'"),
        ({"distill": {"prune": {"granularity": "layer"}}}, "Drop layers before"),
        ({"distill": {"prune": {"importance": "activation"}}}, "needs calibration batches"),
        ({"distill": {"prune": 0.5}}, r"stages\[0\]\.distill\.prune must be a mapping"),
        ({"prune": {"importance": "movement"}}, r"stages\[0\]\.prune\.importance: 'movement' is learned.*distill: "),
    ],
    ids=str,
)
def test_faults_in_pruning_while_training(stage, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(BASE | {"stages": [stage]})


def test_the_rounds_leave_a_quarter():
    stages = Recipe.from_yaml("bbc-news-rounds").stages
    assert [stage.name for stage in stages] == ["prune", "distill"] * 3
    left = 1.0
    for stage in stages[::2]:
        left *= 1 - stage.settings.config.ratio
    assert 0.24 < left <= 0.25


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"quantize": {}}, {"distill": {}}], r"stages\[0\]\.quantize must come after distill"),
        (
            [{"quantize": {}}, {"export": {}}],
            r"stages\[0\]\.quantize must come after export.*quantizes? by itself|quantises by",
        ),
        ([{"export": {}}, {"prune": {}}], r"stages\[0\]\.export must come after prune"),
        ([{"export": {}}, {"export": {"format": "onnx"}}], r"stages\[1\]\.export is asked for twice"),
        ([{"export": {"format": "onxn"}}], r"stages\[0\]\.export\.format must be one of onnx"),
        ([{"export": {"format": "torch", "quantize": "int8"}}], "not quantised here"),
        ([{"quantize": {"method": "int3"}}], r"stages\[0\]\.quantize\.method must be one of int8_dynamic, int8, int4"),
    ],
)
def test_quantising_and_exporting_come_last(stages, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict(BASE | {"stages": stages})
    good = [{"prune": {}}, {"vocabulary": {}}, {"export": {}}, {"export": {"quantize": "int8"}}]
    recipe = Recipe.from_dict(BASE | {"stages": good})
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("overrides", "good"),
    [
        ({"measure.batch_size": 64, "measure.sequence_length": 1 << 18}, True),
        ({"measure.batch_size": 65, "measure.sequence_length": 1 << 18}, False),
        ({"measure.batch_size": 1 << 16, "measure.sequence_length": None, "data.max_length": 257}, False),
        ({"measure.batch_size": 1 << 16, "measure.sequence_length": None, "data.max_length": 256}, True),
        ({"measure.batch_size": 1 << 16, "measure.lengths": [16, 1 << 20]}, False),
    ],
)
def test_no_input_is_made_up_that_no_machine_could_hold(overrides, good):
    recipe = Recipe.from_yaml("bbc-news")
    if good:
        assert recipe.with_overrides(overrides).measure.batch_size == overrides["measure.batch_size"]
    else:
        with pytest.raises(ConfigError, match=r"measure\.batch_size.*at most 16,777,216 are timed"):
            recipe.with_overrides(overrides)
