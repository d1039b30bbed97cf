"""Eight bits: found on the rows that are given, where they do no harm, and refused where something is missing."""

import pytest
import torch

from hf_efficient import ConfigError, export
from hf_efficient.runtimes import formats
from hf_efficient.runtimes.formats import FORMATS, check_format
from hf_efficient.runtimes.rounding import AUTO, QUANTIZE
from hf_efficient.runtimes.runtime import Runtime

from ..families import VOCABULARY, make_model


def rows(seed, count=6, low=3, high=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(low, high, (1, 9), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model("bert", num_hidden_layers=1).eval()


@pytest.fixture(scope="module")
def static(model, tmp_path_factory):
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    made = []
    for seed, calibration in enumerate((rows(1), rows(2, low=3, high=6))):
        folder = tmp_path_factory.mktemp("static") / str(seed)
        made.append(export(model, "onnx", folder, inputs=rows(7), quantize="int8_static", calibration=calibration))
    return made


def test_ranges_are_those_of_the_rows_that_were_given(model, static):
    usual, other = (Runtime(model, "onnx", made.folder, threads=1) for made in static)
    with torch.no_grad():
        for batch in rows(8):
            expected = model(**batch).logits
            differences = [(program(**batch).logits - expected).abs().max().item() for program in (usual, other)]
            assert 0 < differences[0] < 0.5 * expected.abs().max() and differences[0] != differences[1]


def test_weights_have_a_scale_for_each_channel_and_attention_stays_in_floats(model, static):
    import onnx

    graph = onnx.load(static[0].folder / "model.onnx").graph
    sizes = {each.name: list(each.dims) for each in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    rounded = [
        node
        for node in products
        if all(made_by.get(i) and made_by[i].op_type == "DequantizeLinear" for i in node.input[:2])
    ]
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert len(rounded) >= linears - 1 and len(products) > len(rounded), "those of queries and keys have no weights"
    scales = [sizes.get(made_by[node.input[1]].input[1]) for node in rounded]
    assert all(size and size[0] > 1 for size in scales)
    floats = [node for node in products if node not in rounded]
    assert len(floats) == 2 and all(node.op_type == "MatMul" for node in floats)
    weights = [each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2]
    assert (
        weights
        and max(abs(int(onnx.numpy_helper.to_array(each, str(static[0].folder)).min())) for each in weights) <= 64
    )


@pytest.mark.parametrize(
    ("format", "quantize", "words"),
    [
        ("onnx", "int8_accurate", "format 'onnx' has no quantize 'int8_accurate', only int8, int8_static, auto"),
        ("torch", "int8", "not quantised here, only onnx, openvino, gguf"),
        ("onnx", "int9", "Did you mean 'int8'"),
    ],
)
def test_what_a_format_does_not_have_is_said(format, quantize, words):
    with pytest.raises(ConfigError, match=words):
        check_format(format, quantize)


def test_a_decoder_with_a_cache_has_dynamic_ranges_alone():
    check_format("onnx", "int8", cache=True)
    for quantize in ("int8_static", AUTO):
        with pytest.raises(ConfigError, match="with a cache is quantised by 'int8' alone"):
            check_format("onnx", quantize, cache=True)


def test_what_is_missing_is_said_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_efficient.runtimes.export.check_runtime", lambda _: None)
    with pytest.raises(ConfigError, match=r"finds the ranges of activations.*calibration=\[batch, ...\]"):
        export(model, "onnx", tmp_path / "out", quantize="int8_static")
    with pytest.raises(ConfigError, match=r"recipe's task.*name one of int8, int8_static"):
        export(model, "onnx", tmp_path / "out", quantize=AUTO)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs nncf. Run `pip install "hf-efficient\[openvino\]"`'):
        export(model, "openvino", tmp_path / "out", quantize="int8", calibration=rows(1))
    assert not (tmp_path / "out").exists()


def test_every_way_is_of_some_format():
    assert {way for format in FORMATS.values() for way in format.quantizes} == set(QUANTIZE) - {AUTO}
    assert all(set(format.calibrated) <= set(format.quantizes) for format in FORMATS.values())


@pytest.mark.thorough
def test_openvino_by_nncf_and_with_layers_put_back(tmp_path):
    """One channel of the norms is far larger than the others: decisions hang on what 8 bits leave of those."""
    for package in ("openvino", "nncf"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = make_model("bert", num_hidden_layers=1, num_labels=5).eval()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[3] = 300.0
        model.classifier.weight.normal_(0, 1)
        model.classifier.weight[:, 3] = 0
    given, same = rows(1, 40), {}
    for quantize in ("int8", "int8_accurate"):
        made = export(model, "openvino", tmp_path / quantize, inputs=given, quantize=quantize, calibration=given)
        same[quantize] = made.same_prediction
        assert made.quantize == quantize and made.difference > 0
    assert same["int8"] <= same["int8_accurate"] and same["int8_accurate"] >= 0.99
