"""Weights of 8 and 4 bits: saved, reloaded to the same output, and counted as what they take."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_efficient import ConfigError, PruningConfig, UnsupportedModelError, export, measure, prune, quantize
from hf_efficient.runtimes import quantization as module

pytest.importorskip("torchao")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 60,
}
LARGEST = {"int8_dynamic": 0.05, "int8": 0.03, "int4": 0.6}  # of the largest logit of random weights


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("method", module.METHODS)
def test_it_reloads_to_the_same_output(method, tmp_path):
    torch.manual_seed(0)
    for model, auto in (
        (
            prune(bert(), PruningConfig(0.2, granularity="neuron", importance="random", round_to=32)),
            AutoModelForSequenceClassification,
        ),
        (LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), AutoModelForCausalLM),
    ):
        ids, before = torch.randint(3, 60, (2, 9)), {k: v.clone() for k, v in model.state_dict().items()}
        small = quantize(model, method)
        assert type(small) is type(model) and not small.training
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        with torch.no_grad():
            exact, rounded = model(input_ids=ids).logits, small(input_ids=ids).logits
            assert 0 < (rounded - exact).abs().max() / exact.abs().max() < LARGEST[method]
            folder = tmp_path / type(model).__name__
            small.save_pretrained(folder)
            assert torch.equal(auto.from_pretrained(folder)(input_ids=ids).logits, rounded)


@pytest.mark.parametrize("method", module.METHODS)
def test_it_is_counted_as_what_it_takes(method):
    model = bert()
    dense, small = (
        measure(model, sequence_length=16, repeats=2),
        measure(quantize(model, method), sequence_length=16, repeats=2),
    )
    assert small.size.parameters == dense.size.parameters and small.size.macs == dense.size.macs
    linears = sum(m.weight.numel() for m in model.bert.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert small.size.weight_bytes < dense.size.weight_bytes - 2.5 * linears
    assert small.size.nonzero_parameters <= dense.size.nonzero_parameters


def test_wrong_settings_are_named(monkeypatch):
    model = bert()
    with pytest.raises(ConfigError, match="Did you mean 'int8'"):
        quantize(model, "int9")
    with pytest.raises(ConfigError, match=r"group_size=48 does not divide the 64 inputs of bert.encoder.layer.0"):
        quantize(model, "int4", group_size=48)
    small = quantize(model, "int8")
    with pytest.raises(UnsupportedModelError, match="The model is quantised"):
        quantize(small)
    with pytest.raises(UnsupportedModelError, match="The model is quantised"):
        export(small, "torch", "unused")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hf-efficient\[quant\]"):
        quantize(model)
