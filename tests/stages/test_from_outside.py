"""A stage and an export format are one class and one entry each, also where they are added from outside."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_efficient import ConfigError, Recipe, compress
from hf_efficient.runtimes.formats import FORMATS, Format
from hf_efficient.stages.base import Stage
from hf_efficient.stages.settings import number
from hf_efficient.stages.table import STAGES

from ..robustness.tiny import TINY

CALLS = []


@dataclass(frozen=True)
class NoiseStage(Stage):
    """Random numbers onto all weights.

    - noise: {scale: 0.01}
    """

    scale: float = number(0.01, 0, 1)

    def check(self, path, run, config, before):
        if not before[0].to_dict():
            raise ConfigError(f"{path}: noise is for a model that was trained here. Give a teacher.")
        return config

    def run(self, run, source, target):
        CALLS.append(self.scale)
        model = run.load(source)
        with torch.no_grad():
            for weight in model.parameters():
                weight += self.scale * torch.randn_like(weight)
        return {"parameters": model.num_parameters()} | run.save(model, target)

    def note(self, record):
        return (f"Noise of {self.scale:g} was added to {record.facts['parameters']} numbers.",)


class Stock(Format):
    """A checkpoint of transformers, run by PyTorch."""

    def write(self, model, example, shapes, quantize, folder):
        model.save_pretrained(folder)

    def load(self, folder, threads, exact):
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        return model, inspect.signature(model.forward).parameters


@pytest.fixture(autouse=True)
def added(monkeypatch, quick_end):
    monkeypatch.setitem(STAGES, "noise", NoiseStage)
    monkeypatch.setitem(FORMATS, "stock", Stock("torch", ("torch",), "torch"))
    CALLS.clear()


def recipe(*stages, **changes):
    return Recipe.from_dict(copy.deepcopy(TINY) | {"stages": list(stages)} | changes)


@pytest.mark.parametrize("kind", [NoiseStage, Stock])
def test_it_takes_few_lines(kind):
    assert len(inspect.getsource(kind).splitlines()) + 1 <= 30  # and one for its entry


def test_they_run_are_reported_and_go_on(tmp_path, monkeypatch):
    noisy = recipe({"noise": {"scale": 0.1}}, {"export": {"format": "stock"}})
    with monkeypatch.context() as stopped:
        stopped.setattr("hf_efficient.pipeline.compress.measured", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(noisy, output_dir=tmp_path)
    report = compress(noisy, output_dir=tmp_path)
    assert CALLS == [0.1]  # the second run read what the first had finished
    assert [stage.name for stage in report.stages] == ["teacher", "noise", "export"]
    assert any(note.startswith("Noise of 0.1 was added to") for note in report.warnings)
    [export] = report.exports
    assert export.folder == "stock" and export.difference == 0 and (tmp_path / "model/stock/config.json").is_file()
    before, after = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("0-teacher", "model")
    )
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"noise": {"scale": 2}}, r"stages\[0\]\.noise\.scale must be a number from 0 to 1, got 2"),
        ({"noise": {"scael": 1}}, r"stages\[0\]\.noise\.scael: unknown key. Did you mean 'scale'"),
        ({"nois": {}}, "Unknown stage 'nois'. Did you mean 'noise'"),
        ({"export": {"format": "stok"}}, "format must be one of onnx, openvino, executorch, torch, gguf, stock"),
        ({"export": {"format": "stock", "quantize": "int8"}}, "'stock' is not quantised here, only onnx"),
    ],
)
def test_they_are_checked_as_our_own(stage, words):
    with pytest.raises(ConfigError, match=words):
        recipe(stage)


def test_they_are_checked_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"stages\[0\]\.noise: noise is for a model that was trained here"):
        compress(recipe({"noise": {}}, teacher=None), output_dir=tmp_path)
    assert not CALLS
