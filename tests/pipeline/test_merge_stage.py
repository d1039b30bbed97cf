"""The stage `merge_kv_heads` of a recipe: planned, run, and refused where it cannot be."""

import json

import pytest
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_efficient import ConfigError, Recipe, UnsupportedModelError, compress, load_report
from hf_efficient.pipeline.compress import plan_recipe

pytestmark = pytest.mark.usefixtures("quick_end")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A Llama with as many key/value heads as query heads, a GPT-2, and texts."""
    folder = tmp_path_factory.mktemp("material")
    lines = [" ".join(f"word{(i * j) % 7}" for j in range(30)) for i in range(40)]
    (folder / "rows.txt").write_text("\n".join(lines))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=280, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=4)),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer))
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def recipe(material, *stages, name="llama"):
    return Recipe.from_dict(
        {
            "name": "merged",
            "task": "causal-lm",
            "model": {"name_or_path": str(material / name)},
            "data": {"name_or_path": str(material / "rows.txt"), "max_length": 32},
            "stages": list(stages),
            "measure": {"sequence_length": 16, "repeats": 2, "batch_size": 1},
        }
    )


def test_the_plan_says_what_becomes_of_the_cache(material):
    merge, prune = {"merge_kv_heads": {"kv_heads": 1}}, {"prune": {"ratio": 0.3, "granularity": ["neuron"]}}
    merged, pruned = (plan.forecast for plan in plan_recipe(recipe(material, merge, prune)))
    assert merged.cache_bytes_before == 4 * merged.cache_bytes == 4 * pruned.cache_bytes_before
    assert merged.loads_with == "portable" and merged.length == 32 and merged.parameters == pruned.parameters_before


def test_the_result_is_a_stock_model_and_distilled(material, tmp_path):
    stages = {"merge_kv_heads": {"kv_heads": 2, "calibration_samples": 4}}, {"distill": {"max_steps": 2}}
    compress(recipe(material, *stages), output_dir=tmp_path / "out")
    [stage] = [one for one in load_report(tmp_path / "out/model").stages if one.name == "merge_kv_heads"]
    assert stage.facts["kv_heads"] == 2 and stage.facts["loads_with"] == "portable"
    assert stage.facts["parameters_after"] < stage.facts["parameters_before"]
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["num_key_value_heads"] == 2 and config["num_attention_heads"] == 4 and "efficient" not in config
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")) is LlamaForCausalLM


@pytest.mark.parametrize(
    ("name", "kv_heads", "error", "words"),
    [
        ("llama", 3, ConfigError, r"Give one of \[1, 2\]"),
        ("gpt2", 1, UnsupportedModelError, "no field for a number of key/value heads"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(material, tmp_path, name, kv_heads, error, words):
    asked = recipe(material, {"merge_kv_heads": {"kv_heads": kv_heads}}, name=name)
    with pytest.raises(error, match=words):
        compress(asked, output_dir=tmp_path / "out")
