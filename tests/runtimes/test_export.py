"""Other runtimes compute what PyTorch computes, for any batch and length, and say so when they do not."""

import json

import pytest
import torch

from hf_efficient import (
    CheckpointError,
    ConfigError,
    PruningConfig,
    UnsupportedModelError,
    convert_attention,
    export,
    prune,
)
from hf_efficient.runtimes import formats

from ..attention.tiny import TINY
from ..families import VOCABULARY, make_model
from ..helpers import assert_close

FORMATS = ["onnx", "openvino", "executorch", "torch"]


def available(format: str) -> str:
    for package in formats.FORMATS[format].packages:
        pytest.importorskip(package)
    return format


def small(family="bert"):
    """Converted and pruned to unequal layers: what no stock exporter has seen."""
    model = convert_attention(make_model(family), TINY["local"])
    return prune(model, PruningConfig(0.3, importance="random", round_to=1)).eval()


def batch(rows, length):
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("format", FORMATS)
def test_it_loads_without_us_and_computes_the_same(format, tmp_path):
    from transformers.exporters import ExportedModel

    available(format)
    model = small()
    made = export(model, format, tmp_path / "out", inputs=[batch(2, 9), batch(1, 5)])
    assert made.format == format and made.checked == ((2, 9), (1, 5)) and made.quantize is None
    assert 0 <= made.difference < 1e-4 and made.same_prediction == 1
    assert made.bytes_on_disk > 4 * sum(p.numel() for p in model.parameters()) * 0.9
    config = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if format == "openvino" else {}
    loaded = ExportedModel.from_pretrained(tmp_path / "out", **config)
    for rows, length in ((1, 1), (3, 12), (2, 31)):
        inputs = batch(rows, length)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs).logits[real]
        assert_close(torch.as_tensor(loaded(**inputs).logits)[real], expected, 1e-4, f"{rows} x {length}")


@pytest.mark.parametrize("family", ["vit", pytest.param("llama", marks=pytest.mark.thorough), "t5"])
def test_other_inputs_and_heads(family, tmp_path):
    available("onnx")
    model = make_model(family).eval()
    kept = getattr(model.config, "use_cache", None)
    made = export(model, "onnx", tmp_path / family)
    assert made.difference < 1e-4 and len(made.checked) == 3
    assert getattr(model.config, "use_cache", None) == kept


def test_eight_bits_are_smaller_and_close(tmp_path):
    available("onnx")
    model = small()
    batches = [batch(2, 9)]
    plain = export(model, "onnx", tmp_path / "plain", inputs=batches)
    rounded = export(model, "onnx", tmp_path / "int8", inputs=batches, quantize="int8")
    assert plain.difference < rounded.difference < 0.5
    assert rounded.bytes_on_disk < plain.bytes_on_disk


def test_onnx_runtime_keeps_its_fast_norms_and_moves_few_tensors(tmp_path):
    """Its fused SkipLayerNormalization is slower than its parts; windows are cut without a change of layout."""
    available("onnx")
    import onnx
    import onnxruntime

    model = convert_attention(make_model("bert", num_hidden_layers=2), TINY["local-global"]).eval()
    export(model, "onnx", tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert found.count("LayerNormalization") == 5 and "SkipLayerNormalization" not in found
    assert found.count("Transpose") <= 2 * 5, "query, key, value, output; the key of the global tokens' scores"


def test_a_wrong_result_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    from hf_efficient.runtimes.runtime import Runtime

    available("torch")
    right = Runtime.forward

    def wrong(self, **inputs):
        output = right(self, **inputs)
        output.logits = output.logits + 1
        return output

    monkeypatch.setattr(Runtime, "forward", wrong)
    with pytest.raises(UnsupportedModelError, match="computes another output"):
        export(small(), "torch", tmp_path / "out", inputs=[batch(2, 9)])
    assert not list(tmp_path.iterdir())


def test_a_runtime_is_called_as_its_model(tmp_path):
    from hf_efficient.models.inputs import dummy_inputs
    from hf_efficient.runtimes.runtime import Runtime

    available("onnx")
    model = small()
    export(model, "onnx", tmp_path / "out", inputs=[batch(2, 9)])
    twin, inputs = Runtime(model, "onnx", tmp_path / "out", threads=1), dummy_inputs(model, 2, 16)
    assert "token_type_ids" not in inputs and "token_type_ids" in twin.taken
    with torch.no_grad():
        assert_close(twin(**inputs).logits, model(**inputs).logits, 1e-4)


@pytest.mark.parametrize(
    ("format", "options", "error", "words"),
    [
        ("onxn", {}, ConfigError, "Did you mean 'onnx'"),
        ("onnx", {"quantize": "int4"}, ConfigError, "Known: int8"),
        ("torch", {"quantize": "int8"}, ConfigError, "not quantised here, only onnx"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(format, options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(None, format, tmp_path / "out", **options)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs openvino. Run `pip install \"hf-efficient\[openvino\]\"`"):
        export(None, "openvino", tmp_path / "out")


def test_a_folder_in_use_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export(make_model("bert"), "torch", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command(tmp_path):
    from ..commands import cli

    available("onnx")
    make_model("bert").save_pretrained(tmp_path / "model")
    done = cli("export", str(tmp_path / "model"), "--output-dir", str(tmp_path / "onnx"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["difference"] < 1e-4 and told["folder"] == str(tmp_path / "onnx")


@pytest.mark.parametrize(("rows", "length"), [(1, 6), (3, 1)])
def test_an_example_of_one_row_or_one_token_gives_a_program_that_takes_others(rows, length, tmp_path):
    from transformers.exporters import ExportedModel

    available("torch")
    model = small()
    export(model, "torch", tmp_path / "out", inputs=[batch(rows, length)])
    loaded = ExportedModel.from_pretrained(tmp_path / "out")
    for shape in ((1, 1), (4, 9), (2, 14)):
        inputs = batch(*shape)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            assert_close(
                torch.as_tensor(loaded(**inputs).logits)[real], model(**inputs).logits[real], 1e-4, str(shape)
            )


def test_a_program_for_one_shape_is_refused(tmp_path, monkeypatch):
    from hf_efficient.runtimes import export as exporting

    available("torch")
    monkeypatch.setattr(exporting, "_free", lambda value: {})
    with pytest.raises(UnsupportedModelError, match="does not take"):
        export(small(), "torch", tmp_path / "out", inputs=[batch(2, 9)])


def test_too_little_agreement_is_a_warning_or_what_was_asked_for(tmp_path, monkeypatch, caplog):
    from hf_efficient.runtimes import export as exporting

    assert exporting._fault("It", 0.3, 0.9, (0.3, 0.9), "int8", None) is None
    assert "same prediction" in caplog.text
    assert "min_agreement=0.95" in exporting._fault("It", 0.3, 0.9, (0.3, 0.9), "int8", 0.95)
    caplog.clear()
    assert exporting._fault("It", 0.3, 0.96, (0.3, 0.9), "int8", 0.95) is None and not caplog.text
    with pytest.raises(ConfigError, match="min_agreement"):
        export(small(), "torch", tmp_path / "out", min_agreement=2)
