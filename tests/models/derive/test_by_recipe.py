"""Types outside of the table by recipe: teacher, pruning, conversion, distillation, a report."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_efficient import Recipe, compress

from ...pipeline.test_tasks_end_to_end import model_folder

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
SIZES |= {"vocab_size": 35, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TRAINING = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
PRUNE = {"ratio": 0.2, "round_to": 1, "calibration_samples": 8}
LOCAL = {"attention": {"kind": "local", "window": 4, "global_tokens": 0}}
CASES = {
    "mpnet": ("text-classification", {}, [{"prune": PRUNE | {"granularity": ["layer", "neuron"]}}]),
    "qwen2": (
        "causal-lm",
        {"num_key_value_heads": 2},
        [LOCAL, {"prune": PRUNE | {"granularity": ["head", "neuron"]}}],
    ),
}


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize("name", [pytest.param("mpnet", marks=pytest.mark.thorough), "qwen2"])
def test_a_recipe_of_a_derived_type(name, tmp_path):
    task, fields, stages = CASES[name]
    rows = [{"text": " ".join(f"w{(n * k) % 30}" for k in range(1, 6)), "label": n % 2} for n in range(1, 31)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = model_folder(tmp_path / "tokenizer", "masked-lm")
    recipe = {
        "name": "derived",
        "task": task,
        "model": {"config": {"model_type": name} | SIZES | fields, "tokenizer": str(tokenizer)},
        "data": {"name_or_path": str(tmp_path / "rows.jsonl"), "max_length": 12},
        "teacher": TRAINING,
        "stages": [*stages, {"distill": TRAINING | {"losses": {"kd": 1.0, "ce": 0.5}}}],
        "measure": {"repeats": 2, "sequence_length": 12},
    }
    report = compress(Recipe.from_dict(recipe), output_dir=tmp_path / "out")
    assert report.comparison.mac_ratio < 0.9
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "out" / "model")
    assert type(loaded).__name__.startswith("Efficient") or name == "mpnet"
    with torch.no_grad():
        assert loaded(input_ids=torch.arange(4, 12)[None]).logits.isfinite().all()
