"""Files of strangers: YAML that explodes, and that nothing but ConfigError comes out of a faulty recipe."""

import copy
import time

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from hf_efficient.errors import ConfigError
from hf_efficient.io.yaml import MAX_CHARACTERS, parse, plain
from hf_efficient.recipes.recipe import Recipe

from ..helpers import random_examples

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
