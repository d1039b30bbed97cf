"""Llamas as GGUF files: what is written is what transformers and llama.cpp read, pruned to unequal layers too."""

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer, MistralConfig, Qwen2Config, Qwen3Config

from hf_efficient import AttentionConfig, ConfigError, PruningConfig, convert_attention, export, prune
from hf_efficient.errors import UnsupportedModelError
from hf_efficient.models.loading import load_model, load_processor
from hf_efficient.runtimes.gguf import check_gguf, sizes_of, split_of, write_gguf

from ..families import make_model
from ..gguf_files import TEMPLATE, WORDS, make_llama, make_tokenizer, tensors_of
from ..gguf_files import write_gguf as write_by_hand

ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def uneven(seed=0):
    model = make_llama(seed)
    ids = torch.randint(3, 280, (4, 16))
    pruning = PruningConfig(ratio=0.4, granularity=("head", "neuron"), round_to=8, reconstruct=False)
    small = prune(model, pruning, [{"input_ids": ids, "labels": ids}])
    assert not sizes_of(small).are_equal
    return small


def tensors_in(path):
    import gguf

    reader = gguf.GGUFReader(path)
    return {tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}


@pytest.mark.parametrize("tied", [True, False])
def test_as_an_independent_writer_writes_it(tied, tmp_path):
    model = make_llama(tie_word_embeddings=tied)
    write_gguf(model, chat_tokenizer(), tmp_path / "ours.gguf")
    theirs = write_by_hand(tmp_path / "theirs.gguf", model, chat_tokenizer())
    ours = tensors_in(tmp_path / "ours.gguf")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_there_and_back(tmp_path):
    model = make_llama()
    write_gguf(model, chat_tokenizer(), tmp_path / "tiny.gguf")
    back, tokenizer = (
        load_model("AutoModelForCausalLM", tmp_path / "tiny.gguf"),
        load_processor(tmp_path / "tiny.gguf"),
    )
    ids = torch.arange(3, 30)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert (
        tokenizer(WORDS)["input_ids"] == make_tokenizer()(WORDS)["input_ids"] and tokenizer.chat_template == TEMPLATE
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_weights_of_8_bits_are_near(tmp_path):
    model = make_llama()
    write_gguf(model, chat_tokenizer(), tmp_path / "tiny.gguf", "int8")
    plain = tensors_of(model)
    for name, weight in tensors_in(tmp_path / "tiny.gguf").items():
        error = np.abs(weight - plain[name]).max()
        assert error < 0.01 * np.abs(plain[name]).max(), name
        assert (error > 0) == (weight.ndim == 2), name
    assert (tmp_path / "tiny.gguf").stat().st_size < 0.5 * 4 * model.num_parameters()


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 128}),  # transformers reads no other from a file
        (MistralConfig, {"sliding_window": None}),
    ],
)
def test_other_decoders_come_back_as_they_were(config_class, changes, tmp_path):
    from transformers import AutoModelForCausalLM

    llama = make_llama().config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    sizes = {name: getattr(llama, name) for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **changes)).eval()
    write_gguf(model, chat_tokenizer(), tmp_path / "tiny.gguf")
    ids = torch.arange(3, 30)[None]
    back = load_model("AutoModelForCausalLM", tmp_path / "tiny.gguf")
    assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-5)


def test_layers_of_unequal_sizes_have_their_numbers(tmp_path):
    import gguf

    small = uneven()
    assert check_gguf(small) == "deci" and check_gguf(make_llama()) == "llama"
    write_gguf(small, chat_tokenizer(), tmp_path / "tiny.gguf")
    fields, sizes = gguf.GGUFReader(tmp_path / "tiny.gguf").fields, sizes_of(small)
    assert fields["deci.attention.head_count"].contents() == sizes.heads
    assert fields["deci.attention.head_count_kv"].contents() == sizes.kv_heads
    assert fields["deci.feed_forward_length"].contents() == sizes.neurons
    tensors = tensors_in(tmp_path / "tiny.gguf")
    assert [tensors[f"blk.{layer}.ffn_up.weight"].shape[0] for layer in range(2)] == sizes.neurons


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    local = convert_attention(make_llama(), AttentionConfig("local", window=4))
    for model, words in (
        (make_model("bert"), "llama, mistral, qwen2, qwen3"),
        (local, "local"),
        (make_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            write_gguf(model, chat_tokenizer(), tmp_path / "a.gguf")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.*convert_hf_to_gguf"):
        write_gguf(make_llama(), AutoTokenizer.from_pretrained(bert_tokenizer(tmp_path)), tmp_path / "a.gguf")


def bert_tokenizer(folder):
    from ..pipeline.tiny import make_bert

    return make_bert(folder / "bert")


def test_how_texts_are_cut_is_named():
    from tokenizers import pre_tokenizers as pre

    tokenizer = make_tokenizer()
    assert split_of(tokenizer) == "gpt-2"
    byte_level = pre.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    assert split_of(tokenizer) == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Punctuation(), byte_level])
    with pytest.raises(UnsupportedModelError):
        split_of(tokenizer)


def test_the_tokenizer_must_be_given(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_efficient.runtimes.export.check_runtime", lambda _: None)
    with pytest.raises(ConfigError, match="holds the tokenizer"):
        export(make_llama(), "gguf", tmp_path / "out")


def test_without_a_package_that_carries_llama_cpp_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_efficient.runtimes.llamacpp.BINDINGS", {"no_llama": "no-llama"})
    with pytest.raises(ConfigError, match=r"needs no_llama\. Run `pip install \"hf-efficient\[llamacpp\]\"`"):
        export(make_llama(), "gguf", tmp_path / "out", tokenizer=chat_tokenizer())
    assert not (tmp_path / "out").exists()
