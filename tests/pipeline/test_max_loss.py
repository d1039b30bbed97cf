"""What an export may lose: a run that misses it says so, fails, and keeps what it made."""

import copy
import dataclasses

import pytest

from hf_efficient import ConfigError, Recipe, UnsupportedModelError, compress
from hf_efficient.pipeline.report import check_reached
from hf_efficient.reporting.schema import ExportRecord, Latency, Quality, Score

from ..reporting.samples import sample_report
from ..robustness.tiny import TINY


def recipe(*exports):
    return Recipe.from_dict(copy.deepcopy(TINY) | {"stages": [{"export": each} for each in exports]})


def report_of(difference, name="accuracy", higher=True):
    quality = Quality("text-classification", 50, 50, (Score(name, 0.9, 0.01, higher),))
    latency = Latency(1.0, 1.1, 0.9, 5, 1)
    export = ExportRecord(
        "onnx", "onnxruntime 1", "int8", "onnx-int8", 9, 0.1, latency, 2.0, quality, difference, 0.01
    )
    return dataclasses.replace(sample_report(), exports=(export,))


INT8 = {"format": "onnx", "quantize": "int8"}


@pytest.mark.parametrize(
    ("difference", "score", "most"),
    [(-0.006, ("accuracy", True), 0.5), (0.3, ("perplexity", False), 0.2), (float("nan"), ("accuracy", True), 5.0)],
)
def test_more_is_an_error_and_less_is_none(difference, score, most):
    report = report_of(difference, *score)
    with pytest.raises(UnsupportedModelError, match=f"onnx-int8 changes {score[0]} by .*max_loss is {most:g}"):
        check_reached(recipe(INT8 | {"max_loss": most}), report)
    for asked in (recipe(INT8), recipe(INT8 | {"max_loss": 99}), recipe({"format": "onnx", "max_loss": 0})):
        if difference == difference or asked.stages[0].settings.max_loss is None:
            assert check_reached(asked, report) is report


def test_of_two_exports_into_one_folder_the_last_word_counts():
    strict, generous, other = INT8 | {"max_loss": 0.1}, INT8 | {"max_loss": 5}, INT8 | {"min_agreement": 0.5}
    report = report_of(-0.01)
    assert check_reached(recipe(strict, generous), report) and check_reached(recipe(strict, other, generous), report)
    for stages in [(generous, strict), (strict, other), (strict, {"format": "onnx", "max_loss": 5})]:
        with pytest.raises(UnsupportedModelError, match=r"max_loss is 0\.1"):
            check_reached(recipe(*stages), report)


def test_what_gets_better_loses_nothing():
    assert check_reached(recipe(INT8 | {"max_loss": 0}), report_of(0.02))
    assert check_reached(recipe(INT8 | {"max_loss": 0}), report_of(-3.0, "perplexity", False))


def test_a_finished_run_that_missed_it_fails_again(tmp_path):
    asked = recipe(INT8 | {"max_loss": 0.5})
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "recipe.yaml").write_text(asked.to_yaml())
    report_of(-0.02).save(out / "model")
    with pytest.raises(UnsupportedModelError, match="The result is there all the same"):
        compress(asked, output_dir=out)
    report_of(-0.004).save(out / "model")
    assert compress(asked, output_dir=out).exports


@pytest.mark.parametrize("value", [-1, "much", True])
def test_what_is_no_loss(value):
    with pytest.raises(ConfigError, match=r"stages\[0\]\.export\.max_loss"):
        recipe(INT8 | {"max_loss": value})


def test_recipes_without_it_are_those_of_before():
    assert recipe(INT8).stages[0].to_dict() == {"export": INT8}
