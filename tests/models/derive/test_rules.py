"""Rules by which models become tiny, are fed, watched and proven: one model, or one function, for each."""

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, BertConfig, BertModel
from transformers.models.d_fine.modeling_d_fine import DFineLQE
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from hf_efficient.errors import ConfigError
from hf_efficient.models.block import LIMITS, _check_limits
from hf_efficient.models.derive.entry import make_entry
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.observe import observing, run
from hf_efficient.models.derive.proof import prove
from hf_efficient.models.derive.tiny import first_tiny, tiny_config, tiny_model
from hf_efficient.models.derive.unseen import _names_softmax
from hf_efficient.models.registry import token_limit


def made(name):
    def make(small, whole):
        model = tiny_model(small)
        return model, tiny_inputs(model, whole)

    return first_tiny(CONFIG_MAPPING[name](), make)


def converted(name, *stacks):
    """Why some stacks of a tiny model cannot be converted: None each."""
    model, inputs = made(name)
    family = make_entry(model, inputs)
    wanted = tuple(stack for stack in family.stacks if stack.name in stacks or not stacks)
    assert wanted
    only = (replace(one.without("heads", "").without("neurons", "").without("layers", "")) for one in wanted)
    family = prove(replace(family, stacks=tuple(only)), model, inputs)
    return [stack.why_not("convert") for stack in family.stacks]


def test_the_few_layers_are_of_as_many_kinds_as_they_can_be():
    assert tiny_config(CONFIG_MAPPING["kimi_linear"]()).layer_types[-1] == "full_attention"  # behind two kinds of FFN
    assert tiny_config(CONFIG_MAPPING["mllama"]()).text_config.cross_attention_layers == [1]  # by their numbers
    jamba = tiny_config(CONFIG_MAPPING["jamba"]())
    assert jamba.attn_layer_offset < jamba.attn_layer_period <= jamba.num_hidden_layers
    assert tiny_config(CONFIG_MAPPING["laguna"]()).num_attention_heads_per_layer == [4, 4, 4]


def test_what_hides_keys_in_a_real_model_hides_none_from_a_tiny_text():
    assert tiny_config(CONFIG_MAPPING["inkling_text"]()).sliding_window_size > 500
    assert tiny_config(CONFIG_MAPPING["mimi"]()).sliding_window > 500  # 250


@pytest.mark.parametrize("name", ["hunyuan_vl_text", "t5gemma2_encoder", "muse_spark"])
def test_fields_that_only_an_error_names_get_a_number(name):
    """`self.head_dim**-0.5` of a None; a field that its config class lacks; widths of stages that are too wide."""
    model, _ = made(name)
    assert model.num_parameters() < 3e7


def test_a_softmax_over_classes_is_no_attention():
    assert not _names_softmax(DFineLQE) and _names_softmax(DeformableDetrMultiscaleDeformableAttention)


@pytest.mark.parametrize("name", ["vjepa2", "nemotron_asr_streaming_encoder", "udop", "time_series_transformer"])
def test_attention_that_reads_masks_and_biases_in_its_own_way_is_converted(name):
    """V-JEPA 2's code reads no mask, Nemotron's wants bools, the encoder of UDOP gets its bias from outside, and the
    decoder of a series has another length than its encoder."""
    assert not any(converted(name))


def test_what_shows_in_no_output_is_proven_inside():
    assert converted("blt", "patcher_layers") == [None]  # patches are chosen by its numbers


def test_without_a_mask_attention_hides_nothing_and_hidden_rows_are_zeros():
    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    model, ids = BertModel(config).eval(), torch.arange(5)[None]
    module = model.encoder.layer[0].attention.self
    module.is_causal = True  # which nothing of its eager attention reads
    with observing(model) as calls:
        run(model, {"input_ids": ids})
    assert not calls[0].is_causal and calls[0].output.abs().min() > 0

    def blind(module, mask, queries, keys):
        mask = torch.zeros(1, 1, queries, keys)
        mask[..., 2, :] = torch.finfo(torch.float32).min
        return mask

    with observing(model, blind) as calls:
        run(model, {"input_ids": ids})
    assert [bool(row.any()) for row in calls[0].output[0]] == [True, True, False, True, True]


def test_several_texts_and_lengths_that_are_no_integers():
    config = CONFIG_MAPPING["musicgen"]()
    assert token_limit(config) == config.decoder.max_position_embeddings
    _check_limits({"max_position_embeddings": 1200.0}, LIMITS)  # Music Flamingo
    with pytest.raises(ConfigError, match="max_position_embeddings=nan"):
        _check_limits({"max_position_embeddings": float("nan")}, LIMITS)


def test_layers_of_cross_attention_alone_stand_between_others():
    model, inputs = made("mllama")
    assert inputs["cross_attention_mask"].shape[1] == inputs["input_ids"].shape[1]
    text = make_entry(model, inputs).stacks[-1]
    assert text.attending == (0, 2) and text.cross_attention.module == "cross_attn"


def test_a_tower_reads_patches_as_its_images():
    config = tiny_config(CONFIG_MAPPING["depth_pro"]())
    assert config.patch_size == config.patch_model_config.image_size == 4 * config.patch_model_config.patch_size


def test_a_number_of_layers_may_be_made_of_a_list():
    family = make_entry(*made("nemotron_h"))
    assert family.stacks[0].num_layers == "num_hidden_layers" and family.why_not("convert") is None
    assert "no config field" in family.why_not("layers")


def test_a_tiny_config_is_fed_as_a_whole_again():
    """Made small once more, Phi-4's towers do not run."""
    model, _ = made("phi4_multimodal")

    def fed(small, whole):
        again = tiny_model(small)
        return set(tiny_inputs(again, whole))

    assert {"image_pixel_values", "audio_input_features"} <= first_tiny(model.config, fed)
