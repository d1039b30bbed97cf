"""A model that transformers loaded from a GGUF file and unpacked holds floats, whatever it is marked as.

The marks are what `from_pretrained(..., gguf_file=...)` leaves on a model of an architecture that its new reader does
not know: the quantizer, its config and method, and a note on every config. No file is read here.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments
from transformers.quantizers.base import _assign_is_quantized
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from hf_efficient import (
    AttentionConfig,
    DistillationArguments,
    DistillationTrainer,
    PruningConfig,
    convert_attention,
    plan,
    prune,
)
from hf_efficient.distillation.student import build_student
from hf_efficient.errors import UnsupportedModelError
from hf_efficient.models.checks import is_quantized, take_floats
from hf_efficient.runtimes.export import export
from hf_efficient.runtimes.quantization import quantize
from tests.pruning.tiny import batches, make


def from_gguf(case: str = "llama"):
    model = make(case)
    config = GgufConfig(gguf_file="model.gguf")
    quantizer = GgufHfQuantizer(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    _assign_is_quantized(model)
    return model


def test_transformers_takes_it_for_quantised(tmp_path):
    """Or there is nothing to mend any more."""
    with pytest.raises(ValueError, match="not serializable"):
        from_gguf().save_pretrained(tmp_path)


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, own) for (name, value), (other, own) in pairs)


PRUNING = PruningConfig(ratio=0.4, importance="magnitude", round_to=4)
WORK = {
    "prune": lambda model: prune(model, PRUNING),
    "zeros": lambda model: prune(model, PruningConfig(granularity="weight", importance="magnitude")),
    "convert": lambda model: convert_attention(model, AttentionConfig(kind="local", window=4)),
    "student": lambda model: build_student(model, layers=2),
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_made_of_it_is_as_from_any_other(name, tmp_path):
    made = WORK[name](from_gguf())
    assert same(made, WORK[name](make("llama")))
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, made) and not is_quantized(loaded)


def test_a_plan_a_copy_of_8_bits_and_the_model_itself(tmp_path):
    model = from_gguf()
    assert plan(model, PRUNING).units == plan(make("llama"), PRUNING).units
    pytest.importorskip("torchao")
    assert is_quantized(quantize(from_gguf(), "int8"))
    take_floats(model)
    model.save_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), make("llama"))


def test_it_is_exported(tmp_path):
    made = export(from_gguf(), "torch", tmp_path / "made")
    assert made.difference < 1e-3


def test_it_can_be_a_student(tmp_path):
    rows = [{name: value[0] for name, value in one.items()} for one in batches("llama", 2)]
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    with pytest.raises(ValueError, match="quantized"):  # what transformers says of it
        Trainer(from_gguf(), TrainingArguments(str(tmp_path), **options))
    arguments = DistillationArguments(str(tmp_path), losses={"kd": 1.0}, **options)
    trainer = DistillationTrainer(from_gguf(), arguments, teacher=make("llama", seed=1), train_dataset=rows)
    trainer.train()
    assert not same(trainer.model, make("llama"))


def test_blocks_of_a_file_are_no_floats():
    model = from_gguf()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros(32, 54, dtype=torch.uint8), requires_grad=False)
    for work in (WORK["prune"], WORK["convert"]):
        with pytest.raises(UnsupportedModelError, match=r"quantised.*dequantize=True"):
            work(model)
    assert is_quantized(model)


def test_other_quantised_models_stay_refused():
    model = make("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        prune(model, PRUNING)
    assert is_quantized(model)
