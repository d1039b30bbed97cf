"""Fresh models of absurd configs: one message, at once, and no memory."""

import copy

import pytest

from hf_efficient import ConfigError, Recipe
from hf_efficient.pipeline.compress import check
from hf_efficient.pipeline.fresh import MAX_MODULES, fresh_config
from hf_efficient.pipeline.run import Run

from .tiny import TINY

HUGE = 10**9


def checked(tmp_path, fields, keep=True):
    recipe = copy.deepcopy(TINY) | {"stages": []}
    recipe["model"]["config"] = (recipe["model"]["config"] if keep else {}) | fields
    check(Run(Recipe.from_dict(recipe), tmp_path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "swin", "depths": [1, HUGE]}, "depths"),
        ({"model_type": "swin", "depths": [1] * 5000}, "depths"),
        ({"model_type": "convnext", "num_stages": HUGE}, "num_stages"),
        ({"model_type": "beit", "num_hidden_layers": HUGE}, "num_hidden_layers"),
        ({"model_type": "resnet", "hidden_sizes": [HUGE, 8]}, "hidden_sizes"),
        ({"model_type": "qwen2_moe", "num_experts": HUGE}, "num_experts"),
        ({"model_type": "blip", "vision_config": {"num_hidden_layers": HUGE}}, "vision_config.num_hidden_layers"),
        ({"model_type": "beit", "layer_scale_init_value": 1e300}, "layer_scale_init_value"),
    ],
)
def test_numbers_of_models_outside_the_table_are_bounded(fields, words):
    with pytest.raises(ConfigError, match=rf"model\.config\.{words} .*accepts up to"):
        fresh_config(fields)


def test_what_real_models_have_is_not_refused():
    for fields in (
        {"model_type": "qwen2", "max_position_embeddings": 1 << 23, "vocab_size": 151936},
        {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 262144, "num_hidden_layers": 4},
        {"model_type": "beit", "layer_norm_eps": 1e-12, "num_hidden_layers": 1000},
    ):
        assert fresh_config(fields).model_type == fields["model_type"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch_size": 16}, "cannot read its inputs"),
        ({"attention_probs_dropout_prob": 1.5}, "attention_probs_dropout_prob is a prob"),
        ({"hidden_dropout_prob": -0.5}, "from 0 to 1"),
        ({"hidden_act": "swoosh"}, "cannot be built.*swoosh"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ],
)
def test_values_that_the_classes_of_transformers_do_not_take(fields, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        checked(tmp_path, fields)
    checked(tmp_path, {})


def test_more_modules_than_any_model_has(tmp_path, monkeypatch):
    from torch.nn.modules import module

    monkeypatch.setattr("hf_efficient.pipeline.fresh.MAX_MODULES", 20)
    before = len(module._global_module_registration_hooks)
    with pytest.raises(ConfigError, match="more than 20 modules"):
        checked(tmp_path, {})
    assert len(module._global_module_registration_hooks) == before and MAX_MODULES > 20_000


def test_more_weights_than_this_machine_holds(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"weights alone would take .* GB"):
        checked(tmp_path, {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 4})
    monkeypatch.setattr("hf_efficient.pipeline.fresh._memory", lambda: 10_000.0)
    with pytest.raises(ConfigError, match="Lower the sizes"):
        checked(tmp_path, {})
