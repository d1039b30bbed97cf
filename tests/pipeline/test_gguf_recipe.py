"""A recipe and the commands on a model that lies in a GGUF file."""

import json

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from hf_efficient import Recipe, compress

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
