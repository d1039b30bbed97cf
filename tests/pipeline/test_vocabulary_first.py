"""The stage `vocabulary` as the first: teacher and student with fewer tokens, compared with the original."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_efficient import ConfigError, Recipe, compress, load_report
from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.tokenizer import train_tokenizer
from hf_efficient.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_end")
DATA = {"name_or_path": "bundled:bbc-news", "limit": 40, "max_length": 32, "test_fraction": 0.4}
STAGES = [
    {"vocabulary": {"common_share": 0.4}},
    {"prune": {"ratio": 0.2, "calibration_samples": 8, "generated_samples": 4}},
    {"distill": {"max_steps": 2, "batch_size": 4, "losses": {"kd": 1.0}}},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    texts = load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0, limit=400)
    tokenizer = train_tokenizer([*texts["train"]["text"], *texts["test"]["text"]], 3000, close=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Recipe.from_dict(
        {
            "name": "first",
            "task": "causal-lm",
            "model": {"name_or_path": str(folder)},
            "data": DATA,
            "teacher": {"max_steps": 4, "batch_size": 4},
            "stages": STAGES,
            "measure": {
                "sequence_length": 16,
                "repeats": 2,
                "new_tokens": 4,
                "other_data": ["bundled:film-plots"],
                "lengths": [16],
            },
        }
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    pytest.importorskip("scattertext")
    folder = tmp_path_factory.mktemp("run") / "out"
    compress(recipe, output_dir=folder)
    return folder


def perplexity(folder, spelled_by) -> float:
    """Of the test blocks of the dense tokenizer, by hand."""
    dense, own = (AutoTokenizer.from_pretrained(name) for name in (folder / "0-teacher", folder / spelled_by))
    model = AutoModelForCausalLM.from_pretrained(folder / spelled_by).eval()
    rows = load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0, limit=40)["test"]["text"]
    ids = [token for text in rows for token in [*dense(text).input_ids, dense.eos_token_id]]
    loss, count = 0.0, 0
    for start in range(0, len(ids), 32):
        block = ids[start : start + 32]
        if len(block) > 1:
            spelled = torch.tensor([own(dense.decode(block), add_special_tokens=False).input_ids])
            with torch.no_grad():
                mean = model(spelled, labels=spelled).loss
            loss, count = loss + mean.item() * (spelled.shape[1] - 1), count + len(block) - 1
    return float(torch.tensor(loss / count).exp())


def test_the_result_counts_the_tokens_of_the_original(finished):
    report = load_report(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    dense = AutoTokenizer.from_pretrained(finished / "0-teacher")
    assert 1200 <= len(tokenizer) < len(dense) == 3000
    assert report.student.quality.targets == report.teacher.quality.targets
    for measured, name in ((report.teacher, "0-teacher"), (report.student, "model")):
        assert measured.quality.main.value == pytest.approx(perplexity(finished, name), rel=1e-4)
    assert report.comparison.agreement is None and report.comparison.quality_difference_error > 0
    assert [score.name for score in report.student.quality.scores] == ["perplexity", "loss"]
    assert report.domains[0].agreement is None and report.domains[0].teacher != report.domains[0].student
    assert report.generation.acceptance is None and len(report.generation.samples) == 4
    assert "same prediction" not in (finished / "model" / "README.md").read_text()


def test_the_student_learns_from_the_teacher_with_its_tokens(finished):
    """Whose answers to the same texts are those of the original, but for the tokens that left."""
    short, small = (
        AutoTokenizer.from_pretrained(finished / "1-vocabulary"),
        AutoModelForCausalLM.from_pretrained(finished / "1-vocabulary"),
    )
    dense, teacher = (
        AutoTokenizer.from_pretrained(finished / "0-teacher"),
        AutoModelForCausalLM.from_pretrained(finished / "0-teacher"),
    )
    text = load_dataset_any("bundled:bbc-news", test_fraction=0.4, seed=0, limit=40)["train"]["text"][0][:80]
    old, new = (each(text, return_tensors="pt").input_ids for each in (dense, short))
    assert dense.convert_ids_to_tokens(old[0]) == short.convert_ids_to_tokens(new[0])
    places = torch.tensor(dense.convert_tokens_to_ids(short.convert_ids_to_tokens(range(len(short)))))
    torch.testing.assert_close(small(new).logits, teacher(old).logits[..., places])
    report = load_report(finished / "model")
    assert report.stages[-1].name == "distill" and "distill" in str(report.recipe)


def test_rows_that_become_too_long_are_an_error_before_what_follows(recipe, tmp_path):
    """A model with a table of positions, whole blocks, and tokens that are all gone."""
    folder = tmp_path / "gpt"
    AutoTokenizer.from_pretrained(recipe.model.name_or_path).save_pretrained(folder)
    config = GPT2Config(vocab_size=3000, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    changed = {"model.name_or_path": str(folder), "stages.0.common_share": 0.0, "data.limit": 10}
    changed = recipe.with_overrides(changed)
    with pytest.raises(DataError, match=r"spelled in .* positions. Set data.max_length"):
        compress(changed, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "2-prune").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": [{"prune": {}}, {"vocabulary": {}}]}, "Move it to the front"),
        ({"stages": [{"prune": {}}, {"vocabulary": {}}, {"distill": {}}]}, "must come after distill, not before"),
        ({"stages": [{"vocabulary": {"max_tokens": 9, "common_share": 0.5}}]}, "Give one of them"),
        ({"stages": [{"vocabulary": {"common_share": 2}}]}, "from 0 to 1"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(recipe, change, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        compress(Recipe.from_dict(recipe.to_dict() | change), output_dir=tmp_path / "out")


def test_a_language_model_keeps_the_common_half_by_default():
    stage = {"name": "a", "task": "causal-lm", "model": {"name_or_path": "gpt2"}, "data": DATA}
    read = Recipe.from_dict(stage | {"stages": [{"vocabulary": {}}]}).stages[0].settings
    few = Recipe.from_dict(stage | {"stages": [{"vocabulary": {"max_tokens": 900}}]}).stages[0].settings
    none = Recipe.from_dict(stage | {"stages": [{"vocabulary": {"common_share": 0.0}}]})
    assert (read.common_share, few.common_share) == (0.5, None)
    assert read.to_dict() == {"common_share": 0.5} and few.to_dict() == {"max_tokens": 900}
    assert none.stages[0].settings.to_dict() == {"common_share": 0.0} and Recipe.from_dict(none.to_dict()) == none
    other = stage | {"task": "text-classification", "stages": [{"vocabulary": {}}]}
    assert Recipe.from_dict(other).stages[0].settings.to_dict() == {}
