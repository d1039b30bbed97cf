"""A recipe with baselines: each is made once, measured with the result on the same rows, and shown everywhere."""

import json
import shutil

import pytest

from hf_efficient import ConfigError, compress, load_report
from hf_efficient.pipeline.ladder import folder_of
from hf_efficient.recipes.recipe import Recipe
from hf_efficient.reporting.ladder_tables import advice, ladder_rows

from .tiny import make_bert, text_recipe

pytestmark = pytest.mark.usefixtures("quick_end")
TRAINING = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
STAGES = [{"prune": {"ratio": 0.5, "calibration_samples": 8}}, {"distill": TRAINING}]
NAMES = ["tfidf", "static", "shallow", "int8"]


@pytest.fixture
def recipe(tmp_path, rows):
    bert = make_bert(tmp_path / "bert", num_hidden_layers=3)
    return text_recipe(bert, rows, teacher=TRAINING, stages=STAGES, baselines=NAMES)


def test_a_run_with_baselines_says_how_all_of_them_do(tmp_path, recipe, monkeypatch):
    out = tmp_path / "out"
    report = compress(recipe, output_dir=out)
    ladder = report.ladder
    rungs = {rung.name: rung for rung in ladder.rungs}
    assert list(rungs) == ["teacher", "student", *NAMES]
    assert [rung.kind for rung in ladder.rungs] == ["teacher", "student", *["baseline"] * 4]
    assert all(rung.median_ms > 0 and rung.weight_bytes > 0 for rung in ladder.rungs)
    assert rungs["teacher"].score == report.teacher.quality.main.value and rungs["teacher"].difference == 0
    assert rungs["student"].score == report.student.quality.main.value
    assert rungs["student"].difference == pytest.approx(report.comparison.quality_difference)
    assert rungs["student"].difference_error == pytest.approx(report.comparison.quality_difference_error)
    assert rungs["student"].weight_bytes == report.student.size.weight_bytes
    assert rungs["shallow"].weight_bytes < rungs["teacher"].weight_bytes > rungs["int8"].weight_bytes
    assert rungs["shallow"].about == "the first 2 of 3 layers, distilled as ours" and ladder.allowed_loss == 0.01
    assert (ladder.batch_size, ladder.texts, ladder.rounds) == (1, 8, 2)  # there are 8 test rows
    assert load_report(out / "model") == report
    for file in ("README.md", "report.html"):
        assert all(name in (out / "model" / file).read_text() for name in [*NAMES, "Beside what is cheap to try"])

    assert len(ladder_rows(report)) == 6 and advice(report).startswith("Take ")
    again = again_without_making(out, recipe, monkeypatch)
    assert [(rung.name, rung.score) for rung in again.ladder.rungs] == [(r.name, r.score) for r in ladder.rungs]


def again_without_making(out, recipe, monkeypatch):
    """The report of the same run measured anew: what was made is read from its folders."""
    from hf_efficient.baselines.table import BASELINES

    shutil.rmtree(out / "model")
    for name in NAMES:
        assert (out / folder_of(name) / "stage.json").is_file()
        monkeypatch.setattr(type(BASELINES[name]), "make", lambda *_: pytest.fail("it was made again"))
    return compress(recipe, output_dir=out)


def test_without_baselines_nothing_is_said(tmp_path, recipe):
    plain = recipe.with_overrides({"baselines": None})
    assert plain.fingerprint() == recipe.fingerprint() and "baselines" not in plain.to_dict()
    report = compress(plain.with_overrides({"stages": []}), output_dir=tmp_path / "out")
    assert report.ladder is None and "ladder" not in json.loads((tmp_path / "out/model/report.json").read_text())
    assert not (tmp_path / "out/model/ladder.png").exists() and ladder_rows(report) == [] and advice(report) == ""
    assert not list((tmp_path / "out").glob("baseline-*"))


def test_what_is_required_is_what_may_be_lost(tmp_path, recipe):
    changed = recipe.with_overrides({"baselines": ["tfidf"], "require": {"quality_loss": 100.0}, "stages": []})
    report = compress(changed, output_dir=tmp_path / "out")
    assert report.ladder.allowed_loss == 1.0


def test_a_package_that_is_missing_is_said_before_any_work(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("hf_efficient.baselines.tfidf.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tfidf needs scikit-learn.*pip install scikit-learn"):
        compress(recipe, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["tfdif"], "Did you mean 'tfidf'"),
        (["tfidf", "tfidf"], "twice"),
        ("tfidf", "must be a list of tfidf"),
        ([1], "must be a list"),
    ],
)
def test_what_is_no_list_of_baselines_is_refused(recipe, value, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(recipe.to_dict() | {"baselines": value})


def test_another_task_has_none(recipe):
    data = recipe.to_dict() | {"task": "causal-lm", "baselines": ["tfidf"], "stages": [], "teacher": None}
    data["data"] = {"name_or_path": "x.csv"}
    with pytest.raises(ConfigError, match="for task 'text-classification' so far"):
        Recipe.from_dict(data)
