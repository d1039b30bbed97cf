"""Entries that are derived: those of the table come out as they are written, others are proven and can be used."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import AttentionConfig, ConfigError, PruningConfig, UnsupportedModelError, convert_attention, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive import family_for
from hf_efficient.models.derive.compare import distance, outputs_of
from hf_efficient.models.derive.entry import make_entry
from hf_efficient.models.derive.fitting import OTHERWISE, fitted
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.proof import prove
from hf_efficient.models.derive.tiny import tiny_config, tiny_model
from hf_efficient.models.derive.unseen import attends
from hf_efficient.models.families import FAMILIES
from hf_efficient.models.family import ABILITIES, Attention, Family, Stack
from hf_efficient.models.rebuild import is_portable
from hf_efficient.models.registry import register_family, remember
from hf_efficient.models.stacks import config_stacks

from ...families import make_config
from ...helpers import assert_close, selected
from .tiny import make, outputs
from .toy import ToyConfig, ToyModel, register

# What can be done with types outside of the table, by their default configs: everything, or these.
EVERYTHING = set(ABILITIES)
TYPES = {
    "qwen2": EVERYTHING,
    "opt": EVERYTHING,
    "gpt_neox": EVERYTHING,  # query, key and value of one head after another in one linear
    "phi3": EVERYTHING,  # fused under grouped queries; the forward reads head counts from the config
    "mt5": EVERYTHING,
    "mbart": EVERYTHING,
    "siglip": EVERYTHING,
    "wav2vec2": EVERYTHING,
    "llava": EVERYTHING,
    "qwen3_moe": EVERYTHING,
    "gpt_oss": EVERYTHING,  # attention sinks, one of each head
    "gemma2": EVERYTHING,  # softcap
    "deepseek_v3": EVERYTHING,  # latent attention: values of another width than queries
    "qwen3_next": EVERYTHING,  # one layer in four has softmax attention
    "gptj": EVERYTHING,  # attention of its own
    "mpnet": EVERYTHING,
    "albert": {"convert", "heads", "neurons"},  # one layer for all
}
FAST = ("gpt_neox", "phi3", "gpt_oss", "gptj", "albert", "opt")


BY_SIZE = PruningConfig(ratio=0.2, importance="magnitude", layer_importance="magnitude", round_to=1, reconstruct=False)


def described(family, config):
    """Where an entry says that things are, whatever it calls them."""
    roles = []
    for stack in config_stacks(config, family):
        attentions = {
            kind: (a.module, a.query, a.key, a.value, a.output, set(a.head_attributes))
            for kind, a in stack.attentions.items()
        }
        entry = stack.entry
        fields = (entry.num_layers, entry.heads, entry.kv_heads or entry.heads, entry.hidden, entry.config)
        fields = tuple(config.attribute_map.get(name, name) for name in fields)
        sizes = (stack.num_heads, stack.num_kv_heads, stack.head_width, stack.num_neurons, stack.is_causal)
        roles.append((entry.layers, attentions, sorted(stack.up), stack.down, fields, sizes))
    return sorted(roles, key=lambda one: one[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_derived_is_what_is_written(name):
    config = tiny_config(make_config(name))
    model = tiny_model(config)
    derived = make_entry(model, tiny_inputs(model))
    written = FAMILIES[name]
    assert described(derived, config) == described(written, config)
    assert derived.relative_bias == written.relative_bias
    assert derived.norm in (written.norm, None)
    assert set(written.per_layer) <= set(derived.per_layer)


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_types_outside_of_the_table(name):
    model, _ = make(name)
    family = family_for(model.config)
    assert {ability for ability in ABILITIES if family.why_not(ability) is None} == TYPES[name]
    assert family_for(model.config) is family  # remembered
    assert Family.from_dict(json.loads(json.dumps(family.to_dict()))) == family


@pytest.mark.parametrize(
    ("name", "part"), [("phi3", "head"), ("gpt_neox", "head"), ("opt", "neuron"), ("gptj", "layer")]
)
def test_pruned_saved_and_loaded(name, part, tmp_path):
    model, inputs = make(name)
    config = PruningConfig(
        ratio=0.2,
        granularity=(part,),
        importance="magnitude",
        layer_importance="magnitude",
        round_to=1,
        reconstruct=False,
    )
    small = prune(model, config)
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(small, inputs))
    again = prune(loaded, replace(config, ratio=0.02))  # the result is a model like any other
    assert again.num_parameters() < small.num_parameters()


def test_a_plain_result_is_a_stock_model(tmp_path):
    model, _ = make("opt")
    small = prune(model, replace(BY_SIZE, ratio=0.34, granularity=("layer",)))
    assert is_portable(small) and type(small) is type(model)
    small.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "OPTModel"


def test_what_the_caller_has_set_makes_no_difference():
    config = CONFIG_MAPPING["opt"](hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=8, dropout=0.3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            family = family_for(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(family.why_not(ability) for ability in ABILITIES)
    assert torch.equal(torch.rand(1), expected)


def test_a_decoder_is_called_so_whoever_computes_its_attention():
    for name in ("gptj", "opt"):
        assert [stack.name for stack in Anatomy.of(make(name)[0]).stacks] == ["decoder"]


def test_a_window_matters_and_a_wide_one_does_not():
    model, inputs = make("opt")
    wide = convert_attention(model, AttentionConfig("local", window=64))
    narrow = convert_attention(model, AttentionConfig("local", window=2))
    real = inputs["attention_mask"].bool()
    assert_close(outputs(wide, inputs)[real], outputs(model, inputs)[real], 1e-5)
    assert not torch.allclose(outputs(narrow, inputs)[real], outputs(model, inputs)[real], atol=1e-3)


def test_what_cannot_be_removed_is_refused_with_the_reason():
    olmo = make("olmo2")[0]
    with pytest.raises(UnsupportedModelError, match=r"heads of olmo2 .* several heads .*\. .*\('neuron', 'layer'\)"):
        prune(olmo, BY_SIZE)
    with pytest.raises(UnsupportedModelError, match=r"layers of albert .* one layer alone"):
        prune(make("albert")[0], replace(BY_SIZE, granularity=("layer",)))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"query": "self_attn.v_proj", "interleaved": True}, {"heads"}),
        ({"module": "fc1"}, {"convert", "heads"}),
        ({"up": ("fc1", "fc1")}, {"neurons"}),
        ({"causal": False}, {"convert"}),
        ({"layers": "decoder.layers.0"}, EVERYTHING),
    ],
    ids=["projection", "module", "neurons", "causality", "layers"],
)
def test_a_wrong_entry_is_not_proven(change, refused):
    """The proofs notice a mistake of every sort, and only switch off what is wrong."""
    model, inputs = make("opt")
    entry = make_entry(model, inputs)
    [stack] = entry.stacks
    if change.keys() & vars(stack.attention).keys():
        change = {"attention": replace(stack.attention, **change)}
    wrong = replace(entry, stacks=(replace(stack, **change),))
    try:
        proven = prove(wrong, model, inputs)
    except UnsupportedModelError:
        assert refused == EVERYTHING
    else:
        assert {ability for ability in ABILITIES if proven.why_not(ability)} == refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stacks": []}, "no stacks"),
        ({"stacks": "encoder"}, "list of at most"),
        ({"model_type": "../../etc"}, "path of names"),
        ({"surprise": 1}, "must be a mapping with some of"),
        ({"stacks": [{"name": "a", "layers": "__class__", "attention": {"module": "x"}}]}, "path of names"),
        ({"stacks": [{"name": "a", "layers": "l", "attention": {"module": "x", "query": 1 << 40}}]}, "path of names"),
        ({"stacks": [{"name": "a", "layers": "l", "count_neurons": "os.system"}]}, "must be a mapping"),
        ({"stacks": [{"name": "a"}]}, "not complete"),
        ({"stacks": [{"name": "a", "layers": 5, "attention": {"module": "x"}}]}, "layers must be a path of names"),
        ({"positions": "embed_positions"}, "positions must be a few names"),
        ({"position_offset": 1 << 40}, "position_offset must be a number"),
        ({"first_stays": 1}, "first_stays must be a switch"),
    ],
)
def test_an_entry_of_a_stranger_is_read_with_care(change, message):
    data = Family("opt", "OPTConfig", (Stack("decoder", "decoder.layers", Attention("self_attn")),)).to_dict()
    assert Family.from_dict(data).stacks[0].name == "decoder"
    with pytest.raises(ConfigError, match=message):
        Family.from_dict(data | change)


def test_a_layer_that_is_built_otherwise_is_seen_in_the_real_model():
    """The tiny model has few layers; the real one may have others between them."""
    model, inputs = make("opt")
    family = make_entry(model, inputs)
    assert fitted(family, model) == family
    model.decoder.layers[1].fc1 = torch.nn.Linear(32, 20)
    assert dict(fitted(family, model).stacks[0].refusals) == {"neurons": OTHERWISE}
    del model.decoder.layers[1].self_attn
    without_one = fitted(family, model).stacks[0]
    assert dict(without_one.refusals) == {"neurons": OTHERWISE}
    assert without_one.attending == (0, 2)
    for layer in model.decoder.layers:
        layer.self_attn = torch.nn.Identity()  # something else that has the name
    assert dict(fitted(family, model).stacks[0].refusals) == dict.fromkeys(("convert", "heads", "neurons"), OTHERWISE)


def test_only_layers_with_softmax_attention_are_converted(tmp_path):
    """A hybrid: which layers have it is found in the real model, kept in the entry, counted anew when some leave."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]
    model, inputs = make("qwen3_next")
    config = type(model.config)(**model.config.to_dict() | {"num_hidden_layers": 5, "layer_types": kinds})
    model = tiny_model(config)
    [stack] = Anatomy.of(model).stacks
    assert stack.entry.attending == (1, 3, 4) and not stack.entry.why_not("heads")
    wide, narrow = (convert_attention(model, AttentionConfig("local", window=w, global_tokens=0)) for w in (64, 2))
    assert [one["kind"] for one in narrow.config.efficient["stacks"]["decoder"]["attention"]] == [
        {"linear_attention": "full", "full_attention": "local"}[kind] for kind in kinds
    ]
    real = inputs["attention_mask"].bool()
    assert_close(outputs(wide, inputs)[real], outputs(model, inputs)[real], 1e-4)
    assert (outputs(narrow, inputs) - outputs(model, inputs))[real].abs().max() > 1e-3
    small = prune(narrow, replace(BY_SIZE, ratio=0.3, granularity=("layer",)))
    left = [kinds[layer] for layer in small.config.efficient["kept_layers"]["decoder"]]
    assert len(left) < 5
    expected = tuple(i for i, kind in enumerate(left) if kind == "full_attention")
    assert Anatomy.of(small).stacks[0].attending == expected
    small.save_pretrained(tmp_path)
    again = copy.deepcopy(AutoModel.from_pretrained(tmp_path))  # a file's place in memory is a rounding of its own
    assert torch.equal(outputs(again, inputs), outputs(small, inputs))
    with pytest.raises(ConfigError, match=r"None of these layers of the decoder has softmax attention; \(1, 3, 4\)"):
        convert_attention(model, {0: AttentionConfig("local")})
    wrong = narrow.config.to_dict()
    wrong["efficient"]["stacks"]["decoder"]["attention"][0] = {"kind": "local"}
    with pytest.raises(ConfigError, match=r"decoder\.attention\[0\]: this layer has no softmax attention"):
        type(narrow.config)(**wrong)


def test_what_hides_the_future_is_seen_and_not_believed():
    """Splinter's modules do not say that they hide nothing, and AIMv2's say of the text that it sees all."""
    for name, causal in (("splinter", [False]), ("aimv2", [False, True])):
        model, inputs = make(name)
        assert [stack.is_causal for stack in Anatomy.of(model).stacks] == causal
        converted = convert_attention(model, AttentionConfig("local", window=64, global_tokens=0))
        assert distance(outputs_of(converted, inputs), outputs_of(model, inputs), inputs) < 1e-4


def test_a_model_with_classes_by_implementation_is_built():
    """A vision tower looks its attention up in a dict of its own, by the name of the implementation."""
    model, inputs = make("unlimited_ocr")
    converted = convert_attention(model, {"text": AttentionConfig("local", window=64)})
    assert distance(outputs_of(converted, inputs), outputs_of(model, inputs), inputs) < 1e-4
    narrow = convert_attention(model, {"text": AttentionConfig("local", window=1, global_tokens=0)})
    assert distance(outputs_of(narrow, inputs), outputs_of(model, inputs), inputs) > 1e-3


def test_lists_without_attention_are_not_left_out():
    model, inputs = make("qwen3_vl_vision")
    assert family_for(model.config).left_out == ()  # though those that merge patches are lists of layers too
    assert not attends(model, model.deepstack_merger_list, inputs)
    assert attends(model, model.blocks, inputs)
    model, inputs = make("llava")
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(max=90)
    vision = model.vision_tower.encoder.layers
    assert attends(model, vision, text)  # not reached
    assert not attends(model, torch.nn.ModuleList(layer.mlp for layer in vision), text)


def test_the_width_of_latent_heads_is_measured():
    model, inputs = make("deepseek_v3", qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=20)
    stack = Anatomy.of(model).stacks[0]
    assert stack.head_width == 16 and stack.entry.attention.uneven  # of the tiny model 8 + 8
    config = CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=2, qk_nope_head_dim=24, qk_rope_head_dim=8)
    assert config_stacks(config, family_for(config))[0].head_width == 32
    for kind in ("local", "linear", "kernel"):
        assert outputs(convert_attention(model, AttentionConfig(kind)), inputs).isfinite().all()
    with pytest.raises(UnsupportedModelError, match=r"'additive' attention needs values as wide .* local, strided"):
        convert_attention(model, AttentionConfig("additive"))


def test_a_width_that_no_field_says_is_that_of_the_config():
    config = CONFIG_MAPPING["gpt_neo"](hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    assert family_for(config).stacks[0].num_neurons == 4 * 48


@pytest.mark.parametrize("part", ["head", "neuron", "layer"])
def test_an_architecture_of_ones_own_needs_no_entry(part, tmp_path):
    register()
    model = ToyModel(ToyConfig(n_heads=8, dim=64, mlp_dim=96)).eval()
    inputs = {"input_ids": torch.randint(3, 90, (2, 9))}
    small = prune(model, replace(BY_SIZE, granularity=(part,)))
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), inputs), outputs(small, inputs))


def test_an_entry_cannot_overwrite_what_is_no_number(tmp_path):
    small = prune(make("opt")[0], replace(BY_SIZE, granularity=("head",)))
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["efficient"]["family"]["stacks"][0]["attention"]["head_attributes"] = ["forward"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'forward' is no number of OPTAttention"):
        AutoModel.from_pretrained(tmp_path)


def test_a_written_entry_of_ones_own_is_taken():
    attention = Attention("mixer", "mixer.mix", "mixer.mix", "mixer.mix", "mixer.out", head_attributes=("n_heads",))
    fields = {"num_layers": "depth", "hidden": "dim", "heads": "n_heads", "neurons": "mlp_dim"}
    stack = Stack("tower", "blocks", attention, ("wide",), "narrow", causal=False, **fields)
    family = Family(OtherConfig.model_type, "OtherConfig", (stack,))
    register_family(family)
    model = OtherModel(OtherConfig())
    assert Anatomy.of(model).family is family
    assert prune(model, replace(BY_SIZE, granularity=("head",))).num_parameters() < model.num_parameters()
    with pytest.raises(ConfigError, match="'bert' cannot be registered: it is in the table"):
        register_family(FAMILIES["bert"])


class OtherConfig(ToyConfig):
    model_type = "other_toy_of_the_tests"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class OtherModel(ToyModel):
    config_class = OtherConfig


def test_layers_without_the_cross_attention_of_others_are_converted():
    """As in Q-Formers, of which every second layer reads the image."""
    model, inputs = make("opt")
    family = family_for(model.config)
    stack = replace(family.stacks[0], cross_attention=Attention("cross_attention"))
    remember(model.config, replace(family, stacks=(stack,)))
    try:
        converted = convert_attention(model, AttentionConfig("local", window=4096, global_tokens=0))
    finally:
        remember(model.config, family)
    assert distance(outputs_of(converted, inputs), outputs_of(model, inputs), inputs) < 1e-5


@pytest.mark.parametrize(("types", "expected"), [(["sliding_attention"], False), (["sliding_attention"] * 3, True)])
def test_kinds_of_other_layers_say_nothing_of_windows(types, expected):
    """RT-DETR's config has a list of that name for each stage of its backbone."""
    config = CONFIG_MAPPING["opt"](num_hidden_layers=3)
    config.layer_types = types
    stack = Stack("decoder", "decoder.layers", Attention("self_attn"))
    [known] = config_stacks(config, Family("opt", "OPTConfig", (stack,)))
    assert known.has_window(2) is expected


def test_what_a_model_sets_in_its_layers_is_there_once_it_is_rebuilt():
    """A buffer that no checkpoint holds, and that only the model around the layers gives its values."""
    model, inputs = make("falcon_h1")
    rebuilt = convert_attention(model, AttentionConfig("local", window=64))
    assert torch.equal(rebuilt.layers[0].mamba.mup_vector, model.layers[0].mamba.mup_vector)
    assert torch.allclose(outputs(rebuilt, inputs), outputs(model, inputs), atol=1e-5)
