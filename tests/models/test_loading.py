"""What strangers saved: weights that are not those of the model are never filled up in silence."""

import json
import logging
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, MarianMTModel

from hf_efficient import AttentionConfig, PruningConfig, convert_attention, prune
from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.models.classes import auto_classes
from hf_efficient.models.loading import auto_class_of, load_model, load_processor
from hf_efficient.runtimes.quantization import quantize
from tests.families import CASES, config_class, make_config, make_inputs, make_model, one_layer

CLASSIFIER = "AutoModelForSequenceClassification"


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def bert(kind=BertForSequenceClassification, **fields):
    return kind(make_config("bert") if not fields else BertConfig.from_dict(make_config("bert").to_dict() | fields))


def change(folder, work):
    path = folder / "model.safetensors"
    state = load_file(path)
    work(state)
    save_file(state, path, {"format": "pt"})


def drop(folder, part):
    change(folder, lambda state: [state.pop(key) for key in list(state) if part in key])


@pytest.mark.parametrize("name", CASES)
def test_what_a_stock_class_saves_loads_with_it_as_it_was(name, tmp_path):
    config = make_config(name)
    for auto, (_, stock) in auto_classes(config_class(config.model_type)).items():
        model = stock(make_config(name, **one_layer(name))).eval()
        folder = saved(model, tmp_path / auto)
        loaded = load_model(auto, folder)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["roberta", "vit", "llama", "marian", "whisper", "modernbert"])
def test_a_head_comes_off_and_a_new_one_on_where_it_is_asked_for(name, tmp_path, caplog):
    case = CASES[name]
    body = saved(make_model(name), tmp_path / "head")
    assert load_model("AutoModel", body)
    base = transformers.AutoModel.from_config(make_config(name))
    folder = saved(base, tmp_path / "base")
    has_new = name not in ("marian", "whisper")  # their output is tied to the embeddings: nothing of it is new
    if has_new:
        with pytest.raises(CheckpointError, match="has no head of the kind"):
            load_model(case.auto, folder)
    with caplog.at_level(logging.WARNING):
        model = load_model(case.auto, folder, new_head=True)
    assert ("New in" in caplog.text) == has_new
    kept = {key.removeprefix(f"{model.base_model_prefix}."): value for key, value in model.state_dict().items()}
    same = [torch.equal(value, kept[key]) for key, value in base.state_dict().items() if key in kept]
    assert all(same) and len(same) > 10


@pytest.mark.parametrize("part", ["encoder.layer.1.", "word_embeddings", "layer.2.output.dense.bias", "pooler"])
@pytest.mark.parametrize("new_head", [False, True])
def test_a_lost_part_of_the_body_is_an_error_with_a_new_head_too(part, new_head, tmp_path):
    folder = saved(bert(), tmp_path)
    drop(folder, part)
    with pytest.raises(CheckpointError, match="lacks"):
        load_model(CLASSIFIER, folder, new_head=new_head)


def test_a_body_under_other_names_is_an_error(tmp_path):
    """transformers calls the body of this one class `transformer`: all of it would be random."""
    folder = saved(make_model("llama"), tmp_path)
    with pytest.raises(CheckpointError, match="lacks 29 weights"):
        load_model("AutoModelForQuestionAnswering", folder, new_head=True)


def test_a_pooler_is_new_only_where_the_saved_class_had_none(tmp_path, caplog):
    folder = saved(bert(BertForMaskedLM), tmp_path / "language")
    with caplog.at_level(logging.WARNING):
        load_model("AutoModel", folder)
    assert "pooler" in caplog.text
    load_model(CLASSIFIER, folder, new_head=True)
    folder = saved(bert(BertModel), tmp_path / "body")
    drop(folder, "pooler")
    with pytest.raises(CheckpointError, match="pooler"):
        load_model("AutoModel", folder)


def test_a_head_of_another_number_of_labels_only_where_it_is_trained(tmp_path):
    folder = saved(bert(), tmp_path)
    labels = {"num_labels": 5}
    with pytest.raises(CheckpointError, match=r"classifier.weight \(\[2, 16\], not \[5, 16\]\)"):
        load_model(CLASSIFIER, folder, **labels)
    assert load_model(CLASSIFIER, folder, new_head=True, **labels).num_labels == 5
    change(folder, lambda state: state.update({"bert.pooler.dense.bias": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match="another shape"):
        load_model(CLASSIFIER, folder, new_head=True, **labels)


def test_what_belongs_to_the_body_and_has_no_place_is_an_error(tmp_path):
    adapter = "bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    for place, extra in enumerate([adapter, "bert.encoder.layer.7.output.dense.bias", "bert.embeddings.more.weight"]):
        folder = saved(bert(), tmp_path / str(place))
        change(folder, lambda state, extra=extra: state.update({extra: torch.zeros(4, 4)}))
        with pytest.raises(CheckpointError, match="no place"):
            load_model(CLASSIFIER, folder)
    folder = saved(bert(num_hidden_layers=3), tmp_path / "layers")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(CheckpointError, match="no place"):
        load_model(CLASSIFIER, folder)


def test_other_heads_and_tables_that_are_computed_today_may_be_left_over(tmp_path):
    folder = saved(bert(), tmp_path)
    more = {"bert.embeddings.position_ids": torch.arange(32)[None], "cls.seq_relationship.weight": torch.zeros(2, 16)}
    change(folder, lambda state: state.update(more))
    assert load_model(CLASSIFIER, folder)


@pytest.mark.parametrize("name", ["bert", "llama", "marian"])
def test_results_of_ours_load_whole_and_are_refused_in_part(name, tmp_path):
    inputs = [make_inputs(name)]
    converted = convert_attention(make_model(name), AttentionConfig("linear", feature_map="hedgehog"))
    config = PruningConfig(ratio=0.2, granularity=("neuron",), round_to=4, allocation="global")
    for place, model in enumerate([converted, prune(make_model(name), config, inputs)]):
        folder = saved(model, tmp_path / str(place), max_shard_size="8KB")
        assert (folder / "model.safetensors.index.json").is_file()
        loaded = load_model(auto_class_of(folder), folder)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    folder = saved(converted, tmp_path / "whole")
    drop(folder, "efficient_attention")
    with pytest.raises(CheckpointError, match="efficient_attention"):
        load_model(auto_class_of(folder), folder)


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
def test_quantised_results_load(method, tmp_path):
    model = bert(hidden_size=32, intermediate_size=64)
    small = quantize(model, method)
    loaded = load_model(CLASSIFIER, saved(small, tmp_path))
    inputs = make_inputs("bert")
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, loaded(**inputs).logits)


def test_the_class_is_that_of_the_config_by_its_exact_name(tmp_path):
    for place, (kind, auto) in enumerate(
        {
            MarianMTModel: "AutoModelForSeq2SeqLM",
            transformers.T5EncoderModel: "AutoModelForTextEncoding",
            transformers.WhisperForConditionalGeneration: "AutoModelForSpeechSeq2Seq",
            BertModel: "AutoModel",
        }.items()
    ):
        name = next(name for name in CASES if kind.__name__.startswith({"bert": "Bert"}.get(name, name.title())))
        folder = saved(kind(make_config(name)), tmp_path / str(place))
        assert auto_class_of(folder) == auto
        assert type(load_model(auto, folder)) is kind
    folder = saved(transformers.GPT2DoubleHeadsModel(make_config("gpt2")), tmp_path / "two")
    with pytest.raises(CheckpointError, match="GPT2DoubleHeadsModel"):
        auto_class_of(folder)


def rewritten(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": "32"},
        {"num_attention_heads": None},
        {"type_vocab_size": -2},
        {"max_position_embeddings": 10**12},
        {"vocab_size": 10**9},
        {"hidden_size": 10**40},
        {"num_hidden_layers": 5000},
        {"num_hidden_layers": -3},
        {"num_labels": 10**10, "id2label": None},
        {"label2id": ["a"]},
        {"architectures": "BertForSequenceClassification"},
        {"architectures": [["BertModel"]]},
        {"model_type": {}},
        {"model_type": True},
        {"dtype": "complex7"},
        {"quantization_config": {"quant_method": "own"}},
        {"pad_token_id": 51},
        {"initializer_range": []},
        {"transformers_weights": "../model.safetensors"},
        {"transformers_weights": 5},
    ],
    ids=str,
)
def test_an_impossible_config_is_one_message(fields, tmp_path):
    folder = rewritten(saved(bert(), tmp_path), **fields)
    with pytest.raises((CheckpointError, ConfigError)):
        load_model(CLASSIFIER, folder)


@pytest.mark.parametrize("content", ["", "7", '"bert"', "[" * 9000, "{]", "\ufeff{}", "\ud800"], ids=ascii)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_object_is_named(name, content, tmp_path):
    folder = saved(bert(), tmp_path)
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=name):
        load_processor(folder, images=False) if name.startswith("tok") else load_model(CLASSIFIER, folder)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/tmp/out.safetensors", "sub/out.safetensors", "..", "x.bin", 7]
)
def test_an_index_names_files_beside_it_only(name, tmp_path):
    folder = saved(bert(), tmp_path / "one", max_shard_size="8KB")
    (tmp_path / "out.safetensors").write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["classifier.bias"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="same folder"):
        load_model(CLASSIFIER, folder)


def test_links_may_lead_within_the_folder_to_the_hub_cache_or_be_the_folder(tmp_path):
    folder = saved(bert(), tmp_path / "models--me--one" / "snapshots" / "1a2b")
    blobs = tmp_path / "models--me--one" / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "5e6f")
    (folder / "model.safetensors").symlink_to("../../blobs/5e6f")
    (tmp_path / "link").symlink_to(folder)
    assert load_model(CLASSIFIER, folder) and load_model(CLASSIFIER, tmp_path / "link")
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("config.json", "model.safetensors"):
        other = saved(bert(), tmp_path / f"with {name}")
        (other / name).rename(outside / name)
        (other / name).symlink_to(outside / name)
        with pytest.raises(CheckpointError, match="outside of the folder"):
            load_model(CLASSIFIER, other)


@pytest.mark.parametrize("length", [1 << 63, 10**9, 1, 90_000_000])
def test_the_header_of_weights_is_bounded_by_its_file(length, tmp_path):
    folder = saved(bert(), tmp_path)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":1}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(CLASSIFIER, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(value, tmp_path):
    folder = saved(bert(), tmp_path)
    change(folder, lambda state: state["bert.encoder.layer.1.output.dense.bias"][3:4].fill_(value))
    with pytest.raises(CheckpointError, match=r"layer\.1\.output\.dense\.bias"):
        load_model(CLASSIFIER, folder)


def test_integers_are_no_weights(tmp_path):
    folder = saved(bert(), tmp_path)
    change(folder, lambda state: state.update({"classifier.bias": torch.ones(2, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match="I32"):
        load_model(CLASSIFIER, folder)


def test_pickles_and_adapters_are_refused_with_advice(tmp_path):
    folder = saved(bert(), tmp_path / "one")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_model(CLASSIFIER, folder)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match="adapter of 'elsewhere'"):
        load_model(CLASSIFIER, tmp_path / "two")


@pytest.mark.parametrize("layers", [[0, 0, 1], [2, 1, 0], [0, 1, 4096]])
def test_kept_layers_are_layers_of_the_original(layers, tmp_path):
    folder = saved(convert_attention(bert(), AttentionConfig("local", window=4)), tmp_path)
    block = json.loads((folder / "config.json").read_text())["efficient"] | {"kept_layers": {"encoder": layers}}
    with pytest.raises(ConfigError, match=r"rising|integers from 0 to 1023"):
        load_model(CLASSIFIER, rewritten(folder, efficient=block))


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (AttentionConfig("linear", feature_map="favor", feature_dim=8, seed=3), "projection"),
        (AttentionConfig("lsh", block_size=4, num_hashes=2), "rotations"),
    ],
    ids=["favor", "lsh"],
)
def test_what_is_drawn_from_the_seed_need_not_be_in_the_file(config, lost, tmp_path):
    model = convert_attention(make_model("bert"), config)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.endswith(lost)}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again = load_model(auto_class_of(tmp_path), tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_what_is_learned_must_be_in_the_file(tmp_path):
    convert_attention(make_model("bert"), AttentionConfig("kernel", feature_dim=4)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.endswith("log_width")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="log_width"):
        load_model(auto_class_of(tmp_path), tmp_path)
