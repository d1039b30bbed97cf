"""A matrix of recipes: all combinations, what they share done once, one page over all."""

import json

import pytest

from hf_efficient import CheckpointError, ConfigError, Recipe, compress, load_report, sweep

from ..commands import cli
from .tiny import TINY

pytestmark = pytest.mark.usefixtures("quick_end")

SHORT = TINY | {
    "teacher": {"max_steps": 2},
    "stages": [
        {"attention": {"kind": "local", "window": 4}},
        {"prune": {"ratio": 0.3, "importance": "magnitude", "calibration_samples": 8}},
    ],
    "sweep": {"prune.ratio": [0.2, 0.4], "attention.window": [2, 4]},
}
LABELS = ["ratio=0.2,window=2", "ratio=0.2,window=4", "ratio=0.4,window=2", "ratio=0.4,window=4"]


def test_every_combination_is_a_run_and_all_are_on_one_page(tmp_path):
    lines = []
    reports = sweep(Recipe.from_dict(SHORT), output_dir=tmp_path / "out", announce=lines.append)
    assert list(reports) == LABELS
    for label, report in reports.items():
        assert load_report(tmp_path / "out" / label / "model") == report
        prune, attention = (next(s.settings for s in report.stages if s.name == n) for n in ("prune", "attention"))
        assert label == f"ratio={prune['ratio']},window={attention['window']}"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 results" in page and all(label in page for label in LABELS)
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    # The teacher was trained once: its weights are one file with many names, and so are those of equal windows.
    teachers = {(tmp_path / "out" / label / "0-teacher" / "model.safetensors").stat().st_ino for label in LABELS}
    windows = {(tmp_path / "out" / label / "1-attention" / "model.safetensors").stat().st_ino for label in LABELS}
    assert len(teachers) == 1 and len(windows) == 2
    lines.clear()
    assert sweep(Recipe.from_dict(SHORT), output_dir=tmp_path / "out", announce=lines.append) == reports
    assert sum("nothing to do" in line for line in lines) == 4


def test_a_shared_stage_gives_what_the_run_alone_gives(tmp_path):
    reports = sweep(Recipe.from_dict(SHORT | {"sweep": {"prune.ratio": [0.2, 0.4]}}), output_dir=tmp_path / "all")
    alone = compress(
        Recipe.from_dict({k: v for k, v in SHORT.items() if k != "sweep"}),
        output_dir=tmp_path / "one",
        **{"prune.ratio": 0.4},
    )
    assert alone.student.quality == reports["ratio=0.4"].student.quality
    assert alone.structure == reports["ratio=0.4"].structure


def test_the_command(tmp_path):
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(Recipe.from_dict(SHORT | {"sweep": {"prune.ratio": [0.2, 0.4]}}).to_yaml())
    done = cli("compress", str(recipe), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "ratio=0.2" in done.stdout and "speed-up" in done.stdout and "report.html" in done.stdout
    again = cli("compress", str(tmp_path / "out"), "--json")
    assert again.returncode == 0 and list(json.loads(again.stdout)) == ["ratio=0.2", "ratio=0.4"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prune.ratio": []}, "lists of values"),
        ([0.2], "lists of values"),
        ({"prune.ratio": [0.2, 1.5]}, r"sweep, ratio=1.5: stages\[1\]"),
        ({"prune.ratoi": [0.2]}, "Did you mean 'ratio'"),
        ({"prune.ratio": [0.2, 0.2]}, "two combinations"),
        ({"name": ["a", "b"]}, "cannot be swept"),
        ({"seed": list(range(201))}, "201 combinations"),
    ],
)
def test_a_wrong_sweep_is_refused_when_it_is_read(asked, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict(SHORT | {"sweep": asked})


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        sweep(Recipe.from_dict(SHORT), output_dir=tmp_path)
    with pytest.raises(ConfigError, match="call sweep"):
        compress(Recipe.from_dict(SHORT), output_dir=tmp_path / "new")
    with pytest.raises(ConfigError, match="has no sweep"):
        sweep(Recipe.from_dict(TINY), output_dir=tmp_path / "new")


def test_recipes_without_one_are_what_they_were():
    plain = {key: value for key, value in SHORT.items() if key != "sweep"}
    recipe = Recipe.from_dict(plain)
    assert "sweep" not in recipe.to_dict() and recipe.combinations() == {}
    assert Recipe.from_dict(Recipe.from_dict(SHORT).to_dict()) == Recipe.from_dict(SHORT)
