"""Other runtimes compute what PyTorch computes, for any batch and length, and say so when they do not."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import (
    CheckpointError,
    ConfigError,
    PruningConfig,
    UnsupportedModelError,
    convert_attention,
    export,
    prune,
)
from hf_efficient.models.derive.tiny import tiny_config, tiny_model
from hf_efficient.runtimes import formats
from hf_efficient.runtimes import rows as rows_of
from hf_efficient.stages.export import ExportStage

from ..attention.tiny import TINY
from ..commands import cli
from ..families import VOCABULARY, make_model
from ..helpers import assert_close
from .copied import Copied

SHAPES = ((2, 9), (1, 5))  # of the examples; the first one is traced
FORMATS = {"onnx": SHAPES, "openvino": SHAPES, "executorch": SHAPES, "torch": ((1, 1), (1, 5))}
LAYERS = {"onnx": 2, "openvino": 1, "executorch": 1, "torch": 1}  # each is traced, for some seconds


def available(format: str) -> str:
    for package in formats.FORMATS[format].packages:
        pytest.importorskip(package)
    return format


def small(layers):
    """Converted and pruned to unequal layers: what no stock exporter has seen."""
    torch.manual_seed(0)
    converted = convert_attention(make_model("bert", num_hidden_layers=layers), TINY["local-global"])
    pruned = prune(converted, PruningConfig(0.3, importance="random", round_to=1)).eval()
    assert len({layer.intermediate.dense.out_features for layer in pruned.bert.encoder.layer}) == layers
    return pruned


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported("onnx")`: a model, and what `export` gave of it; made once."""
    done = {}

    def get(format):
        if format not in done:
            examples, model = [batch(*shape) for shape in FORMATS[available(format)]], small(LAYERS[format])
            done[format] = model, export(model, format, tmp_path_factory.mktemp(format) / "out", inputs=examples)
        return done[format]

    return get


def batch(rows, length):
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(
    "format", [pytest.param(format, marks=[pytest.mark.thorough] * (format == "openvino")) for format in FORMATS]
)
def test_it_loads_without_us_and_computes_the_same(format, exported):
    """Also what an example of one row and one token was traced with takes others."""
    from transformers.exporters import ExportedModel

    model, made = exported(format)
    assert made.format == format and made.checked == FORMATS[format] and made.quantize is None
    assert 0 <= made.difference < 1e-4 and made.same_prediction == 1
    assert made.bytes_on_disk > 4 * sum(p.numel() for p in model.parameters()) * 0.9
    config = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if format == "openvino" else {}
    loaded = ExportedModel.from_pretrained(made.folder, **config)
    for rows, length in ((1, 1), (3, 12), (2, 31)):
        inputs = batch(rows, length)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs).logits[real]
        assert_close(torch.as_tensor(loaded(**inputs).logits)[real], expected, 1e-4, f"{rows} x {length}")


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("vit", "onnx"),
        pytest.param("llama", "onnx", marks=pytest.mark.thorough),
        pytest.param("t5", "onnx", marks=pytest.mark.thorough),
        pytest.param("t5", "torch", marks=pytest.mark.thorough),
    ],
)
def test_other_inputs_and_heads(family, format, tmp_path):
    sizes = {"num_layers": 1, "num_decoder_layers": 1} if family == "t5" else {"num_hidden_layers": 1}
    model = make_model(family, **sizes).eval()
    kept = getattr(model.config, "use_cache", None)
    made = export(model, available(format), tmp_path / family)
    assert made.difference < 1e-4 and len(made.checked) == 3
    assert getattr(model.config, "use_cache", None) == kept


def test_the_command_and_eight_bits_that_are_smaller_and_close(tmp_path):
    available("onnx")
    model = make_model("bert", num_hidden_layers=1).eval()
    model.save_pretrained(tmp_path / "model")
    done = cli("export", str(tmp_path / "model"), "--output-dir", str(tmp_path / "onnx"), "--json")
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    assert plain["difference"] < 1e-4 and plain["folder"] == str(tmp_path / "onnx")
    rounded = export(model, "onnx", tmp_path / "int8", inputs=[batch(2, 9)], quantize="int8")
    assert plain["difference"] < rounded.difference < 0.5
    assert rounded.bytes_on_disk < plain["bytes_on_disk"]


def test_onnx_runtime_keeps_its_fast_norms_and_moves_few_tensors(exported, tmp_path):
    """Its fused SkipLayerNormalization is slower than its parts; windows are cut without a change of layout."""
    available("onnx")
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        exported("onnx")[1].folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert found.count("LayerNormalization") == 5 and "SkipLayerNormalization" not in found
    assert found.count("Transpose") <= 2 * 5, "query, key, value, output; the key of the global tokens' scores"


def test_a_wrong_result_is_refused_and_leaves_nothing(exported, tmp_path, monkeypatch):
    from hf_efficient.runtimes.runtime import Runtime

    model, made = exported("torch")
    monkeypatch.setitem(formats.FORMATS, "torch", Copied(made.folder))
    assert export(model, "torch", tmp_path / "right", inputs=[batch(2, 9)]).difference < 1e-4
    right = Runtime.forward

    def wrong(self, **inputs):
        output = right(self, **inputs)
        output.logits = output.logits + 1
        return output

    monkeypatch.setattr(Runtime, "forward", wrong)
    with pytest.raises(UnsupportedModelError, match="computes another output"):
        export(model, "torch", tmp_path / "wrong", inputs=[batch(2, 9)])
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_a_runtime_is_called_as_its_model(exported):
    from hf_efficient.models.inputs import dummy_inputs
    from hf_efficient.runtimes.runtime import Runtime

    model, made = exported("onnx")
    twin, inputs = Runtime(model, "onnx", made.folder, threads=1), dummy_inputs(model, 2, 16)
    assert "token_type_ids" not in inputs and "token_type_ids" in twin.taken
    with torch.no_grad():
        assert_close(twin(**inputs).logits, model(**inputs).logits, 1e-4)


@pytest.mark.parametrize(
    ("format", "options", "error", "words"),
    [
        ("onxn", {}, ConfigError, "Did you mean 'onnx'"),
        ("onnx", {"quantize": "int4"}, ConfigError, "Known: auto, int8"),
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


def test_a_program_for_one_shape_is_refused(tmp_path, monkeypatch):
    from hf_efficient.runtimes import export as exporting

    available("torch")
    monkeypatch.setattr(exporting, "_free", lambda value: {})
    with pytest.raises(UnsupportedModelError, match="does not take"):
        export(make_model("bert", num_hidden_layers=1), "torch", tmp_path / "out", inputs=[batch(2, 9)])


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.thorough)])
def test_what_fixes_its_rows_is_refused_before_any_work(name, tmp_path, monkeypatch):
    available("torch")
    config = tiny_config(CONFIG_MAPPING[name]())
    model = tiny_model(config, AutoModelForImageTextToText._model_mapping[type(config)])
    monkeypatch.setattr(formats.Exporter, "write", lambda *given: pytest.fail("work was begun"))
    for again in range(2):
        if again:  # a recipe that ends with an export says it before the first stage
            monkeypatch.setattr(rows_of, "_problem", lambda model, inputs: "it counts")
        with pytest.raises(UnsupportedModelError, match="cannot be exported for any number of rows"):
            if again:
                run = SimpleNamespace(skeleton=lambda config: model)
                ExportStage(format="torch").check("stages[0]", run, config, ())
            else:
                export(model, "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_agreement_is_a_warning_or_what_was_asked_for(tmp_path, monkeypatch, caplog):
    from hf_efficient.runtimes import export as exporting

    assert exporting._fault("It", 0.3, 0.9, (0.3, 0.9), "int8", None) is None
    assert "same prediction" in caplog.text
    assert "min_agreement=0.95" in exporting._fault("It", 0.3, 0.9, (0.3, 0.9), "int8", 0.95)
    caplog.clear()
    assert exporting._fault("It", 0.3, 0.96, (0.3, 0.9), "int8", 0.95) is None and not caplog.text
    with pytest.raises(ConfigError, match="min_agreement"):
        export(make_model("bert"), "torch", tmp_path / "out", min_agreement=2)
