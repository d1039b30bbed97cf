"""Products in half precision where the device has units for them; weights stay float32."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient import ConfigError, Recipe, compress
from hf_efficient.training.precision import PRECISIONS, precision_arguments

from ..pipeline.tiny import TINY, TRAINING

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU gets")


@pytest.mark.parametrize(("has_amx", "arguments"), [(True, {"bf16": True}), (False, {})])
def test_auto_asks_the_processor(monkeypatch, has_amx, arguments):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    assert precision_arguments("auto") == arguments
    assert precision_arguments("bf16") == {"bf16": True} and precision_arguments(None) == {}
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert precision_arguments("auto") == {}


@pytest.mark.parametrize(("fast", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_asks_the_gpu_first(monkeypatch, fast, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert precision_arguments("auto") == {name: True}


def test_a_recipe_trains_in_half_precision_and_keeps_float32(tmp_path):
    def trained(precision):
        recipe = copy.deepcopy(TINY) | {"stages": [{"distill": {**TRAINING, "losses": {"kd": 1.0}}}]}
        recipe["stages"][0]["distill"] |= precision
        compress(Recipe.from_dict(recipe), output_dir=tmp_path / str(len(precision)))
        return load_file(tmp_path / str(len(precision)) / "model" / "model.safetensors")

    whole, half = trained({}), trained({"mixed_precision": "bf16"})
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.allclose(whole[name], half[name], atol=0.02) for name in whole)


def test_it_is_written_only_where_asked_for():
    recipe = Recipe.from_dict(copy.deepcopy(TINY))
    assert "mixed_precision" not in recipe.to_dict()["teacher"]
    asked = recipe.with_overrides({"teacher.mixed_precision": "auto", "distill.mixed_precision": "bf16"})
    assert asked.to_dict()["teacher"]["mixed_precision"] == "auto" and Recipe.from_dict(asked.to_dict()) == asked
    with pytest.raises(ConfigError, match=f"teacher.mixed_precision must be one of {', '.join(PRECISIONS)}, or null"):
        recipe.with_overrides({"teacher.mixed_precision": "int8"})
