"""The teacher in 8 bits: in PyTorch without an export, else in the runtime of the recipe's own."""

from types import SimpleNamespace

import pytest
import torch

from hf_efficient import Recipe
from hf_efficient.baselines.base import reader_of
from hf_efficient.baselines.int8 import INT8, export_stage, quantized
from hf_efficient.measurement.size import count_weight_bytes
from hf_efficient.models.loading import load_model, load_processor
from hf_efficient.stages.export import ExportStage

from ..pipeline.tiny import make_bert, text_recipe

TEXTS = [("a b c d e",), ("h",), ("",)]


@pytest.fixture
def folder(tmp_path):
    return make_bert(tmp_path / "bert", hidden_size=32, intermediate_size=128)


def run_of(folder, stages=()):
    recipe = text_recipe(folder, folder / "rows.csv", stages=list(stages))
    assert isinstance(recipe, Recipe)
    return SimpleNamespace(
        recipe=recipe,
        teacher_folder=folder,
        processor=load_processor(str(folder), images=False),
        load=lambda place: load_model("AutoModelForSequenceClassification", place),
    )


def test_linears_have_8_bits_and_answers_are_near(folder):
    model = load_model("AutoModelForSequenceClassification", folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, size = quantized(model)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    biases = sum(m.bias.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert size == count_weight_bytes(model) - 3 * linears - 4 * biases
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    run = run_of(folder)
    assert INT8.make(run, None, folder)["about"].startswith("the teacher in 8 bits, torch 2")
    with torch.inference_mode():
        found = INT8.reader(run, folder)(TEXTS).logits
        exact = reader_of(run, model.eval(), 0)(TEXTS).logits
    assert (found - exact).abs().max() < 0.05 * exact.abs().max() and not torch.equal(found, exact)


def test_the_runtime_is_that_of_the_recipe(folder):
    stages = [{"export": {"format": "onnx"}}, {"export": {"quantize": "int8", "min_agreement": 0.9, "max_loss": 1}}]
    assert export_stage(run_of(folder, stages)) == ExportStage("onnx", "int8")
    assert export_stage(run_of(folder, stages[:1])) is None
