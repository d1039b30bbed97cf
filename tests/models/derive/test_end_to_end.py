"""Types outside of the table, from pruning to a student that was distilled, saved and loaded by its Auto class."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import DistillationArguments, DistillationTrainer, PruningConfig, prune
from hf_efficient.models.derive.tiny import tiny_config, tiny_model

from ...helpers import selected

BY_DATA = PruningConfig(ratio=0.2, granularity=("neuron",), importance="taylor", round_to=1)
TYPES = {  # a class with a head, and what leaves beside neurons
    "opt": ("OPTForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "gpt_neox": ("GPTNeoXForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "phi3": ("Phi3ForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "qwen2": ("Qwen2ForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "gemma2": ("Gemma2ForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "gpt_oss": ("GptOssForCausalLM", "AutoModelForCausalLM", ("head", "neuron")),
    "mpnet": ("MPNetForSequenceClassification", "AutoModelForSequenceClassification", ("neuron",)),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "AutoModelForSequenceClassification", ("neuron",)),
    "albert": ("AlbertForSequenceClassification", "AutoModelForSequenceClassification", ("head", "neuron")),
}
FAST = ("opt", "qwen3_moe", "deberta-v2")


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_pruned_distilled_saved_and_loaded(name, tmp_path):
    class_name, auto, granularity = TYPES[name]
    teacher = tiny_model(tiny_config(CONFIG_MAPPING[name]()), getattr(transformers, class_name))
    ids = torch.randint(3, 90, (8, 9))
    rows = [
        {"input_ids": row, "labels": row if auto.endswith("CausalLM") else torch.tensor(i % 2)}
        for i, row in enumerate(ids)
    ]
    batches = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}]
    student = prune(teacher, replace(BY_DATA, granularity=granularity, ratio=0.05), batches)
    arguments = DistillationArguments(
        str(tmp_path / "run"),
        losses={"kd": 1.0, "hidden": 0.1},
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    before = {key: value.clone() for key, value in student.state_dict().items()}
    DistillationTrainer(model=student, teacher=teacher, args=arguments, train_dataset=rows).train()
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    student.eval().save_pretrained(tmp_path / "model")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, student(input_ids=ids).logits)
    assert loaded.num_parameters() < teacher.num_parameters()
