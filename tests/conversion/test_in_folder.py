"""A folder is converted as the model in memory is, and its weights are those of before."""

import pytest
import torch

from hf_efficient import AttentionConfig, CheckpointError, ConfigError, UnsupportedModelError, convert_attention
from hf_efficient.models.loading import load_model
from hf_efficient.models.on_disk import StoredModel
from hf_efficient.models.rebuild import is_portable
from tests.families import make_inputs, make_model

LOCAL = AttentionConfig("local", window=2, global_tokens=1)


@pytest.mark.parametrize(
    ("name", "mixing"),
    [
        ("llama", LOCAL),
        ("bert", {"all": LOCAL, 1: AttentionConfig("full")}),
        ("t5", {"encoder": LOCAL}),
        ("gpt2", AttentionConfig("linear")),
        ("bert", AttentionConfig("linear", feature_map="hedgehog")),
        ("bert", AttentionConfig("additive")),
    ],
)
def test_a_folder_gives_what_the_model_in_memory_gives(name, mixing, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    converted = convert_attention(model, mixing)
    assert convert_attention(tmp_path / "dense", mixing, output_dir=tmp_path / "new") == tmp_path / "new"
    result = load_model(type(converted), tmp_path / "new").eval()
    inputs = make_inputs(name, padding=None if name == "gpt2" else "right")
    state = result.state_dict()
    assert state.keys() == converted.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        before, answer = model(**inputs)[0], result(**inputs)[0]
        result.load_state_dict(converted.state_dict())  # what is learned is drawn anew
        assert torch.allclose(result(**inputs)[0], converted.eval()(**inputs)[0], atol=1e-5)
    assert (answer - before).abs().max() > 1e-4


def test_there_and_back(tmp_path):
    model = make_model("bert")
    model.save_pretrained(tmp_path / "dense")
    convert_attention(tmp_path / "dense", AttentionConfig("additive"), output_dir=tmp_path / "there")
    convert_attention(tmp_path / "there", AttentionConfig("full"), output_dir=tmp_path / "back")
    result = load_model(type(model), tmp_path / "back")
    assert is_portable(result) and result.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(result.state_dict()[key], value) for key, value in model.state_dict().items())


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(StoredModel, "read", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ConfigError, match="output_dir"):
        convert_attention(tmp_path / "dense", LOCAL)
    with pytest.raises(ConfigError, match="save_pretrained"):
        convert_attention(model, LOCAL, output_dir=tmp_path / "new")
    with pytest.raises(ConfigError, match="layer"):
        convert_attention(tmp_path / "dense", {7: LOCAL}, output_dir=tmp_path / "new")
    with pytest.raises(UnsupportedModelError):
        convert_attention(tmp_path / "dense", AttentionConfig("merging", merged_tokens=1), output_dir=tmp_path / "new")
    with pytest.raises(CheckpointError, match="not empty"):
        convert_attention(tmp_path / "dense", LOCAL, output_dir=tmp_path / "dense")
    assert not (tmp_path / "new").exists()
