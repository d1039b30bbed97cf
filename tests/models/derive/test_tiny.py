"""Tiny configs and inputs, by kinds of rules: what hangs together in a config, and what a model asks for."""

import json
import time

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.coverage import _first_running, _running, read_configs, try_type
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.sizes import LAYERS, WAYS, Way, shrunk
from hf_efficient.models.derive.tiny import NotTinyError, first_tiny, tiny_config, tiny_model

PROPORTION = next(way for way in WAYS if way.in_proportion)


def config_of(model_type, **changes):
    return CONFIG_MAPPING[model_type](**changes)


def running(config):
    """A tiny model that runs, with its inputs, and the names of the ways that failed before."""
    tried = []

    def make(small, whole):
        tried.append(small)
        model = tiny_model(small)
        return model, tiny_inputs(model, whole)

    return *first_tiny(config, make), len(tried)


# Configs


def test_equations_of_sums_and_products_stay_true_in_proportion():
    small = tiny_config(config_of("mamba2"), PROPORTION)  # whose class checks it
    assert small.hidden_size * small.expand == small.num_heads * small.head_dim < 1024
    small = tiny_config(config_of("reformer"), PROPORTION)
    assert sum(small.axial_pos_embds_dim) == small.hidden_size
    small = tiny_config(LlamaConfig(hidden_size=96 * 8, num_attention_heads=12, num_key_value_heads=4), PROPORTION)
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (6, 2, 48)
    with pytest.raises(Exception, match="must equal"):
        tiny_config(config_of("mamba2"))


def test_the_few_layers_are_like_the_same_layers_in_all_lists():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = LlamaConfig(num_hidden_layers=12)
    config.layer_types, config.thetas = kinds * 2, [float(layer) for layer in range(12)]
    config.by_layer = {5: {"head_dim": 64, "kind": "a"}, 11: {"kind": "b"}}
    config.thetas[1:5] = [0.0] * 4
    config.thetas[6:11] = [0.0] * 5
    few = {name: shrunk_fields(config)[name] for name in ("layer_types", "thetas", "by_layer")}
    assert few["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert few["thetas"] == [0.0, 5.0, 11.0]
    assert few["by_layer"] == {1: {"head_dim": 8, "kind": "a"}, 2: {"kind": "b"}}
    assert shrunk_fields(config, Way(layers="first"))["layer_types"] == kinds[:LAYERS]


def shrunk_fields(config, way=WAYS[0]):
    class Own(type(config)):  # of a user: nothing in it is made anew
        pass

    Own.__module__ = "somewhere"
    config.__class__ = Own
    return shrunk(config, way)


def test_states_are_padded_to_little():
    assert tiny_config(config_of("mamba2"), PROPORTION).chunk_size == 8
    assert tiny_config(config_of("bamba"), PROPORTION).mamba_chunk_size == 8


def test_labels_are_no_layers():
    config = LlamaConfig(num_hidden_layers=12, num_labels=4)
    assert len(shrunk(config, WAYS[0])["id2label"]) == 4


def test_numbers_that_a_config_makes_of_others_are_made_anew():
    small = tiny_config(config_of("swin"))
    assert small.hidden_size == small.embed_dim * 2 ** (len(small.depths) - 1)
    small = tiny_config(config_of("bros"))
    assert small.dim_bbox_projection == small.hidden_size // small.num_attention_heads


def test_frequencies_are_as_many_as_a_small_head_rotates():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    for partial, way in ((1.0, WAYS[0]), (0.5, Way(wide=4)), (1.0, PROPORTION)):
        config = config_of("qwen2_vl").text_config
        config.rope_parameters = {**rope, "partial_rotary_factor": partial}
        small = tiny_config(config, way)
        half = small.hidden_size // small.num_attention_heads * partial / 2
        assert sum(small.rope_parameters["mrope_section"]) == half
    alike = {**rope, "mrope_section": [22, 22, 20]}
    config.rope_parameters = alike
    first, second, _ = tiny_config(config).rope_parameters["mrope_section"]
    assert first == second  # what was alike stays alike


def test_a_backbone_gives_as_many_maps_as_before():
    small = tiny_config(config_of("rt_detr"))
    assert len(small.backbone_config.out_indices) == len(config_of("rt_detr").backbone_config.out_indices) == 3


def test_what_an_error_names_stays_or_is_filled():
    model, inputs, tried = running(config_of("time_series_transformer"))  # says no prediction_length by default
    assert (model.config.prediction_length, model.config.context_length, tried) == (6, 4, 2)
    assert inputs["past_values"].shape[1] == model.config.context_length + max(model.config.lags_sequence)

    def make(small, whole):
        if small.intermediate_size != 11008:
            raise ValueError("intermediate_size must be 11008")
        return small

    small = first_tiny(LlamaConfig(), make)
    assert small.intermediate_size == 11008 and small.hidden_size == 32


def test_other_ways_follow_and_the_first_reason_is_said():
    ways = []

    def make(small, whole):
        ways.append(small.hidden_size)
        raise NotTinyError(f"reason {len(ways)}")

    with pytest.raises(NotTinyError, match="reason 1"):
        first_tiny(LlamaConfig(), make)
    assert len(ways) == len(WAYS) and len(set(ways)) > 2 and ways[-1] == LlamaConfig().hidden_size


# Inputs


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("siglip2_vision_model", {"pixel_values", "spatial_shapes", "pixel_attention_mask"}),  # patches and their grid
        ("parakeet_ctc", {"input_features"}),  # the frames first
        ("encodec", {"input_values"}),  # channels of a sound
        ("patchtst", {"past_values"}),
        ("decision_transformer", {"states", "actions", "returns_to_go", "timesteps"}),  # each asked for by an error
        ("bros", {"input_ids", "bbox"}),
        ("xmod", {"input_ids", "lang_ids"}),
        ("blip-2", {"pixel_values", "input_ids"}),  # image tokens that the config did not name
        ("idefics", {"pixel_values", "image_attention_mask"}),
        ("gemma3n_audio", {"audio_mel", "audio_mel_mask"}),
        ("fun_asr_nano_encoder", {"input_features", "input_features_mask"}),  # as wide as an error says
    ],
)
def test_a_model_is_fed_what_it_takes(name, wanted):
    model, inputs, _ = running(config_of(name))
    assert wanted <= inputs.keys()
    with torch.no_grad():
        model(**inputs)


class Reader(PreTrainedModel):
    """Frames or patches of 24 numbers, in an order that no name says."""

    config_class = PreTrainedConfig
    main_input_name = "input_features"

    def __init__(self, config):
        super().__init__(config)
        self.reader = nn.Linear(24, 4)

    def forward(self, input_features, weights_mask=None, **kwargs):
        return (self.reader(input_features),)


def test_the_first_reader_says_how_wide_an_input_is():
    inputs = tiny_inputs(Reader(PreTrainedConfig()))
    assert inputs["input_features"].shape == (2, 64, 24)


class Unwilling(Reader):
    def forward(self, input_features=None, **kwargs):
        raise ValueError("no")


def test_what_cannot_be_fed_is_said():
    with pytest.raises(NotTinyError, match="No inputs could be made for a tiny Unwilling: no"):
        tiny_inputs(Unwilling(PreTrainedConfig()))


@pytest.mark.parametrize("name", ["layoutlmv3", "mamba2", "swinv2"])
def test_a_tiny_copy_is_the_same_again_and_made_soon(name):
    config = config_of(name)
    start = time.process_time()
    first, inputs, _ = running(config)
    assert time.process_time() - start < 3
    second, again, _ = running(config)
    assert first.config.to_json_string() == second.config.to_json_string()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[key], again[key]) for key in inputs)


# benchmarks/coverage.py --configs


def test_given_configs_are_read(tmp_path):
    path = tmp_path / "configs.jsonl"
    lines = [{"model_type": "bert", "config": {"vocab_size": 9}, "models": []}, {"model_type": "bert", "config": {}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_configs(path) == {"bert": {"config": {"vocab_size": 9}, "inputs": {}}}
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit, match=r"line 1: an object with model_type and config is wanted"):
        read_configs(path)


def test_a_type_is_tried_with_a_given_config_where_its_own_does_not_build():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    given = {"config": {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}}
    alone, both = try_type("cohere_compass_text"), try_type("cohere_compass_text", given)
    assert "model" in alone["why"] and alone["config"] == "default"
    assert "model" not in both["why"] and both["config"] == "given"
    assert try_type("gpt2", {"config": {"n_layer": 0}})["config"] == "default"  # its own is enough


def test_given_inputs_are_taken_where_none_can_be_made(monkeypatch):
    def none(model, whole):
        raise NotTinyError("none")

    monkeypatch.setattr("benchmarks.coverage.tiny_inputs", none)
    ids = {"shape": [2, 5], "dtype": "int64", "min": 1, "max": 8}
    mask = {"shape": [2, 5], "dtype": "int64", "values": [[1] * 5, [1] * 3 + [0] * 2]}
    config = config_of("bert", hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=40)
    with pytest.raises(NotTinyError):
        _running(config, {"Other": {"input_ids": ids}})
    model, inputs = _running(config, {"BertModel": {"input_ids": ids, "attention_mask": mask, "return_loss": True}})
    assert model.config.hidden_size == 32 and inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].min() >= 1 and inputs["input_ids"].max() <= 8
    assert inputs["attention_mask"].tolist() == mask["values"]


@pytest.mark.parametrize("name", ["segformer", "regnet"])
def test_convolutions_leave_more_than_one_token_of_an_image(name):
    model = tiny_model(tiny_config(config_of(name)))
    with torch.no_grad():
        states = model(**tiny_inputs(model)).last_hidden_state
    assert states.shape[2:] == (2, 2)  # of one token alone no attention would show


def test_a_default_config_without_attention_gives_way_to_a_given_one_with_some():
    fields = {"num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "hidden_size": 32}
    given = {"config": fields | {"attn_layer_indices": [1]}, "inputs": {}}
    assert _first_running("bamba", given)[2] == "given"  # all layers of the default config are Mamba's
    assert _first_running("bamba", {"config": fields, "inputs": {}})[2] == "default"
    assert _first_running("bert", {"config": {}, "inputs": {}})[2] == "default"
