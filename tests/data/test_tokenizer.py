"""Fresh models that read text: their tokenizer, learned from the training texts or given, and a config that fits."""

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, T5Config

from hf_efficient import ConfigError, DataError, Recipe, compress
from hf_efficient.data.tokenizer import token_fields, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "caf\u00e9 \U0001f600"] * 5


def test_it_spells_everything_and_closes_where_asked():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300 and len(tokenizer("the cat")["input_ids"]) < len(b"the cat")
    for text in ["\u4f60\u597d, unseen \U0001f680", TEXTS[2]]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    closed = train_tokenizer(TEXTS, 300, close=True)
    assert closed("the cat")["input_ids"] == [*tokenizer("the cat")["input_ids"], closed.eos_token_id]
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DataError, match="texts are empty"):
        train_tokenizer(["", ""], 300)


@pytest.mark.parametrize("size", [259, 1 << 40, True, "300"])
def test_a_size_out_of_range(size):
    with pytest.raises(ConfigError, match="size of a tokenizer must be an integer from 260"):
        train_tokenizer(TEXTS, size)


def test_a_config_learns_of_its_tokenizer():
    tokenizer = train_tokenizer(TEXTS, 300)
    fields = token_fields(tokenizer, LlamaConfig)
    assert fields == {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    assert token_fields(tokenizer, T5Config) == fields | {"decoder_start_token_id": 0}


LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize(
    ("task", "model", "columns"),
    [
        ("causal-lm", {"config": LLAMA, "tokenizer_size": 300}, {"text_column": "text"}),
        ("seq2seq", {"config": T5, "tokenizer_size": 300}, {"text_column": "text", "target_column": "title"}),
        ("causal-lm", {"config": LLAMA, "tokenizer": "bundled:minilm-l6"}, {"text_column": "text"}),
    ],
)
def test_a_recipe_trains_a_fresh_text_model(task, model, columns, tmp_path):
    rows = "\n".join(f"{text},title {index}" for index, text in enumerate(TEXTS))
    (tmp_path / "rows.csv").write_text(f"text,title\n{rows}\n")
    recipe = Recipe.from_dict(
        {
            "name": "fresh",
            "task": task,
            "model": model,
            "data": {"name_or_path": str(tmp_path / "rows.csv"), "max_length": 8} | columns,
            "teacher": {"max_steps": 2, "batch_size": 2},
            "stages": [{"prune": {"ratio": 0.05, "granularity": ["neuron"], "importance": "magnitude"}}],
            "measure": {"sequence_length": 8, "repeats": 2},
        }
    )
    report = compress(recipe, output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    tokenizer, config = AutoTokenizer.from_pretrained(result), AutoConfig.from_pretrained(result)
    assert report.student.quality.main.name == "perplexity" and report.student.quality.main.value > 1
    assert len(tokenizer) == config.vocab_size and (len(tokenizer) <= 300) == ("tokenizer_size" in model)


def test_a_missing_file_is_told_before_anything_is_made(tmp_path):
    recipe = Recipe.from_yaml("reviews").with_overrides({"data.name_or_path": str(tmp_path / "none.csv")})
    (tmp_path / "nine.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"No such data file.*Did you mean 'nine\.csv'"):
        compress(recipe, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "0-teacher").exists()
