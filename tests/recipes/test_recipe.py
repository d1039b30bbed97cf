"""Recipes: what is read, what is refused and how."""

import copy
import math
import subprocess
import sys

import pytest

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.errors import ConfigError
from hf_efficient.recipes.recipe import Recipe, shipped_recipes
from hf_efficient.stages.settings import TrainingSettings

from .base import BASE, changed, refused


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
    (["model", "name_or_path"], "./no/such.gguf", ["model.name_or_path", "GGUF file"]),
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


def test_a_local_model_that_exists_is_accepted_and_data_is_looked_for_later(tmp_path):
    data = changed(["data", "name_or_path"], str(tmp_path / "rows.csv")) | {"model": {"name_or_path": str(tmp_path)}}
    assert Recipe.from_dict(data).data.name_or_path.endswith("rows.csv")


def test_import_is_light():
    code = (
        "import sys, hf_efficient.recipes.recipe as r, hf_efficient.data.datasets; r.shipped_recipes();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
