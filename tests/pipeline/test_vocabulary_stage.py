"""The stage `vocabulary` of a recipe: last, with its own tokenizer, and measured with it."""

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, pipeline

from hf_efficient import ConfigError, Recipe, compress, load_report
from hf_efficient.data.bundled import bundled_model
from hf_efficient.data.datasets import load_dataset_any

pytestmark = pytest.mark.usefixtures("quick_end")
RECIPE = {
    "name": "few-tokens",
    "task": "text-classification",
    "model": {"name_or_path": "bundled:minilm-l6"},
    "data": {"name_or_path": "bundled:bbc-news", "limit": 60, "max_length": 16, "test_fraction": 0.4},
    "teacher": {"max_steps": 2, "batch_size": 4},
    "stages": [
        {"prune": {"ratio": 0.5, "granularity": ["layer"], "importance": "magnitude"}},
        {"vocabulary": {}},
    ],
    "measure": {"sequence_length": 8, "repeats": 2},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Of a tiny model with all the 30,522 tokens of the bundled one."""
    folder = tmp_path_factory.mktemp("bert")
    AutoTokenizer.from_pretrained(bundled_model("minilm-l6")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder)
    return Recipe.from_dict(RECIPE | {"model": {"name_or_path": str(folder)}})


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    compress(recipe, output_dir=folder)
    return folder


def test_the_result_has_the_tokens_of_the_training_texts(finished):
    report = load_report(finished / "model")
    stage = report.stages[-1]
    tokenizer, dense = (AutoTokenizer.from_pretrained(finished / name) for name in ("model", "0-teacher"))
    model = AutoModelForSequenceClassification.from_pretrained(finished / "model")
    assert (stage.name, stage.facts["tokens_before"], stage.facts["tokens_after"]) == (
        "vocabulary",
        30522,
        len(tokenizer),
    )
    assert model.config.vocab_size == len(tokenizer) == len(model.get_input_embeddings().weight) < 20000
    rows = load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0, limit=60)["train"]
    assert all(tokenizer.tokenize(text) == dense.tokenize(text) for text in rows["text"])
    assert pipeline("text-classification", model=model, tokenizer=tokenizer)(rows["text"][0][:80])


def test_the_report_and_the_card_say_so(finished):
    report, card = load_report(finished / "model"), (finished / "model" / "README.md").read_text()
    [warning] = [text for text in report.warnings if "tokens" in text]
    assert "30,522" in warning and warning in card
    assert "  - vocabulary\n" in card or "- vocabulary\n" in card


def test_texts_of_known_tokens_get_the_same_answer(finished):
    texts = load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0, limit=60)["train"]["text"][:4]
    answers = []
    for model, tokenizer in (("1-prune", "0-teacher"), ("model", "model")):
        pruned = AutoModelForSequenceClassification.from_pretrained(finished / model).eval()
        inputs = AutoTokenizer.from_pretrained(finished / tokenizer)(
            texts, truncation=True, max_length=16, return_tensors="pt"
        )
        answers.append((inputs["input_ids"], pruned(**inputs).logits))
    assert torch.equal(answers[0][1], answers[1][1]) and not torch.equal(answers[0][0], answers[1][0])


def test_a_finished_stage_is_read_again_with_its_tokenizer(recipe, finished, tmp_path):
    """The run was stopped before it was measured."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model"))
    shutil.copytree(finished / "model", tmp_path / "model")
    again = compress(recipe, output_dir=folder)
    first = load_report(tmp_path / "model")
    assert again.student.quality == first.student.quality and again.student.size == first.student.size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": [{"prune": {}}, {"vocabulary": {}}, {"distill": {}}]}, "must come after distill, not before"),
        ({"stages": [{"vocabulary": {"ratio": 0.5}}]}, r"stages\[0\]\.vocabulary"),
        ({"stages": [{"vocabulary": {"max_tokens": 0}}]}, r"max_tokens must be an integer from 1"),
        ({"task": "seq2seq"}, "needs one of the tasks text-classification"),
        ({"stages": [{"prune": {"granularity": ["vocabulary"]}}]}, "in a recipe the last stage `vocabulary"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(RECIPE | change)
