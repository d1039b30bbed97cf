"""`hf-efficient free`: what it takes, writes and says."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..commands import cli
from ..pipeline.tiny import make_bert


def test_dead_neurons_and_unused_tokens_leave(tmp_path):
    folder = make_bert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][:, :8] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "rows.csv").write_text("text\na b\nb c\na c b\n")
    words = ("free", str(folder), "--output-dir", str(tmp_path / "out"), "--texts", str(tmp_path / "rows.csv"))
    told = json.loads(cli(*words, "--json").stdout)
    assert [each["name"] for each in told["savings"]] == ["neurons", "vocabulary"] and told["difference"] < 1e-5
    assert told["savings"][0]["count"] == 8 and told["loads_with"] == "portable"
    small, model = (AutoModelForSequenceClassification.from_pretrained(each) for each in (tmp_path / "out", folder))
    assert small.config.intermediate_size == 24
    inputs = [AutoTokenizer.from_pretrained(each)("a c b", return_tensors="pt") for each in (tmp_path / "out", folder)]
    with torch.no_grad():
        assert torch.allclose(small(**inputs[0]).logits, model(**inputs[1]).logits, atol=1e-6)


def test_nothing_is_said_of_a_model_that_lives(tmp_path):
    folder = make_bert(tmp_path / "model")
    done = cli("free", str(folder), "--output-dir", str(tmp_path / "out"))
    assert "Nothing: all of it counts." in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    again = cli("free", str(folder), "--output-dir", str(tmp_path / "out"))
    assert again.returncode == 1 and "is not empty" in again.stderr
    assert "--text-column is for --texts" in cli("free", str(folder), "--output-dir", "x", "--text-column", "t").stderr
