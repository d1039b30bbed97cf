"""A student that is distilled by adapters: its class, sizes and names stay, its weights differ by a low rank."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_efficient import ConfigError, compress
from hf_efficient.stages.distill import DistillStage

from ..pipeline.test_merge_stage import material, recipe  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_end")


def made(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_the_result_is_a_stock_model_whose_linears_learned(material, tmp_path):  # noqa: F811
    """The pruned student comes out as it went in, but for what rank 2 adds to the linears that were named."""
    prune = {"prune": {"ratio": 0.3, "granularity": ["neuron"], "allocation": "uniform", "reconstruct": False}}
    lora = {"r": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
    distill = {"distill": {"max_steps": 3, "learning_rate": 0.01, "lora": lora}}
    compress(recipe(material, prune, name="llama"), output_dir=tmp_path / "before")
    compress(recipe(material, prune, distill, name="llama"), output_dir=tmp_path / "after")
    before, after = made(tmp_path / "before"), made(tmp_path / "after")
    assert type(after) is LlamaForCausalLM and not list((tmp_path / "after" / "model").glob("adapter*"))
    assert json.loads((tmp_path / "after" / "model" / "config.json").read_text())["use_cache"] is True
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    for name, weight in new.items():
        change = weight - old[name]
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            assert change.abs().max() > 1e-4 and torch.linalg.matrix_rank(change, rtol=1e-4) <= 2, name
        else:
            assert not change.any(), name


def test_settings_are_read_written_and_refused():
    stage = DistillStage.read({"lora": {"r": 4}}, "stages[0].distill")
    assert stage.lora.r == 4 and stage.lora.targets == "all-linear"
    assert DistillStage.read(stage.to_dict(), "again") == stage
    assert "lora" not in DistillStage().to_dict()
    for lora, words in (
        ({"rank": 4}, r"distill\.lora\.rank: unknown key"),
        ({"r": 0}, r"distill\.lora\.r must be an integer from 1"),
        ({"targets": "q_proj"}, "all-linear, or a list"),
        (4, "must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=words):
            DistillStage.read({"lora": lora}, "distill")
    with pytest.raises(ConfigError, match="cannot be pruned while"):
        DistillStage.read({"lora": {}, "prune": {"ratio": 0.5}}, "distill")


def test_linears_that_are_not_there_are_named():
    from ..gguf_files import make_llama

    stage = DistillStage.read({"lora": {"targets": ["query"]}}, "distill")
    with pytest.raises(ConfigError, match=r"lora\.targets: .*query"):
        stage.lora.adapted(make_llama())
