"""A recipe and the commands on a model that lies in a GGUF file."""

import json

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from hf_efficient import ConfigError, Recipe, compress, load_report
from hf_efficient.pipeline.run import Run

from ..commands import cli
from ..gguf_files import TEMPLATE, WORDS, make_llama, make_tokenizer, write_gguf

TRAINING = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    model = make_llama(max_position_embeddings=256)
    write_gguf(tmp_path / "tiny.gguf", model, make_tokenizer(), quantized=True)
    return tmp_path / "tiny.gguf"


def test_from_the_file_to_a_smaller_chat_model(path, tmp_path, quick_end):
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(f"{WORDS} {n}" for n in range(40)))
    recipe = {
        "name": "chat",
        "task": "causal-lm",
        "model": {"name_or_path": str(path)},
        "data": {"name_or_path": str(rows), "max_length": 16},
        "stages": [
            {"prune": {"ratio": 0.3, "allocation": "uniform", "calibration_samples": 8}},
            {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 0.5}}},
        ],
        "measure": {"repeats": 2},
    }
    report = compress(Recipe.from_dict(recipe), output_dir=tmp_path / "out")
    assert report.loads_with == "portable" and report.base_model == "tiny.gguf"
    assert report.student.size.parameters < report.teacher.size.parameters
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").chat_template == TEMPLATE


def test_the_commands_take_it(path, tmp_path):
    done = cli("plan", str(path), "--ratio", "0.3", "--allocation", "uniform", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["forecast"]["loads_with"] == "portable", done.stderr
    assert not (tmp_path / "assets").exists()  # the header says it all
    done = cli("measure", str(path), "--sequence-length", "16", "--repeats", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["model"] == "LlamaForCausalLM", done.stderr
    done = cli("export", str(path), "--format", "torch", "--output-dir", str(tmp_path / "made"))
    assert done.returncode == 0 and any((tmp_path / "made").iterdir()), done.stderr
    done = cli("measure", str(tmp_path / "none.gguf"))
    assert done.returncode == 1 and "no GGUF file" in done.stderr


def test_texts_of_several_kinds_are_trained_on_and_others_measured(path, tmp_path, quick_end):
    for name, word in (("rows", "cats"), ("more", "trains"), ("others", "ships")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{WORDS} {word} {n}" for n in range(40)))
    recipe = {
        "name": "chat",
        "task": "causal-lm",
        "model": {"name_or_path": str(path)},
        "data": {"name_or_path": str(tmp_path / "rows.txt"), "max_length": 16},
        "stages": [{"prune": {"ratio": 0.3, "allocation": "uniform", "calibration_samples": 8}}],
        "measure": {"repeats": 2, "other_data": [str(tmp_path / "others.txt")], "new_tokens": 4},
    }
    recipe["data"]["mixed_with"] = [str(tmp_path / "more.txt")]
    run = Run(Recipe.from_dict(recipe), tmp_path / "unused")
    texts = run.rows["train"]["text"]
    assert len(texts) == 64 and sum("trains" in text for text in texts) == 32
    assert not any("trains" in text for text in run.rows["test"]["text"])
    report = compress(Recipe.from_dict(recipe), output_dir=tmp_path / "out")
    [domain] = report.domains
    assert domain.dataset == "others.txt" and domain.score == "perplexity" and domain.samples > 0
    assert domain.student != domain.teacher and 0 < domain.agreement < 1
    made = report.generation
    assert made.new_tokens == 4 and made.prompt_tokens == 16 and len(made.samples) == 4
    assert all(WORDS.startswith(sample.prompt[:12]) for sample in made.samples)
    assert load_report(tmp_path / "out" / "model") == report


@pytest.mark.parametrize(
    ("section", "value", "reason"),
    [
        ("measure", {"prompts": ["a"]}, "new_tokens"),
        ("measure", {"other_data": ["a", "a"]}, "different"),
        ("measure", {"other_data": ["bundled:nothing"]}, "Known: "),
        ("data", {"name_or_path": "a.txt", "mixed_with": ["bundled:nothing"]}, "Known: "),
    ],
)
def test_settings_that_cannot_be_meant(section, value, reason):
    recipe = {"name": "a", "task": "causal-lm", "model": {"name_or_path": "m"}, "data": {"name_or_path": "a.txt"}}
    with pytest.raises(ConfigError, match=reason):
        Recipe.from_dict(recipe | {section: value})


def test_settings_of_language_models_are_for_them():
    recipe = {"name": "a", "task": "text-classification", "model": {"name_or_path": "m"}}
    for changes in (
        {"data": {"name_or_path": "a.csv", "mixed_with": ["b.csv"]}},
        {"data": {"name_or_path": "a.csv"}, "measure": {"new_tokens": 3}},
    ):
        with pytest.raises(ConfigError, match="causal-lm"):
            Recipe.from_dict(recipe | changes)
