"""A checkpoint that is not what its config says is an error or, where transformers only warns, at least a report."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_efficient import AttentionConfig, CheckpointError, ConfigError, convert_attention
from hf_efficient.models.rebuild import rebuild

from ..families import make_model

LOCAL = AttentionConfig(kind="local", window=2)
KEY = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.fixture
def saved(tmp_path):
    model = convert_attention(make_model("bert"), LOCAL)
    model.save_pretrained(tmp_path)
    return type(model), tmp_path


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_truncated_weights_are_an_error(saved):
    model_class, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"incomplete metadata|file not fully covered|IncompleteBuffer"):
        model_class.from_pretrained(folder)


def test_missing_weights_are_an_error(saved):
    model_class, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        model_class.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_an_error(saved):
    model_class, folder = saved
    edit_weights(folder, lambda tensors: tensors.update({KEY: tensors[KEY][:-1].clone()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(folder)


def test_a_block_that_does_not_fit_the_weights_is_an_error(saved):
    model_class, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["efficient"]["stacks"]["encoder"]["neurons"] = [32, 31, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(folder)
    config["efficient"]["stacks"]["encoder"]["neurons"] = [32, 33, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"neurons\[1\] is 33"):
        model_class.from_pretrained(folder)


def test_a_missing_tensor_is_reported_as_for_stock_classes(saved, caplog, monkeypatch):
    """transformers fills it at random and logs a table, so that a new head can be put on an old body; we keep that."""
    model_class, folder = saved
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model_class.from_pretrained(folder)
    assert "MISSING" not in caplog.text
    edit_weights(folder, lambda tensors: tensors.pop(KEY))
    _, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {KEY}
    assert "MISSING" in caplog.text and "intermediate.dense.weight" in caplog.text


@pytest.mark.parametrize("efficient", [False, True])
def test_rebuild_takes_no_state_that_does_not_fit(efficient):
    model = make_model("bert")
    if efficient:
        model = convert_attention(model, LOCAL)
    good = model.state_dict()
    assert torch.equal(rebuild(model, model.config, good).state_dict()[KEY], good[KEY])
    with pytest.raises(CheckpointError, match=rf"do not fit .*missing_keys.*{KEY}"):
        rebuild(model, model.config, {key: value for key, value in good.items() if key != KEY})
    with pytest.raises(CheckpointError, match=r"do not fit .*unexpected_keys.*stray"):
        rebuild(model, model.config, good | {"stray": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"do not fit .*mismatched_keys.*{KEY}"):
        rebuild(model, model.config, good | {KEY: torch.zeros(2, 2)})
