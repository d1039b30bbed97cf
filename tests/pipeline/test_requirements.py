"""The gate: what a result must reach, in a recipe, a sweep and `measure`."""

import math
from dataclasses import replace

import pytest

from hf_efficient import ConfigError, Recipe, RequirementError, compress, load_report, sweep
from hf_efficient.recipes.requirements import Requirements
from hf_efficient.reporting.schema import Comparison, Score

from ..commands import cli
from .tiny import TINY

pytestmark = pytest.mark.usefixtures("quick_end")

SHORT = TINY | {
    "teacher": {"max_steps": 2},
    "stages": [{"prune": {"ratio": 0.4, "importance": "magnitude", "calibration_samples": 8}}],
}
COMPARED = Comparison(3.1, 3.0, 0.4, 0.4, 0.3, 0.5, "accuracy", -0.012, 0.004, 0.96)
ACCURACY, PERPLEXITY = Score("accuracy", 0.9, 0.01, True), Score("perplexity", 30.0, 1.0, False)


@pytest.mark.parametrize(
    ("required", "score", "misses"),
    [
        ({"quality_loss": 1.2, "speedup": 3.1, "size": 0.3, "agreement": 0.96}, ACCURACY, []),
        ({"quality_loss": 1.1}, ACCURACY, ["quality_loss is 1.2 points, more than 1.1"]),
        ({"quality_loss": 0.0}, PERPLEXITY, []),
        ({"quality_loss": 0.0}, None, ["quality_loss was not measured: it needs data with labels"]),
        ({"speedup": 4}, ACCURACY, ["speedup is 3.10x, less than 4x"]),
        ({"size": 0.25}, ACCURACY, ["size is 0.3 of the teacher, more than 0.25"]),
        ({"agreement": 0.97}, ACCURACY, ["agreement is 0.96, less than 0.97"]),
    ],
)
def test_each_miss_is_a_line(required, score, misses):
    assert Requirements(**required).misses(COMPARED, score) == misses


def test_worse_is_what_the_score_calls_worse():
    compared = replace(COMPARED, quality_score="perplexity", quality_difference=2.5)
    assert Requirements(quality_loss=2.5).misses(compared, PERPLEXITY) == []
    [miss] = Requirements(quality_loss=2.4).misses(compared, PERPLEXITY)
    assert miss == "quality_loss is 2.5 of perplexity, more than 2.4"


def test_no_number_reaches_nothing():
    broken = replace(
        COMPARED, speedup=math.nan, weight_bytes_ratio=math.nan, quality_difference=math.nan, agreement=None
    )
    asked = Requirements(quality_loss=50, speedup=0.1, size=1, agreement=0)
    assert len(asked.misses(broken, ACCURACY)) == 4


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"sped": 4}, r"require\.sped"),
        ({"speedup": 0}, r"require\.speedup must be a number above 0"),
        ({"size": 2}, r"require\.size must be"),
        ({}, "require: nothing is asked for|require.*nothing is asked for"),
        ({"agreement": "much"}, r"require\.agreement must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_required_is_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(SHORT | {"require": section})


def test_a_run_keeps_what_it_made_and_can_be_asked_again(tmp_path):
    asked = Recipe.from_dict(SHORT | {"require": {"size": 0.1, "speedup": 1e5}})
    assert Recipe.from_dict(asked.to_dict()) == asked
    with pytest.raises(RequirementError, match=r"misses what is required: speedup is .* size is ") as caught:
        compress(asked, output_dir=tmp_path / "out")
    assert len(caught.value.misses) == 2
    report = load_report(tmp_path / "out" / "model")
    assert report.recipe["require"] == {"speedup": 1e5, "size": 0.1}
    with pytest.raises(RequirementError):  # also of a run that has ended
        compress(asked, output_dir=tmp_path / "out")
    enough = Recipe.from_dict(SHORT | {"require": {"size": 0.99}})
    assert compress(enough, output_dir=tmp_path / "out") == report  # nothing is made again
    assert compress(Recipe.from_dict(SHORT), output_dir=tmp_path / "out") == report


def test_a_sweep_tries_all_and_says_which_miss(tmp_path):
    recipe = Recipe.from_dict(SHORT | {"sweep": {"prune.ratio": [0.1, 0.6]}, "require": {"size": 0.7}})
    with pytest.raises(RequirementError, match=r"ratio=0\.1: size is") as caught:
        sweep(recipe, output_dir=tmp_path / "out")
    assert len(caught.value.misses) == 1 and (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "ratio=0.6" / "model").is_dir()


@pytest.mark.processes
def test_the_commands_end_with_three(tmp_path):
    recipe = tmp_path / "gate.yaml"
    recipe.write_text(Recipe.from_dict(SHORT | {"require": {"size": 0.1, "speedup": 100000}}).to_yaml())
    done = cli("compress", str(recipe), "--output-dir", str(tmp_path / "out"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("missed: ")]
    assert done.returncode == 3 and len(lines) == 2, done.stderr
    model, teacher = str(tmp_path / "out" / "model"), str(tmp_path / "out" / "0-teacher")
    common = ("measure", model, "--baseline", teacher, "--repeats", "2", "--require")
    assert cli(*common, "size: 0.99").returncode == 0
    missed = cli(*common, "size: 0.01")
    assert missed.returncode == 3 and "missed: size is" in missed.stderr and "latency" in missed.stdout
    for words, fault in ((("agreement: 0.9",), "takes data to measure"), (("sped: 4",), "unknown key")):
        done = cli(*common, *words)
        assert done.returncode == 1 and fault in done.stderr
    done = cli("measure", model, "--require", "size: 0.5")
    assert done.returncode == 1 and "--baseline" in done.stderr
