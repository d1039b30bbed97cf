"""Efficient classes load stock checkpoints, and come back from disk bit for bit."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig

import hf_efficient.models
from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention, efficient_config
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.block import EfficientBlock, StackBlock
from hf_efficient.models.classes import auto_classes, block_of, efficient_class, with_block
from hf_efficient.models.families import FAMILIES
from hf_efficient.models.rebuild import is_portable, rebuild
from hf_efficient.models.saving import LOADER

from ..families import CASES, HEADS, config_class, make_inputs, make_model, one_layer

LOCAL = AttentionConfig(kind="local", window=2)
NOTHING_WRONG = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def pruned(name):
    """An efficient model with fewer heads and neurons than its stock config says, and a converted attention."""
    model = make_model(name)
    stacks = {}
    for stack in Anatomy.of(model).stacks:
        sizes = {"heads": (2, 2, 2), "neurons": (9, 5, 1)}
        sizes |= {"kv_heads": (1, 1, 1)} if stack.group_size > 1 else {}
        stacks[stack.name] = StackBlock(attention=(LOCAL, AttentionConfig(), LOCAL), sizes=sizes)
    config = with_block(model.config, EfficientBlock(stacks=stacks))
    return efficient_class(CASES[name].head, config_class(name))(config).eval()


@pytest.mark.parametrize(("name", "auto_name"), HEADS)
def test_every_head_loads_a_stock_checkpoint_and_round_trips(name, auto_name, tmp_path):
    auto, stock_class = auto_classes(config_class(name))[auto_name]
    stock = make_model(name, stock_class, **one_layer(name))
    stock.save_pretrained(tmp_path / "stock")
    config = efficient_config(tmp_path / "stock", attention=LOCAL)
    model, info = auto.from_pretrained(tmp_path / "stock", config=config, output_loading_info=True)
    assert {key: info[key] for key in NOTHING_WRONG} == NOTHING_WRONG
    assert type(model) is efficient_class(stock_class, config_class(name))

    inputs = make_inputs(name, CASES[name].paddings[0], stock)
    expected = outputs(model, inputs)
    assert not torch.allclose(expected, outputs(stock, inputs), atol=1e-5)

    model.save_pretrained(tmp_path / "saved")
    loaded, info = auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert {key: info[key] for key in NOTHING_WRONG} == NOTHING_WRONG
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, inputs), expected)


# Heads that no Auto class gives, or only one that is named in the config.
OTHER_HEADS = {
    transformers.DeiTForImageClassificationWithTeacher: "deit",
    transformers.CLIPTextModelWithProjection: "clip_text_model",
    transformers.CLIPVisionModelWithProjection: "clip_vision_model",
    transformers.GPT2DoubleHeadsModel: "gpt2",
}


@pytest.mark.parametrize(("head", "name"), OTHER_HEADS.items())
def test_heads_without_an_auto_class_have_an_efficient_class(head, name, tmp_path):
    stock, inputs = make_model(name, head), make_inputs(name)
    model = convert_attention(stock, LOCAL)
    assert type(model) is getattr(hf_efficient.models, f"Efficient{head.__name__}")
    expected = outputs(model, inputs)
    assert not torch.allclose(expected, outputs(stock, inputs), atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: info[key] for key in NOTHING_WRONG} == NOTHING_WRONG
    assert torch.equal(outputs(loaded, inputs), expected)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_the_config_says_which_of_two_classes_an_auto_class_gives(tmp_path):
    head = transformers.DeiTForImageClassificationWithTeacher
    stock, inputs = make_model("deit", head), make_inputs("deit")
    stock.save_pretrained(tmp_path / "stock")
    config = efficient_config(tmp_path / "stock", attention=LOCAL)
    auto = transformers.AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "stock", config=config)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForImageClassification"] == f"{LOADER}.Efficient{head.__name__}"
    for one in (model, auto.from_pretrained(tmp_path / "saved")):
        assert type(one) is efficient_class(head, config_class("deit"))
        assert torch.equal(outputs(one, inputs), outputs(convert_attention(stock, LOCAL), inputs))


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_and_converted_model_round_trips(name, tmp_path):
    model, inputs = pruned(name), make_inputs(name, CASES[name].paddings[0])
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, CASES[name].auto).from_pretrained(tmp_path)
    for parameter in loaded.parameters():  # the last bit of a sum may depend on where in memory a tensor begins
        parameter.data = parameter.data.clone()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert {key: value.shape for key, value in loaded.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert model.num_parameters() < make_model(name).num_parameters()


@pytest.mark.parametrize("name", CASES)
def test_saving_again_writes_the_same_files(name, tmp_path):
    auto = getattr(transformers, CASES[name].auto)
    pruned(name).save_pretrained(tmp_path / "0")
    for step in (0, 1):
        auto.from_pretrained(tmp_path / str(step)).save_pretrained(tmp_path / str(step + 1))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / str(step)).iterdir()} for step in range(3)]
    assert contents[1] == contents[0] and contents[2] == contents[0]
    assert f"{LOADER}.py" in contents[0]
    auto_map = json.loads(contents[0]["config.json"])["auto_map"]
    assert auto_map["AutoConfig"] == f"{LOADER}.Efficient{FAMILIES[name].config_name}"
    assert auto_map.keys() == {"AutoConfig", *auto_classes(config_class(name))}


@pytest.mark.parametrize("name", CASES)
def test_the_config_round_trips(name, tmp_path):
    config = pruned(name).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.block() == config.block() and not loaded.block().is_trivial()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.to_dict() == config.to_dict() and copied.block() == config.block()


@pytest.mark.parametrize("name", CASES)
def test_a_trivial_block_is_saved_as_a_stock_checkpoint(name, tmp_path):
    stock = make_model(name)
    stock.config.architectures = [type(stock).__name__]
    full = AttentionConfig(kind="full")
    efficient = with_block(stock.config, EfficientBlock({Anatomy.of(stock).stacks[0].name: StackBlock((full,) * 3)}))
    model = efficient_class(type(stock), config_class(name))(efficient)
    model.load_state_dict(stock.state_dict())
    assert is_portable(model) and not is_portable(convert_attention(stock, LOCAL))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == name and "efficient" not in saved and "auto_map" not in saved
    assert saved["architectures"] == [type(stock).__name__]
    assert not (tmp_path / f"{LOADER}.py").exists()
    loaded = type(stock).from_pretrained(tmp_path)
    inputs = make_inputs(name)
    assert torch.equal(outputs(loaded, inputs), outputs(stock, inputs))


@pytest.mark.parametrize("name", CASES)
def test_rebuild_of_a_trivial_block_gives_the_stock_class_with_its_own_memory(name):
    stock = make_model(name)
    made = rebuild(stock, with_block(stock.config, EfficientBlock()))
    assert type(made) is type(stock)
    for key, value in stock.state_dict().items():
        assert torch.equal(made.state_dict()[key], value)
        assert made.state_dict()[key].data_ptr() != value.data_ptr()


def test_kept_layers_survive_both_ways_of_saving(tmp_path):
    stock = make_model("bert")
    kept = {"encoder": (0, 2, 5)}
    portable = rebuild(stock, with_block(stock.config, EfficientBlock(kept_layers=kept)))
    portable.save_pretrained(tmp_path / "portable")
    converted = convert_attention(portable, LOCAL)
    converted.save_pretrained(tmp_path / "plugin")
    for folder, model_type in (("portable", "bert"), ("plugin", "efficient_bert")):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert config.model_type == model_type and block_of(config).kept_layers == kept


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tied])
def test_tied_weights_stay_tied(name, tmp_path):
    model = convert_attention(make_model(name, CASES[name].tied, tie_word_embeddings=True), LOCAL)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight


def test_untied_weights_stay_untied(tmp_path):
    model = convert_attention(make_model("llama", tie_word_embeddings=False), LOCAL)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_pushing_a_model_uploads_the_loader(tmp_path, monkeypatch):
    """`push_to_hub=True` uploads what was written after the save began; an older file would stay behind."""
    model, uploaded = convert_attention(make_model("bert"), LOCAL), []
    repository = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: repository)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))

    def upload(self, folder, repo_id, timestamps, **kwargs):
        uploaded.extend(path.name for path in folder.iterdir() if path.name not in timestamps)

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/something")
    assert {f"{LOADER}.py", "config.json", "model.safetensors"} <= set(uploaded)


def test_rebuild_keeps_the_precision_of_each_part_and_checkpointing():
    model = make_model("bert").bfloat16()
    model.classifier.float()
    model.bert.encoder.gradient_checkpointing = True
    made = convert_attention(model, LOCAL)
    assert any(getattr(module, "gradient_checkpointing", False) for module in made.modules())
    old = model.state_dict()
    for key, value in made.state_dict().items():
        assert value.dtype == old[key].dtype and torch.equal(value, old[key]), key


def test_models_inside_a_converted_one_do_not_lose_the_conversion(tmp_path):
    llama = convert_attention(make_model("llama"), LOCAL)
    with pytest.raises(UnsupportedModelError, match="cannot be set"):
        llama.model.set_attn_implementation("sdpa")
    llama.model.save_pretrained(tmp_path / "llama")
    inner = transformers.AutoModel.from_pretrained(tmp_path / "llama").eval()
    ids = make_inputs("llama")["input_ids"]
    assert torch.equal(inner(ids)[0], llama.model(ids)[0])
    clip = convert_attention(make_model("clip"), LOCAL)
    with pytest.raises(UnsupportedModelError, match="Save the whole model"):
        clip.text_model.save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()
