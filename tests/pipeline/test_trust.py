"""Code that comes with a model runs on the word of whoever runs the recipe, and on nobody else's."""

import json

import pytest

from hf_efficient import ConfigError, HfEfficientError, Recipe, compress
from hf_efficient.pipeline.compress import plan_recipe
from hf_efficient.pipeline.sweep import sweep

from ..commands import cli
from .tiny import TINY

WORD = "--trust-remote-code"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A model folder whose config and tokenizer are made by code that leaves a mark."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "evil"
    folder.mkdir()
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text(code)
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "one.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["two.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"some words {i},{i % 2}\n" for i in range(20)))
    return folder, mark


def recipe_of(evil, **model):
    folder = evil[0]
    return {
        "name": "theirs",
        "task": "text-classification",
        "model": model or {"name_or_path": str(folder), "trust_remote_code": True},
        "data": {"name_or_path": str(folder.parent / "rows.csv"), "max_length": 8},
        "stages": [{"prune": {"ratio": 0.3}}],
    }


def written(evil, content):
    path = evil[0].parent / "theirs.yaml"
    path.write_text(json.dumps(content))
    return path


def of_a_tokenizer(evil):
    """A fresh model that takes its tokenizer from there."""
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return recipe_of(evil, config=config, tokenizer=str(evil[0]), trust_remote_code=True)


@pytest.mark.parametrize("content", [recipe_of, of_a_tokenizer])
@pytest.mark.parametrize("run", [compress, plan_recipe])
def test_a_recipe_alone_runs_nothing_and_your_word_does(content, run, evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(evil, content(evil))
    with pytest.raises(
        ConfigError, match=r"may do anything on this machine.*--trust-remote-code, or trust_remote_code=True"
    ):
        run(path)
    assert not evil[1].exists() and not (tmp_path / "out").exists()
    with pytest.raises((HfEfficientError, AttributeError, TypeError, ValueError)):
        run(path, trust_remote_code=True)  # their classes are none
    assert evil[1].exists()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"model.trust_remote_code": "true"}, True),
        ({"model": "whole"}, True),
        ({"model.trust_remote_code": False}, False),
        ({"seed": 3}, None),
        ({"data.limit": 9}, None),
    ],
)
def test_an_override_is_your_word(overrides, word, evil, tmp_path):
    """True: the code runs, False: it is not asked for, None: it is refused."""
    if "model" in overrides:
        overrides = {"model": recipe_of(evil)["model"]}
    with pytest.raises((HfEfficientError, AttributeError, TypeError, ValueError)) as caught:
        compress(Recipe.from_dict(recipe_of(evil)), output_dir=tmp_path / "out", **overrides)
    assert ("say so yourself" in str(caught.value)) == (word is None)
    assert evil[1].exists() == (word is True)


@pytest.mark.parametrize("swept", [{"model.trust_remote_code": [False, True]}, {"prune.ratio": [0.3, 0.4]}])
def test_nor_does_a_sweep(swept, evil, tmp_path):
    content = recipe_of(evil) | {"sweep": swept}
    content["model"]["trust_remote_code"] = "prune.ratio" in swept
    with pytest.raises(ConfigError, match="say so yourself"):
        sweep(Recipe.from_dict(content), output_dir=tmp_path / "out")
    done = cli("compress", str(written(evil, content)), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 1 and WORD in done.stderr
    assert not evil[1].exists() and not (tmp_path / "out").exists()


def test_the_command_line(evil, tmp_path):
    path = str(written(evil, recipe_of(evil)))
    run = tmp_path / "theirs"  # the folder of a run that somebody sent
    run.mkdir()
    (run / "recipe.yaml").write_text(Recipe.from_dict(recipe_of(evil)).to_yaml())
    for words in (("plan", path), ("compress", path), ("compress", str(run)), ("compress", str(run), "--resume")):
        done = cli(*words)
        assert done.returncode == 1 and WORD in done.stderr and not evil[1].exists(), done.stderr
    done = cli("plan", str(evil[0]), WORD)
    assert done.returncode == 1 and "is for recipes" in done.stderr and not evil[1].exists()
    with pytest.raises((AttributeError, TypeError, ValueError, SystemExit)):  # their classes are none
        raise SystemExit(cli("compress", str(run), WORD).returncode)
    assert evil[1].exists()


def test_what_it_is_told_is_in_the_recipe_of_the_run():
    recipe = Recipe.from_dict(TINY)
    assert recipe.allowed(False) is recipe and not recipe.model.trust_remote_code
    told = recipe.allowed(True)
    assert told.model.trust_remote_code and told.allowed(True) == told
    with pytest.raises(ConfigError, match="say so yourself"):
        told.allowed(False)
    assert not told.allowed(False, {"model.trust_remote_code": False}).model.trust_remote_code
