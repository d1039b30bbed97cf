"""Tiny models are fed with all that they take, so that all their towers are found and proven."""

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig

from hf_efficient.models.derive.compare import outputs_of
from hf_efficient.models.derive.entry import make_entry
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.observe import LayerRun
from hf_efficient.models.derive.proof import prove
from hf_efficient.models.derive.tiny import MAX_PARTLY, PartlyFedError, first_tiny, tiny_config, tiny_model


def made(name):
    def make(small, whole):
        model = tiny_model(small)
        return model, tiny_inputs(model, whole)

    return first_tiny(CONFIG_MAPPING[name](), make)


def test_a_way_that_feeds_the_whole_model_is_looked_for_and_else_the_first_is_taken():
    widths, wholes = [], []

    def make(small, whole):
        widths.append(small.hidden_size)
        wholes.append(whole)
        if whole and len(widths) < first:
            raise PartlyFedError("without images")
        return small

    first = 3
    assert first_tiny(LlamaConfig(), make).hidden_size == widths[2] and wholes == [True] * 3
    widths, wholes, first = [], [], 100
    assert first_tiny(LlamaConfig(), make).hidden_size == widths[0]
    assert wholes == [True] * MAX_PARTLY + [True, False]  # and as it is, for it may be small already


# What they are fed with, and a tower that then runs: each by another rule.
TOWERS = {
    "llava_next": "vision_tower.encoder.layers",  # tiles
    "aria": "vision_tower.encoder.layers",  # a dict by numbers of patches
    "mllama": "vision_model.transformer.layers",  # tiles with their aspect ratios
    "granite_docling": "vision_model.encoder.layers",  # a mask of images
    "minicpmv4_6": "vision_tower.encoder.layers",  # patches side by side in one image
    "kimi_k25": "vision_tower.layers",  # unfolded patches
    "paddleocr_vl": "visual.vision_model.encoder.layers",
    "lfm2_vl": "vision_tower.encoder.layers",  # flat patches of each image
    "llama4": "vision_model.model.layers",  # widths that depend on a ratio
    "muse_glimmer": "vision_tower.layers",  # a width that is a multiple
    "molmo2": "vision_tower.layers",  # tokens made of chosen patches
    "video_llava": "video_tower.encoder.layers",
    "kosmos-2.5": "vision_model.encoder.layer",
    "evolla": "protein_encoder.model.encoder.layer",
    "audioflamingo3": "audio_tower.layers",
    "glmasr": "audio_tower.layers",  # in proportion
    "fun_asr_nano": "audio_tower.layers",  # fewer frames
    "dots3_note": "audio_tower.layers",  # lengths of sounds
    "qwen3_asr": "audio_tower.layers",  # frames of whole windows
    "qwen2_audio": "audio_tower.layers",  # as many tokens as an error says
    "granite_speech": "encoder.layers",
    "phi4_multimodal": "embed_tokens_extend.audio_embed.encoder.encoders",
}


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_runs(name):
    model, inputs = made(name)
    layer = model.get_submodule(TOWERS[name])[0]
    assert LayerRun(model, layer, inputs).states.isfinite().all()
    assert "input_ids" in inputs and all(value.isfinite().all() for value in outputs_of(model, inputs).values())


def test_a_linear_for_relative_positions_loses_its_part_of_a_head():
    model, inputs = made("parakeet_encoder")
    family = prove(make_entry(model, inputs), model, inputs)
    assert not family.why_not("heads") and not family.why_not("convert")
    assert "relative_k_proj.weight" in family.stacks[0].attention.per_head


def test_cross_attention_in_some_layers_stays_and_a_scale_that_is_not_given_is_the_usual_one():
    querying = make_entry(*made("blip-2")).stacks[1]
    assert querying.cross_attention is None and "some of its layers" in querying.why_not("heads")
    assert querying.why_not("convert") is None
    assert [stack.name for stack in make_entry(*made("llama4")).stacks] == ["vision", "text"]


def test_a_number_of_layers_may_have_the_name_of_their_list():
    stacks = make_entry(*made("videoprism")).stacks
    assert {"num_spatial_layers", "num_temporal_layers", "num_auxiliary_layers"} < {one.num_layers for one in stacks}


def test_tokens_differ_behind_convolutions_and_behind_gates():
    model = tiny_model(tiny_config(CONFIG_MAPPING["parakeet_encoder"]()))
    seen = LayerRun(model, model.layers[0], tiny_inputs(model)).states
    assert seen[0].std(0).mean() > 0.1
    gates = [one for name, one in made("evolla")[0].named_parameters() if name.endswith("gate_attention")]
    assert gates and all(torch.equal(one, torch.full_like(one, 0.7)) for one in gates)
