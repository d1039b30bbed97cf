"""`register_attention`: a kind of one's own goes everywhere that a built-in kind goes."""

import inspect
import subprocess
import sys

import pytest
import torch
import transformers

from hf_efficient import (
    AttentionConfig,
    AttentionVariant,
    ConfigError,
    PruningConfig,
    convert_attention,
    prune,
    register_attention,
)
from hf_efficient.attention.config import KINDS
from hf_efficient.attention.dispatch import make_variant
from hf_efficient.attention.variant import HeadShape

from ..families import make_inputs, make_model
from ..helpers import assert_close
from ..processes import python


class MeanAttention(AttentionVariant):
    """Every query gets the mean of the real values, times a learned number per head."""

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.gain = torch.nn.Parameter(torch.ones(shape.heads, 1, 1))

    def attend(self, query, key, value, key_mask, *, causal, scaling, dropout, bias):
        real = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
        weights = real.to(value.dtype)[:, None, None] / real.sum(1)[:, None, None, None]
        mean = (weights @ value).repeat_interleave(self.shape.heads // self.shape.kv_heads, 1)
        return mean.expand(-1, -1, query.shape[2], -1) * self.gain * self.config.options.get("scale", 1.0)

    def macs(self, length, causal):
        return self.shape.dim

    def reset_parameters(self):
        torch.nn.init.ones_(self.gain)


def _add_mean():
    register_attention("mean", MeanAttention)
    return AttentionConfig("mean", options={"scale": 2.0})


@pytest.fixture
def mean():
    yield _add_mean()
    del KINDS["mean"]


def test_a_kind_is_at_most_thirty_lines():
    lines = sum(len(inspect.getsource(part).splitlines()) for part in (MeanAttention, _add_mean))
    assert 15 < lines <= 30


def test_the_old_place_gives_the_table_and_what_adds_to_it(mean):
    from hf_efficient.attention.kinds import ATTENTIONS as TABLE
    from hf_efficient.attention.kinds import register_attention as register

    assert register is register_attention and TABLE["mean"] is MeanAttention


def test_the_table_reads_a_kind_when_it_is_asked_for():
    code = (
        "import sys; from hf_efficient.attention.config import FEATURE_MAPS, KERNELS, KINDS, AttentionConfig\n"
        "assert AttentionConfig('linear', feature_map='favor') and 'torch' not in sys.modules\n"
        "from hf_efficient.attention.registry import ATTENTIONS\n"
        "here = 'hf_efficient.attention.kinds.'\n"
        "assert 'full' not in ATTENTIONS and len(ATTENTIONS) == len(KINDS) - 1\n"
        "assert ATTENTIONS['lsh'].__name__ == 'LshAttention' and here + 'topk' not in sys.modules\n"
        "assert all(issubclass(v, ATTENTIONS['lsh'].__mro__[1]) for v in ATTENTIONS.values())\n"
        "assert all([*FEATURE_MAPS.values(), *KERNELS.values()])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_registered_kind_converts_saves_and_loads(mean, tmp_path):
    model, inputs = make_model("bert"), make_inputs("bert", "right")
    converted = convert_attention(model, {0: AttentionConfig("local", window=2), 1: mean})
    plain = convert_attention(model, {0: AttentionConfig("local", window=2), 1: AttentionConfig("mean")})
    assert (converted(**inputs)[0] - plain(**inputs)[0]).abs().max() > 1e-3
    with torch.no_grad():
        converted.get_parameter("bert.encoder.layer.1.attention.self.efficient_attention.gain").fill_(0.3)
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path)
    assert loaded.config.efficient["stacks"]["encoder"]["attention"][1] == {"kind": "mean", "options": {"scale": 2.0}}
    assert_close(loaded(**inputs)[0], converted(**inputs)[0], 0)


def test_a_registered_kind_can_be_pruned(mean):
    model = convert_attention(make_model("bert"), mean)
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.endswith("gain"):
                gain.copy_(torch.arange(4.0).view(4, 1, 1))
    small = prune(model, PruningConfig(ratio=0.2, granularity=("head",), importance="magnitude", round_to=1))
    gains = [gain for name, gain in small.named_parameters() if name.endswith("gain")]
    assert sum(len(gain) for gain in gains) < 12
    assert all(set(gain.flatten().tolist()) < {0.0, 1.0, 2.0, 3.0} for gain in gains if len(gain) < 4)


def test_a_checkpoint_of_an_unknown_kind_says_what_to_do(mean, tmp_path):
    convert_attention(make_model("bert"), mean).save_pretrained(tmp_path)
    code = f"import hf_efficient, transformers; transformers.AutoModel.from_pretrained({str(tmp_path)!r})"
    run = python("-c", code)
    assert run.returncode
    assert "Unknown attention kind 'mean'" in run.stderr and "needs `register_attention` first" in run.stderr


class Nothing(AttentionVariant):
    pass


@pytest.mark.parametrize(
    ("name", "variant", "fields", "message"),
    [
        ("local", MeanAttention, (), "is an attention kind 'local' already. Choose another name.$"),
        ("mean", MeanAttention, (), "pass overwrite=True"),
        ("my kind", MeanAttention, (), "must be an identifier"),
        ("mine", Nothing, (), "with an `attend` of its own"),
        ("mine", torch.nn.Linear, (), "subclass of AttentionVariant"),
        ("mine", MeanAttention, ("windwo",), "Did you mean 'window'"),
    ],
)
def test_bad_registrations_are_refused(mean, name, variant, fields, message):
    with pytest.raises(ConfigError, match=message):
        register_attention(name, variant, fields=fields)
    assert set(KINDS) >= {"mean"} and "mine" not in KINDS
    register_attention("mean", MeanAttention, overwrite=True)


def test_options_belong_to_registered_kinds_and_are_flat(mean):
    with pytest.raises(ConfigError, match=r"options=.* has no meaning for kind='local'"):
        AttentionConfig("local", options={"scale": 1})
    with pytest.raises(ConfigError, match="flat mapping"):
        AttentionConfig("mean", options={"scale": [1]})
    with pytest.raises(ConfigError, match="window=3 has no meaning for kind='mean'"):
        AttentionConfig("mean", window=3)
    assert hash(mean) == hash(AttentionConfig("mean"))


class Ruler(AttentionVariant):
    """Weights by distance, with a tensor of every sort, written in every way; the values say what they should be."""

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.gain = torch.nn.Parameter(torch.ones(shape.heads, 1, 1))
        self.mix = torch.nn.Linear(shape.dim, shape.dim)
        self.register_buffer("step", torch.full((1,), 0.25))
        self.register_buffer("drawn", torch.randn(8), persistent=False)
        self.register_buffer("slope", torch.linspace(0.1, 0.9, shape.heads)[:, None, None], persistent=False)
        self.table = torch.nn.init.normal_(torch.empty(3))
        self.width = float(self.slope.max().tolist()) + float(torch.rand(()))

    def reset_parameters(self):
        self.gain.data.fill_(2.0)
        self.step.copy_(torch.tensor([0.5]))
        torch.nn.init.eye_(self.mix.weight)

    def attend(self, query, key, value, key_mask, *, causal, scaling, dropout, bias):
        queries, keys = query.shape[2], key.shape[2]
        far = (torch.arange(keys)[None] - torch.arange(keys - queries, keys)[:, None]).abs().to(value)
        seen = (-self.slope * self.step * far).exp()[None] * (1 + self.width * self.table.norm() * self.drawn.norm())
        seen = seen.tril(keys - queries) if causal else seen
        if key_mask is not None:
            seen = seen * key_mask[:, None, None, :]
            value = value.masked_fill(~key_mask[:, None, :, None], 0)
        value = self.mix(value).repeat_interleave(self.shape.heads // self.shape.kv_heads, 1)
        return seen / (1e-6 + seen.sum(-1, keepdim=True)) @ value * self.gain

    def macs(self, length, causal):
        return length * self.shape.dim


@pytest.fixture
def ruler():
    register_attention("ruler", Ruler)
    yield AttentionConfig("ruler")
    del KINDS["ruler"]


def rulers(model):
    return [module for module in model.modules() if isinstance(module, Ruler)]


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_what_is_loaded_is_kept_and_what_is_not_is_as_in_a_new_one(ruler, family, tmp_path):
    model, inputs = convert_attention(make_model(family), ruler), make_inputs(family)
    with torch.no_grad():
        for index, part in enumerate(rulers(model)):
            assert part.gain.eq(2).all() and part.step.eq(0.5).all(), "reset_parameters was not called"
            for tensor in (*part.parameters(), part.step):
                tensor.normal_().add_(index)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    for loaded in (type(model).from_pretrained(tmp_path), convert_attention(model, {0: ruler})):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        for part, other in zip(rulers(loaded), rulers(model), strict=True):
            assert torch.equal(part.drawn, other.drawn) and torch.equal(part.table, other.table)
            assert torch.equal(part.slope, torch.linspace(0.1, 0.9, part.shape.heads)[:, None, None])
            assert part.width == other.width
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    again = rulers(type(model)(model.config))[0]
    assert torch.equal(again.drawn, rulers(model)[0].drawn) and not torch.equal(again.gain, rulers(model)[0].gain)


def test_another_seed_draws_other_values_and_the_caller_draws_the_same_as_before(ruler):
    register_attention("ruler", Ruler, fields=("seed",), overwrite=True)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = [make_variant(AttentionConfig("ruler", seed=seed), HeadShape(4, 2, 8)) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(2), expected), "making a variant used up the caller's random numbers"
    assert torch.equal(made[0].drawn, made[1].drawn) and not torch.equal(made[0].drawn, made[2].drawn)


def test_pruning_keeps_what_was_learned_and_makes_the_rest_for_the_heads_that_stay(ruler, tmp_path):
    model = convert_attention(make_model("bert"), ruler)
    with torch.no_grad():
        for part in rulers(model):
            part.mix = torch.nn.Identity()  # its rows are no heads
            part.gain.copy_(torch.arange(3.0, 7.0).view(4, 1, 1))
            part.step.fill_(0.125)
    register_attention("ruler", WithoutMix, overwrite=True)
    small = prune(model, PruningConfig(ratio=0.2, granularity=("head",), importance="magnitude", round_to=1))
    parts = rulers(small)
    assert sum(len(part.gain) for part in parts) < 12
    for part in parts:
        assert set(part.gain.flatten().tolist()) <= {3.0, 4.0, 5.0, 6.0} and part.step.eq(0.125).all()
        assert torch.equal(part.slope, torch.linspace(0.1, 0.9, part.shape.heads)[:, None, None])
    small.save_pretrained(tmp_path)
    inputs = make_inputs("bert")
    assert torch.equal(type(small).from_pretrained(tmp_path)(**inputs)[0], small(**inputs)[0])


class WithoutMix(Ruler):
    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.mix = torch.nn.Identity()

    def reset_parameters(self):
        self.gain.data.fill_(2.0)
        self.step.copy_(torch.tensor([0.5]))


def test_a_class_of_ones_own_with_one_head_more_loads_all_of_it(ruler, tmp_path):
    class WithHead(type(convert_attention(make_model("bert", transformers.BertModel), ruler))):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(config.hidden_size, 3)
            self.register_buffer("scale", torch.tensor([2.0]))

    model = WithHead(convert_attention(make_model("bert", transformers.BertModel), ruler).config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    model.save_pretrained(tmp_path)
    loaded, info = WithHead.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert "extra.weight" in loaded.state_dict()
