"""Models that score pairs go in and come out as CrossEncoders; the real library loads them, without us if it can."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from hf_efficient import ConfigError, DataError, Recipe, UnsupportedModelError, compress, load_report
from hf_efficient.cli.programs.distill import read as read_distill
from hf_efficient.cli.programs.distill import run as run_distill
from hf_efficient.cli.programs.prune import parse as parse_prune
from hf_efficient.cli.programs.prune import run as run_prune
from hf_efficient.pipeline.run import Run

from ..processes import ROOT
from .test_tasks_end_to_end import TRAINING, model_folder

PORTABLE = {"prune": {"ratio": 0.4, "granularity": ["layer"], "calibration_samples": 8}}
PLUGIN = {"attention": {"kind": "local", "window": 4}}
PAIRS = [("w1 w2", "w2 w3"), ("w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"), ("w1", "w1")]
FRESH = """
import json, sys
import numpy as np
from sentence_transformers import CrossEncoder

model = CrossEncoder(sys.argv[1], device="cpu")
np.save(sys.argv[2], model.predict(json.loads(sys.argv[3])))
assert not any(name.startswith("hf_efficient") for name in sys.modules)
np.save(
    sys.argv[2] + "-trusted.npy",
    CrossEncoder(sys.argv[4], device="cpu", trust_remote_code=True).predict(json.loads(sys.argv[3])),
)
assert "hf_efficient" in sys.modules
print(json.dumps([model.max_seq_length, model.prompts, type(model.activation_fn).__name__]))
"""

pytestmark = pytest.mark.usefixtures("quick_end")


def load(folder, **options):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", **options)


def scorer(folder, **changes):
    """A BERT with one label, as transformers writes it; weights large enough to tell texts apart, and no dropout."""
    torch.manual_seed(5)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_folder(folder, "reranking", num_labels=1, initializer_range=0.5, **still, **changes)


def cross_encoder(folder, **said):
    """As sentence-transformers writes it."""
    model = load(scorer(folder.with_name(f"{folder.name}-plain")), max_length=12, **said)
    model.save_pretrained(str(folder))
    return folder


def rows_file(folder, grades=("0", "1")):
    """Twelve queries of four documents, of which one has the words of the query."""
    path = folder / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "document", "label"])
        for n in range(12):
            for k in range(4):
                document = f"w{2 * n} w{2 * n + 1} w{k}" if k == 0 else f"w{(5 * n + 7 * k) % 30} w{k}"
                writer.writerow([f"w{2 * n} w{2 * n + 1}", document, grades[k == 0]])
    return path


def recipe(model, *stages, grades=("0", "1"), **changes):
    data = {"name_or_path": str(rows_file(model.parent, grades)), "test_fraction": 0.5}
    settings = {"name": "tiny", "task": "reranking", "model": {"name_or_path": str(model)}, "data": data}
    return Recipe.from_dict(settings | {"stages": list(stages), "measure": {"repeats": 2}} | changes)


def in_a_fresh_process(portable, plugin, tmp_path):
    words = [sys.executable, "-c", FRESH, str(portable), str(tmp_path / "v.npy"), json.dumps(PAIRS), str(plugin)]
    home = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | home)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [np.load(tmp_path / name) for name in ("v.npy", "v.npy-trusted.npy")]
    return *scores, json.loads(done.stdout.splitlines()[-1])


def test_a_cross_encoder_comes_out_as_it_went_in(tmp_path):
    """Portable in a process without us, and as a plugin that is trusted: activation, prompts, length, scores."""
    said = {"prompts": {"ask": "w1 "}, "activation_fn": torch.nn.Identity()}
    source = cross_encoder(tmp_path / "in", **said)
    report = compress(recipe(source, PORTABLE, {"distill": TRAINING | {"max_steps": 10}}), output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    assert (report.loads_with, report.library_name) == ("portable", "sentence-transformers")
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        assert json.loads((result / name).read_text()) == json.loads((source / name).read_text()), name
    compress(recipe(source, PLUGIN), output_dir=tmp_path / "plugin")
    plugin = tmp_path / "plugin" / "model"
    scores, trusted, told = in_a_fresh_process(result, plugin, tmp_path)
    assert told == [12, {"ask": "w1 "}, "Identity"]
    small = load(result)
    inputs = small.tokenizer(*zip(*PAIRS, strict=True), padding=True, return_tensors="pt", truncation=True)
    with torch.no_grad():
        logits = transformers.AutoModelForSequenceClassification.from_pretrained(result)(**inputs).logits[:, 0]
    assert np.allclose(scores, logits, atol=1e-6) and np.array_equal(trusted, load(plugin).predict(PAIRS))
    assert small.model.config.num_hidden_layers == 1
    assert not np.allclose(scores, load(source).predict(PAIRS), atol=1e-3)  # it is another model
    assert "prompts (ask)" in " ".join(report.warnings)
    names = [score.name for score in report.student.quality.scores]
    assert names == ["ndcg@10", "mrr@10"] and report.comparison.quality_score == "ndcg@10"
    assert (report.student.quality.samples, report.student.quality.targets) == (6, 24)
    assert 0 <= report.comparison.agreement <= 1 and load_report(result) == report
    assert report.stages[-1].facts["train"] == 24 and "loss_kd" in report.stages[-1].facts


def test_what_comes_out_is_scored_as_their_evaluator_scores_it(tmp_path):
    """A plain model: it gets a Sigmoid, which changes no ranking. The same candidates, the same numbers."""
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    asked = recipe(scorer(tmp_path / "in"), PLUGIN)
    report = compress(asked, output_dir=tmp_path / "out")
    test = Run(asked, tmp_path / "out").rows["test"]
    samples = {}
    for row in test:
        sample = samples.setdefault(row["query"], {"query": row["query"], "positive": [], "negative": []})
        sample["positive" if test.features["label"].int2str(row["label"]) == "1" else "negative"].append(
            row["document"]
        )
    model = load(tmp_path / "out" / "model")
    found = CrossEncoderRerankingEvaluator(samples, at_k=10, write_csv=False)(model)
    ndcg, mrr = (score.value for score in report.student.quality.scores)
    assert (found["ndcg@10"], found["mrr@10"]) == (pytest.approx(ndcg), pytest.approx(mrr)) and ndcg < 1
    assert type(model.activation_fn).__name__ == "Sigmoid" and model.max_seq_length == 16
    assert set(test["query"]).isdisjoint(Run(asked, tmp_path / "out").rows["train"]["query"])


def test_what_an_older_version_says_of_the_activation_stays(tmp_path):
    source = scorer(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    said = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}}
    (source / "config.json").write_text(json.dumps(config | said))
    for name, stage in (("portable", PORTABLE), ("plugin", PLUGIN)):
        report = compress(recipe(source, stage), output_dir=tmp_path / name)
        assert report.loads_with == name
        assert type(load(tmp_path / name / "model").activation_fn).__name__ == "Identity"


def test_the_card_ranks(tmp_path, capsys):
    source = cross_encoder(tmp_path / "in")
    compress(recipe(source, PLUGIN), output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    card = (result / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card and "pipeline_tag: text-ranking\n" in card
    assert "It is a CrossEncoder of sentence-transformers" in card and "same order" in card and "ndcg@10" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert code.startswith("import hf_efficient\nfrom sentence_transformers import CrossEncoder\n")
    capsys.readouterr()
    exec(code.replace("path/to/this/model", str(result)), {})
    told = load(result).rank("A question?", ["A text that answers it.", "Another text."])
    assert str(told) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("grades", "problem"), [(("0", "1"), "multi_label_classification"), (("-3.5", "4.25"), "regression")]
)
def test_a_teacher_is_trained_as_its_labels_are(grades, problem, tmp_path):
    """From a model with no head for it: yes and no by cross-entropy, any other numbers by their distance."""
    source = model_folder(tmp_path / "in", "text-classification", num_labels=3)
    asked = recipe(source, grades=grades, teacher=TRAINING | {"max_steps": 150, "learning_rate": 1e-2})
    if problem == "regression":
        with pytest.raises(DataError, match=r"has -3\.5 in the test rows"):
            compress(asked, output_dir=tmp_path / "out")
        asked = recipe(source, grades=("0.5", "4.25"), teacher=asked.to_dict()["teacher"])
    compress(asked, output_dir=tmp_path / "out")
    result = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert (result.config.problem_type, result.config.num_labels) == (problem, 1)
    known = [(f"w{2 * n} w{2 * n + 1}", f"w{2 * n} w{2 * n + 1} w0") for n in range(12)]
    scores = torch.tensor(load(tmp_path / "out" / "model", activation_fn=torch.nn.Identity()).predict(known))
    assert scores.median() > (1 if problem == "multi_label_classification" else 3)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_scores_are_distilled(loss, tmp_path):
    """A student of half the layers comes near the scores of its teacher."""
    teacher = scorer(tmp_path / "in")
    stage = TRAINING | {"max_steps": 100, "learning_rate": 1e-2, "score_loss": loss}
    compress(recipe(teacher, PORTABLE), output_dir=tmp_path / "pruned")
    report = compress(recipe(teacher, PORTABLE, {"distill": stage}), output_dir=tmp_path / "taught")
    curve = [each["loss_kd"] for each in report.stages[-1].facts["curve"]]
    assert curve[-1] < 0.1 * curve[0]
    with (tmp_path / "pairs.csv").open() as file:
        pairs = [row[:2] for row in csv.reader(file)][1:]
    folders = (tmp_path / "pruned" / "model", tmp_path / "taught" / "model", teacher)
    before, after, goal = (load(folder, activation_fn=torch.nn.Identity()).predict(pairs) for folder in folders)
    assert np.abs(after - goal).mean() < 0.7 * np.abs(before - goal).mean()


def test_a_vocabulary_is_that_of_queries_and_documents(tmp_path):
    run = Run(recipe(cross_encoder(tmp_path / "in"), {"vocabulary": {}}), tmp_path / "out")
    rows = run.rows["train"]
    assert [*run.texts("text", "text_pair")] == [*rows["query"], *rows["document"]]


def words_of(model, command, *more):
    given = {"dataset": rows_file(model.parent), "task": "reranking", "output_dir": model.parent / command}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, "--test_fraction", "0.5", *more]


def test_the_programs_write_cross_encoders_too(tmp_path):
    source = cross_encoder(tmp_path / "in")
    dense, small = run_prune(parse_prune(words_of(source, "small", "--model", str(source), "--ratio", "0.3")))
    assert dense["metric"] == "ndcg@10" and small["parameters"] < dense["parameters"]
    assert load(tmp_path / "small").predict(PAIRS).shape == (3,) and load(tmp_path / "small").max_seq_length == 12
    training = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    flags = ["--teacher", str(source), "--student_layers", "1", *training, "--losses", '{"kd": 1, "ce": 1}']
    found = run_distill(*read_distill(words_of(source, "student", *flags)))
    assert {"eval_loss_kd", "eval_loss_ce"} <= found.keys()
    student = load(tmp_path / "student")
    assert student.model.config.num_hidden_layers == 1
    assert student.model.config.problem_type == "multi_label_classification"


def test_a_result_is_trained_further_by_their_trainer(tmp_path):
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    compress(recipe(scorer(tmp_path / "in"), PLUGIN), output_dir=tmp_path / "out")
    model = load(tmp_path / "out" / "model")
    before = model.predict(PAIRS)
    rows = Dataset.from_dict({"query": ["w1", "w2", "w3"], "document": ["w1", "w4", "w3"], "label": [1.0, 0.0, 1.0]})
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "training"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=BinaryCrossEntropyLoss(model)).train()
    after = model.predict(PAIRS)
    assert not np.allclose(before, after, atol=1e-4)
    model.save_pretrained(str(tmp_path / "trained"))
    assert np.array_equal(load(tmp_path / "trained").predict(PAIRS), after)


def test_what_cannot_be_meant_is_refused(tmp_path):
    source = cross_encoder(tmp_path / "in")
    with pytest.raises(UnsupportedModelError, match=r"is a CrossEncoder.*Its task is reranking"):
        asked = recipe(source).to_dict() | {"task": "sentence-embeddings"}
        compress(Recipe.from_dict(asked), output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="model has 3 labels"):
        three = model_folder(tmp_path / "three", "text-classification", num_labels=3)
        compress(recipe(three, PORTABLE), output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="metrics are computed from classes, which reranking has not"):
        recipe(source, measure={"metrics": ["f1"]})
    with pytest.raises(ConfigError, match=r"stages\[0\].*score_loss"):
        recipe(source, {"distill": {"score_loss": "cosine"}})
    assert not (tmp_path / "out").exists()
