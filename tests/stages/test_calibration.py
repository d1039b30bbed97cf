"""What a prune stage looks at: rows of the data, and what a language model writes itself."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

from hf_efficient.cli.programs.prune import parse
from hf_efficient.data.preparation import prepare
from hf_efficient.data.tokenizer import train_tokenizer
from hf_efficient.errors import ConfigError
from hf_efficient.models import on_disk
from hf_efficient.models.loading import load_model
from hf_efficient.stages.prune import CalibrationSettings, PruneStage, calibration_batches

TEXTS = [f"A line about {'cats and dogs ' * (number % 5)}number {number}." for number in range(60)]


def test_language_models_have_defaults_of_their_own():
    stage = PruneStage.read({"ratio": 0.3}, "stages[0].prune", "causal-lm")
    assert stage.to_dict()["generated_samples"] == stage.to_dict()["calibration_samples"] == 32
    assert PruneStage.read(stage.to_dict(), "prune", "causal-lm") == stage
    given = PruneStage.read({"ratio": 0.3, "generated_samples": 0, "batch_size": 8}, "prune", "causal-lm")
    assert (given.calibration.generated_samples, given.calibration.batch_size) == (0, 8)
    assert PruneStage.read(given.to_dict(), "prune", "causal-lm") == given
    rows = PruneStage.read({"ratio": 0.3, "calibration_samples": 64}, "prune", "causal-lm")
    assert rows.calibration == CalibrationSettings(64, 16, 0)
    other = PruneStage.read({"ratio": 0.3}, "prune", "text-classification").calibration
    assert (other.calibration_samples, other.generated_samples, other.batch_size) == (256, 0, 16)


def test_other_models_write_nothing():
    with pytest.raises(ConfigError, match=r"prune\.generated_samples is 4.*causal-lm"):
        PruneStage.read({"ratio": 0.3, "generated_samples": 4}, "prune", "text-classification")
    words = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--ratio", "0.5", "--generated_samples", "4"]
    with pytest.raises(ConfigError, match="generated_samples"):
        parse([*words, "--task", "token-classification"])
    assert parse([*words, "--task", "causal-lm"]).calibration() == CalibrationSettings(32, 2, 4)


def test_the_batches_are_rows_of_the_data_and_the_models_own():
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval()
    splits = DatasetDict({name: Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")})
    data = prepare(splits, "causal-lm", tokenizer, max_length=16)
    own = calibration_batches(model, data, CalibrationSettings(4, 2, 0), seed=0)
    both = calibration_batches(model, data, CalibrationSettings(4, 2, 3), seed=0)
    assert [len(batch["input_ids"]) for batch in both] == [2, 2, 2, 1] and len(own) == 2
    assert all(torch.equal(first["input_ids"], second["input_ids"]) for first, second in zip(own, both, strict=False))
    assert both[2]["input_ids"].shape[1] == 16
    other = calibration_batches(model, data, CalibrationSettings(4, 2, 3), seed=1)
    assert not torch.equal(both[2]["input_ids"], other[2]["input_ids"])


def test_a_large_model_is_pruned_from_folder_to_folder(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "source")
    splits = DatasetDict({name: Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")})
    data = prepare(splits, "causal-lm", tokenizer, max_length=16)
    run = SimpleNamespace(
        data=lambda config: data,
        recipe=SimpleNamespace(seed=0),
        load=lambda _: pytest.fail("loaded"),
        write_modules=lambda config, folder: None,
    )
    settings = {"ratio": 0.3, "importance": "magnitude", "calibration_samples": 4}
    stage = PruneStage.read(settings | {"layer_by_layer": "always"}, "prune", "causal-lm")
    assert (
        stage.to_dict()["layer_by_layer"] == "always"
        and PruneStage.read(stage.to_dict(), "prune", "causal-lm") == stage
    )
    (tmp_path / "target").mkdir()
    facts = stage.run(run, tmp_path / "source", tmp_path / "target")
    assert facts["parameters_after"] < facts["parameters_before"] and facts["loads_with"] == "plugin"
    assert facts["class"] == type(load_model("AutoModelForCausalLM", tmp_path / "target")).__name__
    # a run that was killed behind it goes on; and what is left open is decided by the size
    monkeypatch.setattr(on_disk, "SHARE", 0.0)
    usual = PruneStage.read(settings, "prune", "causal-lm")
    assert "layer_by_layer" not in usual.to_dict()
    assert usual.run(run, tmp_path / "source", tmp_path / "target") == facts
    never = PruneStage.read(settings | {"layer_by_layer": "never"}, "prune", "causal-lm")
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        never.run(run, tmp_path / "source", tmp_path / "target")
