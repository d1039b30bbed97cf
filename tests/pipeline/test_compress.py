"""The main job on a tiny scale: a recipe goes in, a measured model comes out, whatever happens in between."""

import json
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_efficient import CheckpointError, ConfigError, DataError, Recipe, UnsupportedModelError, compress, load_report
from hf_efficient.pipeline.compress import plan_recipe
from hf_efficient.pipeline.verify import check_reload, output_digest
from hf_efficient.pipeline.workspace import Workspace

from ..processes import finish, python, start
from ..robustness.tiny import run_stage
from .tiny import TINY, TRAINING, make_bert, text_recipe

pytestmark = pytest.mark.usefixtures("quick_end")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, in a process of its own like all others here, so that all have the same threads."""
    folder = tmp_path_factory.mktemp("run") / "out"
    _run(folder)
    return folder


def _command(folder: Path, content: dict = TINY) -> list[str]:
    recipe = folder.parent / "tiny.yaml"
    recipe.write_text(Recipe.from_dict(content).to_yaml())
    return ["-m", "hf_efficient.cli", "compress", str(recipe), "--output-dir", str(folder)]


def _run(folder: Path, content: dict = TINY) -> str:
    done = python(*_command(folder, content))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _kill_when(folder: Path, appears: str, content: dict = TINY) -> None:
    """Start the run and kill -9 it as soon as a file or folder is there."""
    process = start(*_command(folder, content), prints=folder.parent)
    while process.is_alive() and not list(folder.glob(appears)):
        time.sleep(0.002)
    process.kill()
    errors = (folder.parent / "stderr.txt").read_text()
    assert finish(process) == -signal.SIGKILL, f"the run ended before {appears} appeared: {errors}"


def test_the_result_is_complete_and_measured(finished):
    names = {path.name for path in (finished / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "report.json", "modeling_hf_efficient.py"} <= names
    report = load_report(finished / "model")
    assert [stage.name for stage in report.stages] == ["teacher", "attention", "prune", "distill"]
    assert report.comparison.mac_ratio < 0.65 and report.student.size.parameters < report.teacher.size.parameters
    assert {layer.attention for layer in report.structure} == {"local"}
    assert any(
        layer.heads < layer.original_heads or layer.neurons < layer.original_neurons for layer in report.structure
    )
    assert report.loads_with == "plugin"
    assert 0 <= report.student.quality.main.value <= 1 and report.student.quality.samples == 40
    model = AutoModelForImageClassification.from_pretrained(finished / "model")
    assert type(model).__name__ == "EfficientViTForImageClassification"
    assert not list(finished.glob("*.partial"))


@pytest.mark.cold
def test_a_fresh_process_must_give_the_same_output(finished):
    digest = output_digest(AutoModelForImageClassification.from_pretrained(finished / "model"))
    check_reload(finished / "model", "AutoModelForImageClassification", digest)


def test_another_output_or_a_folder_that_does_not_load_is_refused(finished, tmp_path):
    with pytest.raises(CheckpointError, match="another output"):
        check_reload(finished / "model", "AutoModelForImageClassification", "0" * 64)
    with pytest.raises(CheckpointError, match="does not load"):
        check_reload(tmp_path, "AutoModelForImageClassification", "0" * 64)


@pytest.mark.processes
def test_who_may_read_the_recipe_may_read_the_weights(finished):
    allowed = (finished / "recipe.yaml").stat().st_mode & 0o777
    weights = list(finished.rglob("*.safetensors"))
    assert len(weights) == 5 and {path.stat().st_mode & 0o777 for path in weights} == {allowed}


def test_kill_9_in_every_stage_then_the_same_command_gives_the_same_result(finished, tmp_path):
    folder = tmp_path / "out"
    for appears in (
        "0-teacher.partial/trainer/checkpoint-*/complete",
        "1-attention.partial",
        "2-prune.partial",
        "3-distill.partial/trainer/checkpoint-*",
        "3-distill/stage.json",
    ):
        _kill_when(folder, appears)
    _run(folder)
    for name in ("0-teacher", "1-attention", "2-prune", "3-distill", "model"):
        expected, got = (load_file(f / name / "model.safetensors") for f in (finished, folder))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
    first, second = (load_report(f / "model") for f in (finished, folder))
    assert first.student.quality == second.student.quality
    assert (finished / "model/config.json").read_bytes() == (folder / "model/config.json").read_bytes()


def test_a_finished_run_is_not_done_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*-*/model.safetensors")}
    (finished / "model/notes.txt").write_text("mine")
    output = _run(finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*-*/model.safetensors")}
    assert "speed-up" in output and (finished / "model/notes.txt").read_text() == "mine"


def test_another_recipe_in_the_same_folder_is_refused(finished):
    with pytest.raises(CheckpointError, match="another recipe"):
        compress(Recipe.from_dict(TINY), output_dir=finished, **{"prune.ratio": 0.3})


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        compress(Recipe.from_dict(TINY), output_dir=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        compress(Recipe.from_dict(TINY), output_dir=tmp_path / "file")


def test_a_damaged_manifest_says_what_to_do(finished, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "model")
    (folder / "1-attention/stage.json").write_text('{"schema_version": 1, "na')
    with pytest.raises(CheckpointError, match="Delete the folder"):
        compress(Recipe.from_dict(TINY), output_dir=folder)


def test_a_model_of_ones_own_and_a_csv_file(tmp_path, rows):
    report = compress(text_recipe(make_bert(tmp_path / "bert"), rows), output_dir=tmp_path / "out")
    assert report.loads_with == "portable" and report.comparison.mac_ratio < 1
    assert json.loads((tmp_path / "out/model/config.json").read_text())["model_type"] == "bert"


def test_zeros_stay_through_distillation_and_the_card_says_what_they_bring(tmp_path, rows):
    stages = [
        {"prune": {"granularity": ["weight"], "mask_structure": "2:4", "importance": "obs"}},
        {"distill": {**TRAINING, "losses": {"kd": 1.0}}},
    ]
    bert = make_bert(tmp_path / "bert", hidden_size=32, num_hidden_layers=2)
    report = compress(text_recipe(bert, rows, stages=stages), output_dir=tmp_path / "out")
    zeros = 2 * (4 * 32 * 32 + 2 * 32 * 32) // 2
    facts, size = report.stages[1].facts, report.student.size
    assert facts["zeros"] == zeros and facts["sparsity"] == 0.5 and facts["loads_with"] == "portable"
    assert size.parameters - size.nonzero_parameters >= zeros and report.comparison.mac_ratio == 1
    assert "no speed-up" in report.warnings[-1] and f"{size.sparsity:.0%} of the parameters" in report.warnings[-1]
    card = " ".join((tmp_path / "out/model/README.md").read_text().split())
    assert "bring no speed-up" in card and "sparsity 0.5" in card and "not zero" in card
    state = load_file(tmp_path / "out/model/model.safetensors")
    linears = [
        value for key, value in state.items() if ".layer." in key and key.endswith("weight") and value.ndim == 2
    ]
    assert len(linears) == 12 and all((value.view(len(value), -1, 4) != 0).sum(-1).eq(2).all() for value in linears)
    with pytest.raises(ConfigError, match="multiple of 5"):
        compress(text_recipe(bert, rows, stages=stages), output_dir=tmp_path / "no", **{"prune.mask_structure": "4:5"})
    assert not (tmp_path / "no").exists()


WHILE_TRAINING = {"ratio": 0.4, "importance": "movement", "start": 0.1, "end": 0.5, "every": 2}


def test_options_of_distillation_reach_it(tmp_path):
    distill = {"max_steps": 1, "losses": {"hidden": 1.0}, "layer_map": "last"}
    recipe = TINY | {"stages": [{"distill": distill}], "teacher": {"max_steps": 1}}
    compress(Recipe.from_dict(recipe), output_dir=tmp_path / "out")
    wrong = TINY | {"stages": [{"distill": distill | {"layer_map": [[9, 9]]}}], "teacher": {"max_steps": 1}}
    with pytest.raises(ConfigError, match="9"):
        compress(Recipe.from_dict(wrong), output_dir=tmp_path / "wrong")


@pytest.mark.thorough
@pytest.mark.processes
@pytest.mark.parametrize("granularity", [["head", "neuron"], ["weight"]])
def test_pruning_while_distilling_goes_on_after_kill_9(granularity, tmp_path):
    distill = TINY["stages"][2]["distill"] | {"prune": WHILE_TRAINING | {"granularity": granularity}}
    recipe = TINY | {"stages": [{"distill": distill}]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(whole, recipe)
    for appears in ("1-distill.partial/trainer/checkpoint-*", "1-distill.partial/trainer/checkpoint-*/complete"):
        _kill_when(killed, appears, recipe)
    _run(killed, recipe)
    expected, got = (load_file(f / "model/model.safetensors") for f in (whole, killed))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    report = load_report(whole / "model")
    facts = report.stages[1].facts
    if granularity == ["weight"]:
        assert (
            facts["sparsity"] == pytest.approx(0.4, abs=2e-4)
            and facts["parameters_after"] == facts["parameters_before"]
        )
        assert report.comparison.mac_ratio == 1 and "no speed-up" in report.warnings[-1]
    else:
        assert facts["parameters_after"] < facts["parameters_before"] and report.comparison.mac_ratio < 0.75


def test_a_ratio_out_of_reach_while_distilling_stops_before_any_work(tmp_path, rows):
    recipe = text_recipe(make_bert(tmp_path / "bert"), rows, stages=[{"distill": {"prune": {"ratio": 0.99}}}])
    with pytest.raises(ConfigError, match="At most 0"):
        compress(recipe, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_rounds_of_the_shipped_recipe_on_a_tiny_scale(tmp_path, rows):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 256, "num_hidden_layers": 2}
    stages = [stage.to_dict() for stage in Recipe.from_yaml("bbc-news-rounds").stages]
    for stage in stages[1::2]:
        stage["distill"] |= {"max_steps": 1, "max_length": 8}
    report = compress(
        text_recipe(make_bert(tmp_path / "bert", **sizes), rows, stages=stages), output_dir=tmp_path / "out"
    )
    assert [stage.name for stage in report.stages] == ["teacher", *["prune", "distill"] * 3]
    pruned = [stage.facts for stage in report.stages[1::2]]
    for earlier, later in pairwise(pruned):
        assert earlier["parameters_after"] == later["parameters_before"] > later["parameters_after"]
    assert report.comparison.mac_ratio < 0.27  # of the whole model, of which the head is not pruned


def test_two_processes_cannot_share_a_folder(tmp_path, rows):
    recipe, out = text_recipe(make_bert(tmp_path / "bert"), rows), tmp_path / "out"
    first = Workspace(out, recipe)
    first.open({})
    with pytest.raises(CheckpointError, match="Another process"):
        compress(recipe, output_dir=out)
    first.close()


def test_changed_data_cannot_continue_a_run(tmp_path, rows):
    recipe, out = text_recipe(make_bert(tmp_path / "bert"), rows), tmp_path / "out"
    compress(recipe, output_dir=out)
    shutil.rmtree(out / "model")
    compress(recipe, output_dir=out)  # the same inputs go on
    shutil.rmtree(out / "model")
    rows.write_text(rows.read_text() + "\nd h new,x")
    with pytest.raises(CheckpointError, match="changed"):
        compress(recipe, output_dir=out)


def test_a_compressed_model_may_be_compressed_again(tmp_path, rows):
    layers = [{"prune": {"ratio": 0.5, "granularity": ["layer"]}}]
    first = text_recipe(make_bert(tmp_path / "bert", num_hidden_layers=4), rows, stages=layers)
    compress(first, output_dir=tmp_path / "first")
    report = compress(text_recipe(tmp_path / "first/model", rows), output_dir=tmp_path / "second")
    assert [layer.attention for layer in report.structure] == ["full", "full"]


def test_bad_input_stops_before_any_work(tmp_path, rows):
    bert, out = make_bert(tmp_path / "bert"), tmp_path / "out"
    three = make_bert(tmp_path / "three", num_labels=3)
    for key, value in (("data.max_length", 600), ("measure.sequence_length", 4096)):
        with pytest.raises(ConfigError, match="512 positions"):
            compress(text_recipe(bert, rows), output_dir=out, **{key: value})
    broken = make_bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="Cannot load"):
        compress(text_recipe(broken, rows), output_dir=tmp_path / "broken-out")
    for fields in ({"hiden_size": 8}, {"hidden_size": 2**40}, {"num_labels": 10**12}):
        config = TINY["model"]["config"] | fields
        with pytest.raises(ConfigError, match=next(iter(fields))):
            compress(Recipe.from_dict(TINY | {"model": {"config": config}}), output_dir=out)
    with pytest.raises(ConfigError, match="Did you mean 'vit'"):
        compress(Recipe.from_dict(TINY | {"model": {"config": {"model_type": "vitt"}}}), output_dir=out)
    with pytest.raises(DataError, match="3 labels"):
        compress(text_recipe(three, rows), output_dir=out)
    with pytest.raises(DataError, match="topic"):
        compress(text_recipe(bert, rows), output_dir=out, **{"data.label_column": "topic"})
    with pytest.raises(ConfigError, match="ratio"):
        compress(text_recipe(bert, rows), output_dir=out, **{"prune.ratio": 1.5})
    with pytest.raises(ConfigError, match="At most 0"):
        compress(text_recipe(bert, rows), output_dir=out, **{"prune.ratio": 0.99})
    with pytest.raises(ConfigError, match="Layer 7"):
        compress(text_recipe(bert, rows, stages=[{"attention": {"kind": "linear", "layers": [7]}}]), output_dir=out)
    with pytest.raises(ConfigError, match="No such recipe"):
        compress(tmp_path / "missing.yaml", output_dir=out)
    albert = tmp_path / "albert"
    albert.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (albert / name).write_text((bert / name).read_text())
    (albert / "config.json").write_text(json.dumps({"model_type": "albert"}))
    with pytest.raises(UnsupportedModelError, match="there is one layer alone"):
        compress(text_recipe(albert, rows, stages=[{"prune": {"granularity": ["layer"]}}]), output_dir=out)
    assert not out.exists()


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    """Of the stage that all others begin with."""
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        run_stage(
            Recipe.from_dict(TINY | {"teacher": {"max_steps": 2}, "seed": seed}), "teacher", tmp_path, f"{number}"
        )
        weights.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_further_metrics_are_scores_of_teacher_and_student(tmp_path):
    measured = {"repeats": 2, "metrics": ["f1", "matthews_correlation"]}
    report = compress(
        Recipe.from_dict(TINY | {"teacher": {"max_steps": 2}, "stages": [], "measure": measured}), output_dir=tmp_path
    )
    for side in (report.teacher, report.student):
        names = [score.name for score in side.quality.scores]
        assert names == ["accuracy", "loss", "f1", "matthews_correlation"]
        assert all(score.standard_error >= 0 for score in side.quality.scores)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "matthews correlation" in card and "metrics: [f1" not in card.split("---")[1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data.label_column": "topic"}, DataError),
        ({"prune.ratio": 0.99}, ConfigError),
        ({"data.max_length": 513}, ConfigError),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_the_run_would(rows, tmp_path, change, error):
    recipe = text_recipe(make_bert(tmp_path / "bert"), rows).with_overrides(change)
    for work in (lambda: plan_recipe(recipe), lambda: compress(recipe, output_dir=tmp_path / "out")):
        with pytest.raises(error):
            work()
