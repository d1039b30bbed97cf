"""The stages of a recipe: what each reads, what it refuses and how."""

import pytest
import yaml

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.errors import ConfigError
from hf_efficient.recipes.recipe import STAGES, Recipe
from hf_efficient.stages.attention import LongerSettings, TransferSettings

from .base import BASE, changed, refused


def attention(settings_of):
    """The attention stage of BASE with other settings, and that it survives being written."""
    recipe = Recipe.from_dict(changed(["stages", 0, "attention"], settings_of))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    return recipe.stages[0].settings


FULL_ATTENTION, LOCAL = AttentionConfig(), AttentionConfig(kind="local", window=4)


LOCAL_YAML = {"kind": "local", "window": 4}


def test_attention_in_some_layers_and_by_layer():
    some = attention(LOCAL_YAML | {"layers": [3, 1]})
    assert some.layers == (1, 3) and some.config == LOCAL
    assert attention(LOCAL_YAML | {"layers": "3::4"}).layers == "3::4"
    by_layer = attention({"layers": {0: {"kind": "full"}, "2-4": LOCAL_YAML, "all": {"kind": "linear"}}})
    assert by_layer.config == {"0": FULL_ATTENTION, "2-4": LOCAL, "all": AttentionConfig("linear")}
    assert by_layer.layers is None


def test_the_windows_of_the_model_itself():
    stage = attention({"kind": "native"})
    assert stage.config == "native" and stage.to_dict() == {"kind": "native"}
    assert attention({"kind": "native", "positions": 2048}).longer.positions == 2048
    for beside in ({"window": 4}, {"layers": [1]}):
        message = refused(changed(["stages", 0, "attention"], {"kind": "native"} | beside))
        assert f"{next(iter(beside))} beside kind native" in message


def test_attention_by_stack():
    stacks = {"encoder": LOCAL_YAML, "decoder": {"all": LOCAL_YAML, "0": {}}, "cross_attention": {"kind": "linear"}}
    stage = attention({"layers": stacks})
    by_layer = {"all": LOCAL, "0": FULL_ATTENTION}
    assert stage.config == {"encoder": LOCAL, "decoder": by_layer, "cross_attention": AttentionConfig("linear")}


def test_attention_stages_are_what_mixing_spreads():
    """What a stage reads goes to `convert_attention` as it is."""
    from hf_efficient.conversion.mixing import spread

    stage = attention({"layers": {"all": LOCAL_YAML, "1::2": {"kind": "full"}, 3: {"kind": "linear"}}})
    found = spread(stage.config, {"encoder": 5}, {})["encoder"]["attention"]
    assert [found[layer].kind for layer in range(5)] == ["local", "full", "local", "linear", "local"]


@pytest.mark.parametrize("key", ["a", "-1", "1-", "0-999999999", "²", "", "1:2:0"])
def test_layer_patterns_refused(key):
    for settings_of in ({"layers": {key: {"kind": "full"}}}, LOCAL_YAML | {"layers": key}):
        message = refused(changed(["stages", 0, "attention"], settings_of))
        assert "stages[0].attention.layers" in message and "names no layers" in message


@pytest.mark.parametrize("key", ["4-2", "5:5", "99999"])
def test_layers_that_no_model_has_are_refused(key):
    message = refused(changed(["stages", 0, "attention"], {"layers": {key: {"kind": "full"}}}))
    assert f"stages[0].attention.layers: Layer {key!r} does not exist" in message


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"0-2": {}, "1-4": {}}, "Layer 1 is given twice"),
        ({"encoder": {}, "decodr": {}}, "Did you mean 'decoder'"),
        ({"encoder": {"0": {"kind": "locla"}}}, r"layers\.encoder\.0: .*Did you mean 'local'"),
        ({"encoder": {"first": {}}}, r"layers\.encoder: 'first' names no layers"),
        ({"decoder": 3}, r"layers\.decoder must be a mapping"),
        ({"all": {}, "decoder": {}}, "Layer 'all' cannot stand beside the names of stacks"),
        ({"encoder": {"windw": 3}}, "Did you mean 'window'"),
        ({}, "is empty"),
    ],
)
def test_mixing_refused(layers, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(changed(["stages", 0, "attention"], {"layers": layers}))


def test_longer_inputs_and_transfer():
    stage = attention(LOCAL_YAML | {"positions": 2048, "transfer": {"max_steps": 50}})
    assert stage.longer == LongerSettings(positions=2048) and stage.longer.position_method == "tile"
    assert stage.transfer == TransferSettings(max_steps=50) and stage.transfer.learning_rate == 1e-2
    other = attention({"positions": 64, "position_method": "interpolate", "layers": {"1-2": LOCAL_YAML}})
    assert other.longer.position_method == "interpolate" and other.transfer is None
    assert attention({"positions": 64, "rope": "yarn"}).longer.rope == "yarn"
    assert set(attention(LOCAL_YAML).to_dict()) == {"kind", "window"}  # only what was asked for


def test_transfer_settings_can_be_overridden():
    recipe = Recipe.from_dict(BASE).with_overrides({"attention.transfer.max_steps": "50"})
    assert recipe.stages[0].settings.transfer == TransferSettings(max_steps=50)
    again = recipe.with_overrides({"attention.transfer.learning_rate": 0.1, "attention.positions": "1024"})
    assert again.stages[0].settings.transfer == TransferSettings(max_steps=50, learning_rate=0.1)
    assert again.stages[0].settings.longer.positions == 1024
    assert again.with_overrides({"attention.transfer": "null"}).stages[0].settings.transfer is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"positions": 1}, r"stages\[0\]\.attention\.positions must be an integer from 2"),
        ({"positions": "2048"}, "got '2048'"),
        (
            {"positions": 64, "position_method": "tiel"},
            r"position_method must be one of tile, interpolate, got 'tiel'",
        ),
        ({"positions": 64, "rope": "ntk"}, r"rope must be one of linear, dynamic, yarn, or null, got 'ntk'"),
        ({"rope": "yarn"}, r"attention\.positions must say how many tokens"),
        ({"position_method": "interpolate"}, "positions must say"),
        ({"transfer": True}, r"stages\[0\]\.attention\.transfer must be a mapping"),
        ({"transfer": {"epohcs": 1}}, r"attention\.transfer\.epohcs: unknown key\. Did you mean 'epochs'"),
        ({"transfer": {"max_steps": 0}}, r"attention\.transfer\.max_steps must be an integer from 1"),
        ({"transfer": {"losses": {"kd": 1}}}, "unknown key"),
        ({"positons": 64}, "Did you mean 'positions'"),
        ({"decoder": {"window": 3}}, r"stages\[0\]\.attention: decoder must stand under `layers`"),
        ({"kind": ["local"]}, "Unknown attention kind"),
    ],
)
def test_longer_inputs_and_transfer_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(changed(["stages", 0, "attention"], LOCAL_YAML | settings))


def test_every_stage_reads_its_defaults():
    for name, kind in STAGES.items():
        stage = kind.read({"kind": "local"} if name == "attention" else {}, f"stages[0].{name}")
        assert isinstance(stage, kind) and kind.read(stage.to_dict(), name) == stage


def test_an_attention_stage_says_what_it_does():
    with pytest.raises(ConfigError, match=r"stages\[0\]\.attention is empty: give a kind"):
        Recipe.from_dict(changed(["stages", 0, "attention"], {}))


def test_a_pattern_of_zeros_says_the_ratio(tmp_path):
    text = Recipe.from_dict(
        BASE | {"stages": [{"prune": {"granularity": ["weight"], "mask_structure": "1:4"}}]}
    ).to_yaml()
    (tmp_path / "zeros.yaml").write_text(text.replace("'1:4'", "1:4"))  # YAML 1.1 would read minutes
    recipe = Recipe.from_yaml(tmp_path / "zeros.yaml")
    assert recipe.stages[0].settings.config.ratio == 0.75
    other = recipe.with_overrides({"prune.mask_structure": "2:4"})
    assert other.stages[0].settings.config.ratio == 0.5 and other.stages[0].settings.config.structure == (2, 4)


def test_distillation_takes_the_options_of_its_arguments():
    plain = Recipe.from_dict(BASE | {"stages": [{"distill": {}}]})
    assert not {"divergence", "layer_map", "prune"} & plain.to_dict()["stages"][0]["distill"].keys()
    asked = {"divergence": "jsd", "jsd_beta": 0.3, "layer_map": [[1, 2]], "temperature_final": 1.0, "pooling": "cls"}
    recipe = Recipe.from_dict(BASE | {"stages": [{"distill": asked}]})
    assert recipe.stages[0].settings.options == asked
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.fingerprint() != plain.fingerprint()
    other = recipe.with_overrides({"distill.divergence": "reverse", "distill.layer_map": "last"})
    assert other.stages[0].settings.options == asked | {"divergence": "reverse", "layer_map": "last"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("divergence", "revers", "Did you mean 'reverse'"),
        ("jsd_beta", 1.0, "between 0 and 1"),
        ("jsd_beta", "half", "jsd_beta: "),
        ("layer_map", "lastt", "Unknown layer_map"),
        ("relation_heads", 0, "1 or more"),
        ("temperature_final", -1, "above 0"),
    ],
)
def test_a_wrong_option_of_distillation_is_named(name, value, said):
    with pytest.raises(ConfigError, match=rf"stages\[0\]\.distill\.{name}: .*{said}" if ":" not in said else name):
        Recipe.from_dict(BASE | {"stages": [{"distill": {name: value}}]})


def test_distillation_may_prune():
    asked = {"ratio": 0.4, "granularity": ["weight"], "importance": "movement", "start": 0.1, "every": 3}
    recipe = Recipe.from_dict(BASE | {"stages": [{"distill": {"prune": asked}}]})
    gradual = recipe.stages[0].settings.prune
    assert gradual.config.importance == "movement" and gradual.config.ratio == 0.4
    assert (gradual.start, gradual.end, gradual.every) == (0.1, 0.7, 3)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    other = recipe.with_overrides({"distill.prune.ratio": 0.6, "distill.prune.every": 5})
    assert other.stages[0].settings.prune.config.ratio == 0.6 and other.stages[0].settings.prune.every == 5
    pattern = recipe.with_overrides({"distill.prune": "{granularity: weight, mask_structure: '1:4'}"})
    assert Recipe.from_dict(pattern.to_dict()).stages[0].settings.prune.config.ratio == 0.75
    without = recipe.with_overrides({"distill.prune": None})
    assert without.stages[0].settings.prune is None and "prune" not in without.to_dict()["stages"][0]["distill"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (
            {"distill": {"prune": {"ratoi": 0.4}}},
            r"stages\[0\]\.distill\.prune\.ratoi: unknown key. Did you mean 'ratio'",
        ),
        ({"distill": {"prune": {"steps": 4}}}, r"stages\[0\]\.distill\.prune\.steps: unknown key"),
        ({"distill": {"prune": {"start": 0.8}}}, r"stages\[0\]\.distill\.prune: start and end .* got 0.8, 0.7"),
        ({"distill": {"prune": {"start": "now"}}}, r"stages\[0\]\.distill\.prune: start must be a number, got 'now'"),
        ({"distill": {"prune": {"granularity": "layer"}}}, "Drop layers before"),
        ({"distill": {"prune": {"importance": "activation"}}}, "needs calibration batches"),
        ({"distill": {"prune": 0.5}}, r"stages\[0\]\.distill\.prune must be a mapping"),
        ({"prune": {"importance": "movement"}}, r"stages\[0\]\.prune\.importance: 'movement' is learned.*distill: "),
    ],
    ids=str,
)
def test_faults_in_pruning_while_training(stage, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(BASE | {"stages": [stage]})


def test_the_rounds_leave_a_quarter():
    stages = Recipe.from_yaml("bbc-news-rounds").stages
    assert [stage.name for stage in stages] == ["prune", "distill"] * 3
    left = 1.0
    for stage in stages[::2]:
        left *= 1 - stage.settings.config.ratio
    assert 0.24 < left <= 0.25


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"quantize": {}}, {"distill": {}}], r"stages\[0\]\.quantize must come after distill"),
        (
            [{"quantize": {}}, {"export": {}}],
            r"stages\[0\]\.quantize must come after export.*quantizes? by itself|quantises by",
        ),
        ([{"export": {}}, {"prune": {}}], r"stages\[0\]\.export must come after prune"),
        ([{"export": {}}, {"export": {"format": "onnx"}}], r"stages\[1\]\.export is asked for twice"),
        ([{"export": {"format": "onxn"}}], r"stages\[0\]\.export\.format must be one of onnx"),
        ([{"export": {"format": "torch", "quantize": "int8"}}], "not quantised here"),
        ([{"quantize": {"method": "int3"}}], r"stages\[0\]\.quantize\.method must be one of int8_dynamic, int8, int4"),
    ],
)
def test_quantising_and_exporting_come_last(stages, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict(BASE | {"stages": stages})
    good = [{"prune": {}}, {"vocabulary": {}}, {"export": {}}, {"export": {"quantize": "int8"}}]
    recipe = Recipe.from_dict(BASE | {"stages": good})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
