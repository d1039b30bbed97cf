"""The vocabulary of a folder leaves as that of a model in memory does."""

import pytest
import torch

from hf_efficient import ConfigError, prune_vocabulary
from hf_efficient.models.loading import load_model, load_processor
from tests.families import VOCABULARY, make_model

from ..cut.test_vocabulary import with_vocabulary
from ..tiny_tokenizers import TEXTS, tokenizer_of


@pytest.mark.parametrize(
    ("name", "tokenizer"), [("llama", "llama"), ("roberta", "roberta"), ("gpt2", "gpt2"), ("t5", "t5")]
)
def test_a_folder_gives_what_the_model_in_memory_gives(name, tokenizer, tmp_path):
    words = tokenizer_of(tokenizer)
    model = with_vocabulary(name, words)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    words.save_pretrained(tmp_path / "dense")
    expected, short = prune_vocabulary(model, words, TEXTS[:3])
    folder, also = prune_vocabulary(tmp_path / "dense", words, TEXTS[:3], output_dir=tmp_path / "small")
    result = load_model(type(expected), folder)
    assert also.get_vocab() == short.get_vocab() == load_processor(folder).get_vocab()
    assert len(short) < len(words) and result.num_parameters() < model.num_parameters()
    state = result.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    fields, others = expected.config.to_dict(), result.config.to_dict()
    assert {key for key in fields if fields[key] != others.get(key)} <= {"_name_or_path"}
    if model.can_generate():
        assert result.generation_config.eos_token_id == expected.generation_config.eos_token_id


def test_calls_that_make_no_sense(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "dense")
    words = tokenizer_of("llama")
    assert len(words) != VOCABULARY
    with pytest.raises(ConfigError, match="output_dir"):
        prune_vocabulary(tmp_path / "dense", words, TEXTS[:3])
    with pytest.raises(ConfigError, match="save_pretrained"):
        prune_vocabulary(model, words, TEXTS[:3], output_dir=tmp_path / "small")
    with pytest.raises(ConfigError, match="embeddings"):
        prune_vocabulary(tmp_path / "dense", words, TEXTS[:3], output_dir=tmp_path / "small")
    assert not (tmp_path / "small").exists()
