"""Weights of 8 and 4 bits (torchao) after pruning: layers of different sizes quantise, save and load as others do."""

import pytest
import torch
import transformers

from hf_efficient import PruningConfig, prune

torchao = pytest.importorskip("torchao.quantization")

CLASSES = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
BITS = {
    8: lambda: torchao.Int8WeightOnlyConfig(),
    4: lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
}
LARGEST = {8: 0.03, 4: 0.4}  # of the largest logit of these random weights


def make(case: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    if case == "bert":
        config = transformers.BertConfig(**sizes, vocab_size=60)
        return transformers.BertForSequenceClassification(config).eval()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60)
    ).eval()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CLASSES)
def test_a_pruned_model_can_be_quantized(case, bits, tmp_path):
    dense, ids = make(case), torch.randint(3, 60, (2, 9))
    small = prune(dense, PruningConfig(0.4, importance="random", round_to=32))  # groups of 32 inputs share a scale
    small.save_pretrained(tmp_path / "pruned")
    auto = getattr(transformers, CLASSES[case])
    quantization = transformers.TorchAoConfig(BITS[bits]())
    quantized = auto.from_pretrained(tmp_path / "pruned", quantization_config=quantization)
    assert type(quantized) is type(small) and quantized.config.efficient == small.config.efficient
    with torch.no_grad():
        exact, rounded = small(input_ids=ids).logits, quantized(input_ids=ids).logits
        error = (rounded - exact).abs().max() / exact.abs().max()
        assert 0 < error < LARGEST[bits]
        quantized.save_pretrained(tmp_path / "quantized")
        again = auto.from_pretrained(tmp_path / "quantized")
        assert torch.equal(again(input_ids=ids).logits, rounded)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("pruned", "quantized")]
    assert sizes[1] < 0.5 * sizes[0]
