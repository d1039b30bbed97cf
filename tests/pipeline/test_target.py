"""`target:` finds the ratio, on rows that are neither trained nor tested on, and goes on where it was."""

import copy
import json

import pytest
from safetensors.torch import load_file

from hf_efficient import ConfigError, Recipe, RequirementError, compress, load_report
from hf_efficient.pipeline import search
from hf_efficient.pipeline.run import Run
from hf_efficient.pipeline.search import next_ratio
from hf_efficient.recipes.target import Target, found

from .tiny import TINY

SHORT = {"max_steps": 6, "batch_size": 16, "learning_rate": 1e-3}
RECIPE = copy.deepcopy(TINY) | {
    "teacher": {"epochs": 12, "batch_size": 16, "learning_rate": 3e-3},
    "stages": [
        {"prune": {"ratio": 0.7, "importance": "magnitude", "calibration_samples": 16}},
        {"distill": {**SHORT, "losses": {"kd": 1.0}}},
    ],
    "target": {"quality_loss": 12.0, "tries": 2},
}


def walk(loss, most=0.8, free=0.3, trains=True, **target):
    """The ratios that a search tries when `loss(ratio)` is what each of them loses."""
    tries = []
    while ratio := next_ratio(most, free, tries, Target(**{"quality_loss": 1.0, "tries": 3} | target), trains):
        tries.append((ratio, loss(ratio)))
        assert len(tries) < 12
    return [ratio for ratio, _ in tries]


def test_it_halves_between_what_held_and_what_did_not():
    assert walk(lambda ratio: 0.0 if ratio <= 0.6 else 2.0) == [0.55, 0.675, 0.613]
    assert walk(lambda ratio: 0.0) == [0.55, 0.675, 0.738]
    assert walk(lambda ratio: 0.0, free=0.8) == [0.8]  # the most that is allowed


def test_it_steps_back_where_all_lost_too_much():
    assert walk(lambda ratio: 2.0) == [0.55, 0.425, 0.362, 0.3, 0.15, 0.075]
    assert walk(lambda ratio: 0.0 if ratio <= 0.3 else 2.0) == [0.55, 0.425, 0.362, 0.3]
    assert walk(lambda ratio: 2.0, free=0.0, tries=1) == [0.4, 0.2, 0.1, 0.05]
    assert walk(lambda ratio: float("nan"), tries=1) == [0.55, 0.3, 0.15, 0.075]


def test_without_training_the_first_ratio_is_the_answer():
    assert walk(lambda ratio: 0.5, trains=False) == [0.3]
    assert walk(lambda ratio: 0.0 if ratio <= 0.2 else 2.0, trains=False) == [0.3, 0.15]


@pytest.mark.usefixtures("quick_end")
def test_a_search_finds_a_ratio_and_goes_on_where_it_was(tmp_path, monkeypatch):
    recipe, folder, lines = Recipe.from_dict(RECIPE), tmp_path / "out", []
    own, calls = search._carried_out, []

    def stopped(run, space, chain, ratio, announce):
        calls.append(ratio)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(run, space, chain, ratio, announce)

    without = search._without_training
    monkeypatch.setattr(search, "_carried_out", stopped)
    monkeypatch.setattr(search, "_without_training", lambda *words: min(0.3, without(*words)))
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, output_dir=folder)
    known = json.loads((folder / "target.json").read_text())
    assert len(known["tries"]) == 1 and 0 <= known["free"] <= 0.3
    monkeypatch.setattr(search, "_without_training", None)  # not again
    report = compress(recipe, output_dir=folder, announce=lines.append)
    assert calls[1] == calls[2] and len(calls) == 3  # the try that was stopped, and none before it
    tries = json.loads((folder / "target.json").read_text())["tries"]
    best = max(ratio for ratio, loss in tries if loss <= 12.0)
    assert report.recipe["stages"][0]["prune"]["ratio"] == best and "target" not in report.recipe
    assert report.warnings[0].startswith("The ratio was searched for: at most 12 lost in accuracy on 16 held-out")
    assert f"ratio {best:g} was taken" in report.warnings[0]
    theirs, ours = (
        load_file(each / "1-prune" / "model.safetensors") for each in (folder / "tries" / f"ratio={best:g}", folder)
    )
    assert theirs.keys() == ours.keys() and len([each for each in lines if "held-out rows" in each]) == 1
    assert report == load_report(folder / "model") == compress(recipe, output_dir=folder)
    # The recipe that is found makes the same model, without a search.
    again = compress(Recipe.from_dict(report.recipe), output_dir=tmp_path / "again")
    first, second = (load_file(each / "model" / "model.safetensors") for each in (folder, tmp_path / "again"))
    assert all((first[name] == second[name]).all() for name in first)
    assert again.student.quality == report.student.quality


@pytest.mark.usefixtures("quick_end")
def test_a_target_that_is_missed_is_said_and_all_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "STEPS_BACK", 1)
    content = copy.deepcopy(RECIPE) | {
        "teacher": SHORT | {"max_steps": 60},
        "target": {"quality_loss": 0.0, "tries": 1},
    }
    content["stages"] = content["stages"][:1]
    monkeypatch.setattr(search._Judge, "loss", lambda *_: 5.0)
    recipe = Recipe.from_dict(content)
    for _ in range(2):  # also of a run that has ended
        with pytest.raises(RequirementError, match="the least that was lost is 5 at ratio"):
            compress(recipe, output_dir=tmp_path / "out")
    assert "missed by all of them" in load_report(tmp_path / "out" / "model").warnings[0]


def test_rows_are_held_out_of_the_training_rows(tmp_path):
    aimed, plain = Recipe.from_dict(RECIPE), Recipe.from_dict({k: v for k, v in RECIPE.items() if k != "target"})
    rows, all_rows = (Run(recipe, tmp_path).rows for recipe in (aimed, plain))
    assert len(rows["validation"]) == 16 and len(rows["train"]) == len(all_rows["train"]) - 16
    assert rows["test"][:] == all_rows["test"][:] and "validation" not in all_rows
    seen = {json.dumps(row) for row in rows["train"]["image"]} if "image" in rows["train"].column_names else set()
    assert not seen & {json.dumps(row) for row in rows["validation"]["image"]}


def test_a_target_is_read_written_and_refused():
    recipe = Recipe.from_dict(RECIPE)
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.to_dict()["target"] == RECIPE["target"]
    chosen = found(recipe, 0.25)
    assert chosen.target is None and chosen.held_out == recipe.held_out == 0.1
    assert chosen.stages[0].settings.config.ratio == 0.25 and chosen.stages[1] == recipe.stages[1]
    assert "validation_fraction" not in recipe.to_dict()["data"]
    for stages, words in (
        ([], "0 stages prune"),
        ([RECIPE["stages"][0]] * 2, "2 stages prune"),
        ([{"prune": {"granularity": ["weight"], "ratio": 0.5}}], "zeros"),
    ):
        with pytest.raises(ConfigError, match=words):
            Recipe.from_dict(RECIPE | {"stages": stages})
    with pytest.raises(ConfigError, match="tries must be an integer from 1 to 20"):
        Recipe.from_dict(RECIPE | {"target": {"quality_loss": 1, "tries": 0}})
