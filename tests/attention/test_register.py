"""`register_attention`: a kind of one's own goes everywhere that a built-in kind goes."""

import subprocess
import sys

import pytest
import torch

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
from hf_efficient.attention.kinds import ATTENTIONS

from ..families import make_inputs, make_model
from ..helpers import assert_close


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


@pytest.fixture
def mean():
    register_attention("mean", MeanAttention)
    yield AttentionConfig("mean", options={"scale": 2.0})
    del KINDS["mean"], ATTENTIONS["mean"]


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
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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
