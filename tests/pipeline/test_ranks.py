"""Two processes run a recipe as one does; what stops one of them stops both."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient import ConfigError, Recipe, compress, load_report
from hf_efficient.pipeline.compress import plan_recipe

from ..processes import ROOT, launch, python
from .tiny import TINY, make_bert, text_recipe

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_end")]
STAGES = ("0-teacher", "1-attention", "2-prune", "3-distill", "model")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Without dropout, which each process draws for itself; 152 rows, of which the last batch of 32 has 24."""
    content = copy.deepcopy(TINY)
    content["data"]["limit"] = 190
    content["model"]["config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(Recipe.from_dict(content).to_yaml())
    return path


def run(recipe, folder, count, fault=""):
    """What each process was told."""
    words = [recipe, folder, *([fault] if fault else [])]
    if count == 1:
        done = python("-m", "tests.pipeline.ranks_driver", *words)
        assert done.returncode == 0, done.stderr
    else:
        launch("tests.pipeline.ranks_driver", *words, count=count)
    return [json.loads(folder.with_name(f"{folder.name}.{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "out"
    run(recipe, folder, 1)
    return folder


def assert_alike(single, folder):
    for name in STAGES:
        expected, found = (load_file(f / name / "model.safetensors") for f in (single, folder))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), (name, key)


def test_two_processes_give_the_model_and_report_of_one(single, recipe, tmp_path):
    folder = tmp_path / "out"
    first, second = run(recipe, folder, 2)
    assert first["report"] == second["report"]
    assert_alike(single, folder)
    report, expected = load_report(folder / "model"), load_report(single / "model")
    shared = {stage.name: stage.facts.get("processes") for stage in report.stages}
    assert shared == {"teacher": 2, "attention": None, "prune": 2, "distill": 2}
    for side in ("student", "teacher"):
        ours, theirs = (getattr(each, side).quality for each in (report, expected))
        assert ours.samples == theirs.samples == 38
        assert ours.main.value == theirs.main.value
    assert not list(folder.glob("*.partial"))


def test_a_run_goes_on_with_another_number_of_processes(single, recipe, tmp_path):
    folder = tmp_path / "out"
    assert all("this row is broken" in told["error"] for told in run(recipe, folder, 2, "step"))
    assert not (folder / "3-distill").exists()
    run(recipe, folder, 1)
    assert_alike(single, folder)


@pytest.mark.parametrize(
    ("fault", "failing", "told"),
    [("step", 1, "ValueError: this row is broken"), ("disk", 0, "No space left on device")],
)
def test_what_stops_one_process_stops_both_with_its_reason(fault, failing, told, recipe, tmp_path):
    answers = run(recipe, tmp_path / "out", 2, fault)
    assert told in answers[failing]["error"]
    assert f"Process {failing} of 2 failed: " in answers[1 - failing]["error"]
    assert told in answers[1 - failing]["error"]


def prune_only(folder):
    """A recipe without training."""
    rows = [f"{first} {second} a,{'xy'[first < 'd']}" for first in "abcdefgh" for second in "abcdefgh"]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    path = folder / "text.yaml"
    path.write_text(text_recipe(make_bert(folder / "model"), folder / "rows.csv").to_yaml())
    return path


@pytest.mark.cold
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "hf_efficient", "compress", "RECIPE", "--processes", "2"],
        pytest.param(
            ["-m", "accelerate.commands.launch", "--config_file", "examples/accelerate/cpu_2.yaml"]
            + ["--main_process_port", "0", "-m", "hf_efficient", "compress", "RECIPE"],
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["own", "accelerate"],
)
def test_from_the_command_line(words, tmp_path):
    recipe = prune_only(tmp_path)
    words = [str(recipe) if word == "RECIPE" else word for word in words]
    done = subprocess.run(
        [sys.executable, *words, "--output-dir", str(tmp_path / "out"), "--json"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [stage["facts"].get("processes") for stage in report["stages"]] == [None, 2]
    assert done.stderr.count("prune done") == 1


def test_batches_that_cannot_be_shared_are_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_efficient.pipeline.compress.count", lambda: 3)
    with pytest.raises(ConfigError, match=r"teacher.batch_size is 32, which 3 processes.*take 30"):
        plan_recipe(Recipe.from_dict(TINY))


@pytest.mark.parametrize("sharded", [{"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}])
def test_models_in_parts_are_refused(sharded, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in sharded.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="DeepSpeed ZeRO-2"):
        compress(Recipe.from_dict(TINY), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
