"""A converted model leaves Python: torch.export and ONNX with any batch and length, equal to PyTorch."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efficient import PruningConfig, convert_attention, prune

from ..attention.tiny import TINY
from ..families import CAUSAL, TWO_STACKS, VOCABULARY, make_inputs, make_model
from ..helpers import assert_close, selected
from ..pruning.forms import FORMS, form_inputs, make_form

SHAPES = [(1, 1), (2, 9), (1, 31), (3, 20), (2, 64), (2, 70), (1, 150)]  # fewer and more than one block
JOBS = [("bert", name) for name in TINY] + [(family, "local") for family in ("llama", "gpt2", "t5", "bart")]
JOBS += [("llama", name) for name in ("linear-elu", "local_linear", "additive", "strided")]
CHOSEN = ("linear-elu", "additive")  # each kind's own tests export it too, and those of the runtimes BERT
SOME_BUILDS = ("bert", "llama", "t5", "clip")


def make(family, name):
    sizes = {
        "t5": {"num_layers": 1, "num_decoder_layers": 1},
        "bart": {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 160},
        "gpt2": {"n_layer": 1, "n_positions": 160},
    }
    fields = sizes.get(family, {"num_hidden_layers": 1, "max_position_embeddings": 160})
    model = convert_attention(make_model(family, **fields), TINY[name])
    model.config.use_cache = False
    return model


def text(family, batch, length):
    """Rows with some padding on the left of the first."""
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, : length // 3] = 0
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, max(length // 2, 1)))
    return inputs


def any_length(inputs):
    auto = torch.export.Dim.AUTO
    return {key: {0: auto, 1: auto} for key in inputs}


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "name"), JOBS)
def test_onnx_runs_with_any_length(family, name):
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model, example = make(family, name), text(family, 2, 16)
    config = OnnxConfig(dynamic=True, dynamic_shapes=any_length(example))
    exported = OnnxExporter().export(model, example, config=config)
    for batch, length in SHAPES:
        inputs = text(family, batch, length)
        out = torch.as_tensor(exported(**inputs).logits)
        with torch.no_grad():
            expected = model(**inputs).logits
        real = torch.ones(expected.shape[:2], dtype=torch.bool)
        if real.shape == inputs["input_ids"].shape and "decoder_input_ids" not in inputs:
            real = inputs["attention_mask"].bool()
        assert_close(out[real], expected[real], 1e-4, f"{batch} x {length}")


@pytest.mark.parametrize(("name",), selected([(name,) for name in TINY], lambda name: name in CHOSEN))
def test_torch_export_takes_any_length(name):
    model, example = make("bert", name), text("bert", 2, 16)
    program = torch.export.export(model, (), example, dynamic_shapes=any_length(example), strict=False)
    for batch, length in SHAPES:
        inputs = text("bert", batch, length)
        real = inputs["attention_mask"].bool()
        assert_close(program.module()(**inputs).logits[real], model(**inputs).logits[real], 1e-5)


def test_images_export():
    model, example = convert_attention(make_model("vit"), TINY["linear-elu"]), make_inputs("vit")
    program = torch.export.export(model, (), example, dynamic_shapes={"pixel_values": {0: torch.export.Dim.AUTO}})
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    assert_close(program.module()(**inputs).logits, model(**inputs).logits, 1e-5)


@pytest.mark.parametrize(("form",), selected([(form,) for form in FORMS], lambda form: form in SOME_BUILDS))
def test_a_pruned_model_exports(form):
    """Another number of heads and neurons in each layer, which the program must not take from the config."""
    model, inputs = make_form(form), form_inputs(form, side=None)
    inputs.pop("attention_mask", None)
    if FORMS[form][0] in (*CAUSAL, *TWO_STACKS):
        inputs["use_cache"] = False
    small = prune(model, PruningConfig(ratio=0.5, importance="random"))
    program = torch.export.export(small, (), inputs, strict=False)
    with torch.no_grad():
        assert_close(program.module()(**inputs)[0], small(**inputs)[0], 1e-5)


def test_a_converted_model_is_not_quadratic():
    """No tensor of a local model has two dimensions as long as the text."""
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    model = BertForSequenceClassification(config)
    assert longest_products(model) > 997**2 > 10 * longest_products(convert_attention(model, TINY["local"]))


def longest_products(model):
    """The most numbers in one tensor of a forward over 997 tokens, embeddings apart."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not isinstance(args[0], torch.nn.Parameter):
                sizes.append(out.numel())
            return out

    model = model.eval()
    if model.config.model_type == "bert":
        model.set_attn_implementation("eager")
    with torch.no_grad(), Watch():
        model(input_ids=torch.ones(1, 997, dtype=torch.long))
    return max(sizes)
