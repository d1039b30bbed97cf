"""What a report says of sentence embeddings, against sentence-transformers' own evaluators; and vectors cut short."""

import csv

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from hf_efficient import ConfigError, Recipe, RequirementError, compress
from hf_efficient.pipeline.run import Run

from ..sentences import chain, load
from .test_sentence_transformers import PLUGIN, recipe
from .test_tasks_end_to_end import TRAINING

pytestmark = pytest.mark.usefixtures("quick_end")


def loud(folder, **said):
    """A model whose vectors differ from text to text."""
    model = load(chain(folder.with_name(f"{folder.name}-quiet"), **said))
    torch.manual_seed(3)
    for parameter in model[0].parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save(str(folder))
    return folder


def test_retrieval_is_that_of_their_evaluator(tmp_path):
    """Accuracy at 1 and the reciprocal rank of each text's own pair among all second texts."""
    asked = recipe(loud(tmp_path / "in", normalize=True), PLUGIN)
    report = compress(asked, output_dir=tmp_path / "out")
    test = Run(asked, tmp_path / "out").rows["test"]
    keys = [str(number) for number in range(len(test))]
    queries, corpus = (dict(zip(keys, test[name], strict=True)) for name in ("text", "twin"))
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, {key: {key} for key in keys}, accuracy_at_k=[1], mrr_at_k=[len(keys)], write_csv=False
    )
    found = evaluator(load(tmp_path / "out" / "model"))
    first, rank = (score.value for score in report.student.quality.scores)
    assert found["cosine_accuracy@1"] == pytest.approx(first) and 0 < first < 1
    assert found[f"cosine_mrr@{len(keys)}"] == pytest.approx(rank)
    assert 0 < report.comparison.similarity < 1
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "cosines, correlation with the teacher's" in card and f"{report.comparison.similarity:.3f}" in card


def sts(folder, *stages, **changes):
    """Pairs with how alike they are, with a point, in a csv file."""
    path = folder.parent / "sts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "sentence2", "score"])
        writer.writerows(
            [f"w{n} w{n + 1}", f"w{n + n % 4} w{2 * n % 30}", f"{(n % 4) + n / 50:.2f}"] for n in range(30)
        )
    data = {"name_or_path": str(path), "text_pair_column": "sentence2", "label_column": "score", "test_fraction": 0.5}
    return recipe(folder, *stages, data=data, **changes)


def test_labelled_pairs_are_scored_as_their_evaluator_scores_them(tmp_path):
    asked = sts(loud(tmp_path / "in", normalize=True), {"attention": {"kind": "local", "window": 1}})
    report = compress(asked, output_dir=tmp_path / "out")
    test = Run(asked, tmp_path / "out").rows["test"]
    labels = [float(value) for value in test["score"]]
    evaluator = EmbeddingSimilarityEvaluator(test["text"][:], test["sentence2"][:], labels, write_csv=False)
    found = evaluator(load(tmp_path / "out" / "model"))
    rank, straight = report.student.quality.scores
    assert (rank.name, straight.name, report.student.quality.samples) == ("spearman", "pearson", 15)
    assert found["spearman_cosine"] == pytest.approx(rank.value, abs=1e-4)
    assert found["pearson_cosine"] == pytest.approx(straight.value, abs=1e-4)
    assert report.comparison.quality_score == "spearman" and report.comparison.agreement is None
    with pytest.raises(RequirementError, match="similarity is"):
        compress(Recipe.from_dict(asked.to_dict() | {"require": {"similarity": 1.0}}), output_dir=tmp_path / "out")


def test_a_matryoshka_is_taught_and_scored_at_its_lengths(tmp_path):
    source = loud(tmp_path / "in", normalize=True)
    stage = TRAINING | {"learning_rate": 1e-2, "losses": {"embedding": 1.0}}
    common = {"measure": {"repeats": 2, "truncate_dims": [8, 4]}}
    plain = compress(recipe(source, PLUGIN, {"distill": stage}, **common), output_dir=tmp_path / "plain")
    cut = stage | {"matryoshka_dims": [4]}
    nested = compress(recipe(source, PLUGIN, {"distill": cut}, **common), output_dir=tmp_path / "nested")
    assert [row.dataset for row in nested.domains] == ["the first 8 numbers", "the first 4 numbers"]
    assert nested.domains[0].score == "retrieval@1" and nested.domains[0].samples == 6
    texts = [f"w{n} w{(3 * n) % 30}" for n in range(8)]
    ours, theirs = (load(tmp_path / name / "model", truncate_dim=4).encode(texts) for name in ("nested", "plain"))
    assert ours.shape == (8, 4) and not np.allclose(ours, theirs, atol=1e-3)
    assert plain.domains[1].teacher == nested.domains[1].teacher
    card = (tmp_path / "nested" / "model" / "README.md").read_text()
    assert "retrieval@1 on the first 4 numbers" in card


@pytest.mark.parametrize(
    ("stage", "measure", "words"),
    [
        ({"matryoshka_dims": [16]}, {}, r"stages\[0\].distill.matryoshka_dims .* below 16; got \[16\]"),
        ({"matryoshka_dims": [4], "losses": {"hidden": 1.0}}, {}, "is for the loss embedding"),
        ({"matryoshka_dims": [4, 4]}, {}, "a list of different lengths"),
        ({}, {"truncate_dims": [17]}, r"measure.truncate_dims is \[17\], and vectors are 16 numbers long"),
        ({}, {"truncate_dims": [4, 4]}, "truncate_dims"),
    ],
)
def test_lengths_that_cannot_be(stage, measure, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        compress(recipe(chain(tmp_path / "in"), {"distill": stage}, measure=measure), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_need_a_second_text(tmp_path):
    asked = sts(chain(tmp_path / "in")).to_dict()
    asked["data"]["text_pair_column"] = None
    with pytest.raises(ConfigError, match="name the second one with text_pair_column"):
        compress(Recipe.from_dict(asked), output_dir=tmp_path / "out")
