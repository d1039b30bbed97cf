"""What the feature maps promise by themselves; attention with them is in test_linear.py and test_local_linear.py."""

import copy
import math

import pytest
import torch

from hf_efficient.attention.config import AttentionConfig
from hf_efficient.attention.engines.feature_maps import FAVOR_LIMIT, FEATURE_MAPS, RELU_FLOOR, draw_projection
from hf_efficient.attention.kinds.linear import LinearAttention, linear_attention, linear_decode
from hf_efficient.attention.variant import HeadShape
from hf_efficient.errors import ConfigError

from ...helpers import assert_close
from ..cases import make_inputs
from ..maps import draw_weights


def make_variant(**options) -> LinearAttention:
    return LinearAttention(AttentionConfig("linear", **options), HeadShape(heads=4, kv_heads=2, dim=8))


@pytest.mark.parametrize("feature_map", sorted(FEATURE_MAPS))
def test_features_are_positive(feature_map):
    weight = draw_weights(feature_map)
    x = 3 * torch.randn(2, 4, 50, 4, dtype=torch.float64)
    weight = weight[:4] if feature_map == "hedgehog" else weight
    for make in (FEATURE_MAPS[feature_map].phi, FEATURE_MAPS[feature_map].of_query):
        assert make(x, weight).min() > 0


@pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog"])  # of `favor` by its estimate of softmax
def test_the_mean_is_that_of_normal_queries_and_keys(feature_map):
    dim = 16
    weight = torch.eye(dim).expand(1, dim, dim) if feature_map == "hedgehog" else None
    phi = FEATURE_MAPS[feature_map].phi
    query, key = (phi(torch.randn(1, 1, 4000, dim), weight) for _ in range(2))
    mean = (query.double().sum(2) * key.double().sum(2)).sum() / 4000**2
    assert abs(mean / FEATURE_MAPS[feature_map].mean(dim) - 1) < 0.05


def test_relu_keeps_a_floor():
    out = FEATURE_MAPS["relu"].phi(torch.tensor([-2.0, 0.0, 3.0]), None)
    assert_close(out, torch.tensor([RELU_FLOOR, RELU_FLOOR, 3 + RELU_FLOOR]), 1e-7)


def test_favor_estimates_softmax_without_bias():
    query, key = 0.5 * torch.randn(2, 1, 1, 20, 8, dtype=torch.float64)  # larger ones have heavy tails
    exact = (query @ key.mT / math.sqrt(8)).exp()
    estimates = []
    for seed in range(300):
        projection = draw_projection(16, 8, seed)
        estimates.append(FEATURE_MAPS["favor"].phi(query, projection) @ FEATURE_MAPS["favor"].phi(key, projection).mT)
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - exact).abs() / (estimates.std(0) / len(estimates) ** 0.5)
    assert error.max() < 5.5
    assert error.min() > 0


def test_more_features_come_closer_to_softmax():
    query, key, value = (0.5 * torch.randn(1, 2, 60, 16, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        options = {"causal": causal, "scaling": 0.25}
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.25)
        errors = []
        for features in (16, 256, 4096):
            outs = []
            for seed in range(5):
                weights = (draw_projection(features, 16, seed),) * 2
                outs.append(linear_attention(query, key, value, feature_map="favor", map_weights=weights, **options))
            errors.append((torch.stack(outs) - exact).square().mean().sqrt())
        assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]  # each step at least 1.5 times as close


def test_favor_of_a_query_is_the_map_up_to_a_factor():
    x, projection = torch.randn(1, 1, 30, 8, dtype=torch.float64), draw_projection(20, 8, seed=0)
    ratio = FEATURE_MAPS["favor"].of_query(x, projection) / FEATURE_MAPS["favor"].phi(x, projection)
    assert_close(ratio / ratio[..., :1], torch.ones_like(ratio), 1e-12)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e4])
def test_favor_has_numbers_for_inputs_of_any_size(size):
    query, key, value = (torch.randn(1, 2, 70, 64) for _ in range(3))
    projection = draw_projection(64, 64, seed=0)
    inputs = [(size * query).requires_grad_(), (size * key).requires_grad_(), value.requires_grad_()]
    for causal in (False, True):
        out = linear_attention(*inputs, feature_map="favor", map_weights=(projection, projection), causal=causal)
        assert torch.isfinite(out).all()
        assert out.abs().amax((0, 1, 3)).min() > 0  # no row lost all its keys
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), inputs))
    features = FEATURE_MAPS["favor"].phi(size * key, projection)
    assert features.min() >= math.exp(-FAVOR_LIMIT) * (1 - 1e-5)


def test_no_key_changes_the_features_of_another():
    """The stabiliser must not look ahead: in single precision too, whatever the size of a later key."""
    query, key, value = make_inputs(90, dtype=torch.float32)
    projection = draw_projection(8, 4, seed=0)
    options = {"feature_map": "favor", "map_weights": (projection, projection)}
    before = linear_attention(query, key, value, causal=True, **options)
    for size in (1e-3, 10.0, 1e6):
        changed = key.clone()
        changed[:, :, 64:] = size * torch.randn_like(key[:, :, 64:])
        after = linear_attention(query, changed, value, causal=True, **options)
        assert torch.equal(after[:, :, :64], before[:, :, :64])
        assert not torch.equal(after[:, :, 64:], before[:, :, 64:])
        first, _state = linear_decode(query[:, :, :64], changed[:, :, :64], value[:, :, :64], **options)
        assert_close(first, before[:, :, :64], 1e-6)


def test_a_projection_has_orthogonal_blocks_of_normal_rows():
    projection = draw_projection(150, 64, seed=3).double()
    assert projection.shape == (150, 64)
    for block in projection.split(64):
        gram = block @ block.T
        assert_close(gram - gram.diagonal().diag(), torch.zeros_like(gram), 1e-4)
    lengths = torch.cat([draw_projection(64, 64, seed) for seed in range(20)]).norm(dim=1)
    assert abs(lengths.mean() - 8) < 0.05  # sqrt(64), nearly
    assert abs(lengths.std() - 0.5**0.5) < 0.05
    entries = torch.stack([draw_projection(4, 4, seed) for seed in range(2000)])
    assert entries.mean(0).abs().max() < 0.1  # no direction is preferred
    assert (entries.square().mean(0) - 1).abs().max() < 0.15


def test_the_seed_and_nothing_else_decides_the_projection():
    torch.manual_seed(1)
    first = make_variant(feature_map="favor", seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = make_variant(feature_map="favor", seed=5), make_variant(feature_map="favor", seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.projection, again.projection)
    assert not torch.equal(first.projection, other.projection)
    again.redraw(6)
    assert torch.equal(again.projection, other.projection)
    assert "projection" in first.state_dict()
    assert make_variant(feature_map="favor", feature_dim=20).projection.shape == (20, 8)
    with pytest.raises(ConfigError, match="'elu' has no random projection"):
        make_variant().redraw(0)


def test_a_loaded_part_keeps_its_values():
    for options in ({"feature_map": "favor"}, {"feature_map": "hedgehog"}):
        variant = make_variant(**options)
        for tensor in variant.state_dict().values():
            tensor.fill_(7.0)
        loaded = copy.deepcopy(variant)
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor._is_hf_initialized = True
        for each in (variant, loaded):
            each.reset_parameters()
        assert all(tensor.eq(7).all() for tensor in loaded.state_dict().values())
        assert not any(tensor.eq(7).all() for tensor in variant.state_dict().values())


def test_hedgehog_starts_as_the_identity_of_each_head():
    variant = make_variant(feature_map="hedgehog")
    assert {name: tuple(x.shape) for name, x in variant.named_parameters()} == {
        "query_map": (4, 8, 8),
        "key_map": (2, 8, 8),
    }
    assert all(weight.eq(torch.eye(8)).all() for weight in variant.parameters())
    x = torch.randn(1, 2, 5, 8)
    expected = torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    assert_close(FEATURE_MAPS["hedgehog"].phi(x, variant.key_map), expected, 1e-6)


@pytest.mark.parametrize("feature_map", ["favor", "hedgehog"])
def test_weights_may_be_in_another_precision(feature_map):
    query, key, value = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": None}
    variant = make_variant(feature_map=feature_map)
    expected = variant(query, key, value, None, **options)
    assert_close(variant.bfloat16()(query, key, value, None, **options), expected, 0.05)
    out = variant.float()(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, **options)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 0.05)


def test_macs_count_the_making_of_features():
    assert make_variant().macs(100, False) == 2 * 8 * 9
    assert make_variant(feature_map="favor", feature_dim=20).macs(100, False) == 2 * 20 * 8 + 2 * 20 * 9
    assert make_variant(feature_map="hedgehog").macs(100, False) == 2 * 8 * 8 + 2 * 16 * 9
