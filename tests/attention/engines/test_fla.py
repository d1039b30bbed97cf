"""The road to flash-linear-attention's kernels: same results as the plain one, and taken only where they can serve.

The kernels themselves need a GPU; here a few lines of PyTorch with their signature stand in for them.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hf_efficient.attention.engines import fla
from hf_efficient.attention.engines.feature_maps import FEATURE_MAPS
from hf_efficient.attention.kinds import linear
from hf_efficient.attention.kinds.linear import linear_attention

from ...helpers import assert_close, leaves, padding_mask
from ..cases import make_inputs
from ..maps import draw_weights, map_options


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    """[B,T,H,M], [B,T,H,M] and [B,T,H,Dv] -> [B,T,H,Dv]"""
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    assert scale == 1.0 and not normalize and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    weights = torch.einsum("bthm,bshm->bhts", q, k).tril()
    return torch.einsum("bhts,bshd->bthd", weights, v), None


@pytest.fixture
def kernels(monkeypatch):
    """The stand-in, taken for every causal input; a list of the calls."""
    module, calls = ModuleType("fla.ops.linear_attn"), []

    def counted(*args, **kwargs):
        calls.append(args[0].dtype)
        return chunk_linear_attn(*args, **kwargs)

    module.chunk_linear_attn = counted
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", module)
    monkeypatch.setattr(linear, "use_fla", lambda query, key: True)
    return calls


@pytest.mark.cover
@pytest.mark.parametrize("feature_map", sorted(FEATURE_MAPS))
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_same_as_the_plain_road(kernels, monkeypatch, feature_map, side, kv_heads):
    mask, weights = padding_mask(side, 2, 70), draw_weights(feature_map, kv_heads)
    options = map_options(feature_map, None if weights is None else weights.float())
    results = []
    for taken in (True, False):
        monkeypatch.setattr(linear, "use_fla", lambda query, key, taken=taken: taken)
        torch.manual_seed(0)
        inputs = leaves(*make_inputs(70, kv_heads=kv_heads, dtype=torch.float32))
        out = linear_attention(*inputs, mask, causal=True, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert len(kernels) == 1
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-5 * max(expected.abs().max().item(), 1))


def test_rows_without_keys_are_zero(kernels):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    assert linear_attention(*make_inputs(9, dtype=torch.float32), mask, causal=True).eq(0).all()


def test_half_precision_goes_in_and_comes_out(kernels):
    inputs = make_inputs(40, dtype=torch.bfloat16)
    out = linear_attention(*inputs, causal=True)
    assert out.dtype == torch.bfloat16 and kernels == [torch.bfloat16]
    expected = linear_attention(*(x.double() for x in inputs), causal=False)
    assert_close(out[:, :, -1].double(), expected[:, :, -1], 5e-2)


def test_only_causal_attention_takes_it(kernels):
    linear_attention(*make_inputs(9), causal=False)
    assert not kernels


def on_gpu(length=8, dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=True, shape=(1, 2, length, 16), dtype=dtype)


def test_what_the_kernels_cannot_do_is_declined(monkeypatch):
    monkeypatch.setattr(fla, "_INSTALLED", True)
    assert fla.use_fla(on_gpu(), on_gpu())
    for query, key in (
        (on_gpu(dtype=torch.float32), on_gpu()),
        (on_gpu(dtype=torch.float16), on_gpu()),
        (on_gpu(3), on_gpu()),  # after a cache
        (on_gpu(1), on_gpu(1)),
        (torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16), on_gpu()),
    ):
        assert not fla.use_fla(query, key)
    monkeypatch.setenv("HF_EFFICIENT_NO_FLA", "1")
    assert not fla.use_fla(on_gpu(), on_gpu())
    monkeypatch.delenv("HF_EFFICIENT_NO_FLA")
    monkeypatch.setattr(fla, "_INSTALLED", False)
    assert not fla.use_fla(on_gpu(), on_gpu())


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and fla._INSTALLED), reason="needs a GPU and the package")
def test_the_kernels_give_the_same_on_a_gpu():
    inputs = [x.cuda() for x in make_inputs(300, dtype=torch.bfloat16)]
    assert fla.use_fla(*inputs[:2])
    expected = linear_attention(*(x.float() for x in inputs), causal=True)
    assert_close(linear_attention(*inputs, causal=True).float(), expected, 5e-2)
