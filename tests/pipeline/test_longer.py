"""Recipes whose model gets longer inputs, or learned attention: positions, tokenizer, a teacher that reads less."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_efficient import ConfigError, Recipe, UnsupportedModelError, compress, load_report
from hf_efficient.attention.dispatch import ATTACHED
from hf_efficient.distillation.transfer import find_attentions
from hf_efficient.measurement.quality import evaluate_quality
from hf_efficient.pipeline.run import Run
from hf_efficient.pipeline.workspace import Workspace
from hf_efficient.reporting.tables import text_table

from ..robustness.tiny import run_stages

pytestmark = pytest.mark.usefixtures("quick_end")
WORDS = [*"abcdefgh"]
TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def material_once(tmp_path_factory):
    """A BERT for 16 tokens, and texts of 20 to 39 words whose label is said in the last word."""
    tmp_path = tmp_path_factory.mktemp("material")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))
    model.save_pretrained(tmp_path / "bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "bert/vocab.txt").write_text("\n".join([*special, *WORDS]))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (tmp_path / "bert/tokenizer_config.json").write_text(json.dumps(settings))
    texts = [" ".join(WORDS[(i + j) % 6] for j in range(20 + i % 20)) + f" {'gh'[i % 2]}" for i in range(60)]
    lines = [f"{text},{'xy'[i % 2]}" for i, text in enumerate(texts)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    return tmp_path


@pytest.fixture
def material(material_once, tmp_path):
    return shutil.copytree(material_once, tmp_path, dirs_exist_ok=True)


def make_recipe(material, *stages, **changes):
    data = {
        "name": "longer",
        "task": "text-classification",
        "model": {"name_or_path": str(material / "bert")},
        "data": {"name_or_path": str(material / "rows.csv"), "max_length": 48},
        "teacher": TRAINING,
        "stages": list(stages),
        "measure": {"repeats": 2},
    }
    return Recipe.from_dict(data | changes)


LONGER = {"attention": {"kind": "local", "window": 4, "global_tokens": 1, "positions": 48}}
DISTILL = {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 0.5}}}
HEDGEHOG = {"kind": "linear", "feature_map": "hedgehog", "transfer": {**TRAINING, "learning_rate": 0.05}}


PRUNE = {"prune": {"ratio": 0.15, "granularity": ["neuron"], "calibration_samples": 8}}


@pytest.fixture(scope="module")
def ended(material_once, tmp_path_factory):
    """A run: its folder, recipe and report."""
    folder, recipe = tmp_path_factory.mktemp("run") / "out", make_recipe(material_once, PRUNE, LONGER, DISTILL)
    return folder, recipe, compress(recipe, output_dir=folder)


def test_the_student_reads_whole_texts_and_the_teacher_their_beginning(ended):
    out, _, report = ended
    teacher, student = report.teacher, report.student
    assert teacher.quality.samples == student.quality.samples == 12
    assert teacher.workload.sequence_length == student.workload.sequence_length == 48
    assert report.comparison.quality_difference is not None and report.comparison.mac_ratio < 1
    told = [note for note in report.warnings if not note.startswith(("The machine was busy", "The teacher is right"))]
    quality, latency = told
    assert "takes 16 tokens" in quality and "first 16 tokens of each text" in quality
    assert "At 48 tokens" in latency and "For 1 x 16 tokens" in latency
    for note in told:
        assert note in text_table(report) and note in (out / "model/README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.model_max_length == 48 == model.config.max_position_embeddings
    inputs = tokenizer("a b " * 40, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 48) and torch.isfinite(model(**inputs).logits).all()
    for folder in ("0-teacher", "1-prune"):
        assert AutoTokenizer.from_pretrained(out / folder).model_max_length == 16


def test_the_reported_teacher_is_the_one_that_truncates(material):
    """Its accuracy and loss, evaluated by hand on texts cut at 16 tokens."""
    recipe = make_recipe(material, LONGER, measure={"repeats": 2, "sequence_length": 16})
    report = compress(recipe, output_dir=material / "out")
    assert len(report.warnings) == 1 and report.teacher.workload.sequence_length == 16
    run = Run(recipe, material / "out")
    teacher = run.load(material / "out/0-teacher")
    cut = run.data(config=teacher.config)
    assert max(len(row["input_ids"]) for row in cut.test) == 16
    assert max(len(row["input_ids"]) for row in run.data().test) > 30
    alone = evaluate_quality(teacher, cut.test, cut.collator, "text-classification")
    assert report.teacher.quality.main == alone.quality.main
    assert report.teacher.quality.scores[1].value == pytest.approx(alone.quality.scores[1].value, rel=1e-6)


def test_a_recipe_that_does_not_extend_has_no_note(material):
    local = {"attention": {"kind": "local", "window": 4}}
    data = {"name_or_path": str(material / "rows.csv"), "max_length": 16}
    report = compress(make_recipe(material, local, data=data), output_dir=material / "out")
    assert report.warnings == () and report.teacher.workload.sequence_length == 16


def test_what_does_not_fit_stops_before_any_work(material):
    out = material / "out"
    refused = [
        ([], {}, "data.max_length is 48, but the model has 16 positions"),
        ([LONGER], {"measure": {"sequence_length": 64}}, r"measure\.sequence_length is 64.*has 48 positions"),
        ([LONGER], {"teacher": {**TRAINING, "max_length": 17}}, r"teacher\.max_length is 17.*has 16 positions"),
        ([DISTILL | {"distill": {"max_length": 32}}, LONGER], {}, r"stages\[0\]\.distill\.max_length is 32"),
        *(
            ([LONGER, {"distill": {"losses": {"kd": 1, loss: 1}}}], {}, r"stages\[1\]\.distill: the teacher takes 16")
            for loss in ("hidden", "attention_output")
        ),
        ([{"attention": {"positions": 12}}, LONGER], {}, "larger than the 16 positions"),
        ([{"attention": LONGER["attention"] | {"rope": "yarn"}}], {}, "rope='yarn' has no use"),
        ([{"attention": LONGER["attention"] | {"transfer": {"max_length": 64}}}], {}, r"transfer\.max_length is 64"),
    ]
    for stages, changes, words in refused:
        with pytest.raises(ConfigError, match=words):
            compress(make_recipe(material, *stages, **changes), output_dir=out)
    with pytest.raises(UnsupportedModelError, match=r"nothing to transfer\. Kinds that have"):
        compress(make_recipe(material, {"attention": LONGER["attention"] | {"transfer": {}}}), output_dir=out)
    assert not out.exists()


def test_a_teacher_is_not_cut_where_it_is_not_asked(material):
    """Hard labels alone need no teacher, so any loss of a student that reads more will do."""
    stages = [LONGER, {"distill": {**TRAINING, "losses": {"ce": 1.0}}}]
    report = compress(make_recipe(material, *stages), output_dir=material / "out")
    assert report.student.quality.samples == 12


def test_transfer_comes_after_the_conversion_and_is_reported(material):
    both = {"attention": HEDGEHOG | {"positions": 48}}
    report = compress(make_recipe(material, both), output_dir=material / "out")
    facts = report.stages[1].facts
    assert 0 < facts["transfer_error_after"] < facts["transfer_error_before"]
    assert facts["steps"] == 6 and not (material / "out/1-attention/trainer").exists()
    model = AutoModelForSequenceClassification.from_pretrained(material / "out/model")
    teacher = AutoModelForSequenceClassification.from_pretrained(material / "out/0-teacher").state_dict()
    assert len(find_attentions(model)) == 2
    for key, value in model.state_dict().items():
        if ATTACHED not in key and "position_embeddings" not in key:
            assert torch.equal(value, teacher[key])
    plain = dict(HEDGEHOG)
    del plain["transfer"]
    without = run_stages(make_recipe(material, {"attention": plain | {"positions": 48}}), material / "plain")
    assert "transfer_error_after" not in json.loads((without / "stage.json").read_text())["facts"]
    other = load_file(without / "model.safetensors")
    assert not all(torch.equal(value, other[key]) for key, value in model.state_dict().items() if ATTACHED in key)


@pytest.mark.thorough
@pytest.mark.processes
def test_a_transfer_that_is_killed_goes_on_to_the_same_weights(material):
    recipe = make_recipe(material, {"attention": HEDGEHOG | {"positions": 48, "transfer": {**TRAINING, "epochs": 3}}})
    (material / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "hf_efficient.cli", "compress", str(material / "recipe.yaml"), "--output-dir"]
    subprocess.run([*command, str(material / "whole")], check=True, capture_output=True)
    killed = material / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("1-attention.partial/trainer/checkpoint-*/complete")):
        pass
    process.kill()
    process.wait()
    assert not (killed / "1-attention").exists()
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    first, second = (load_file(folder / "model/model.safetensors") for folder in (material / "whole", killed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    facts = [load_report(folder / "model").stages[1].facts for folder in (material / "whole", killed)]
    assert facts[0] == facts[1]


def test_the_tokenizer_of_a_later_stage_follows_too(ended, tmp_path):
    """Also when the run is continued in another process, which knows nothing of the first stage."""
    (out, recipe, _), folder = ended, tmp_path / "out"
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns("model", "3-distill"))
    run_stages(recipe, folder)
    assert AutoTokenizer.from_pretrained(folder / "3-distill").model_max_length == 48
    assert Workspace(folder, recipe).recipe == recipe
