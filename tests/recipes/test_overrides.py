"""Values given beside a recipe."""

import pytest

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.errors import ConfigError
from hf_efficient.recipes.recipe import Recipe
from hf_efficient.stages.settings import TrainingSettings

from .base import BASE, changed


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
