"""The GPU path: its masks against the naive twins on CPU, its kernels against the plain path where there is CUDA."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from hf_efficient.attention.engines import blocks, flex
from hf_efficient.attention.engines.flex import BLOCK, flex_block_attention, flex_local_attention, use_flex
from hf_efficient.attention.engines.parts import Options
from hf_efficient.attention.kinds import local as local_module
from hf_efficient.attention.kinds.local import local_attention
from hf_efficient.attention.kinds.strided import strided_attention
from hf_efficient.attention.kinds.topk import topk_attention
from hf_efficient.attention.naive import naive_full_attention, naive_local_attention

from ...helpers import assert_close, leaves, padding_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
HOLES = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) > 0.3


@pytest.fixture(autouse=True)
def _fresh():
    """No compiled programs or shapes of another test."""
    torch._dynamo.reset()
    flex._shapes.clear()
    yield
    flex._shapes.clear()


def make_inputs(seen: int, dim: int = 16, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Query [2,4,S,dim], key and value [2,2,S,dim]."""
    query = torch.randn(2, 4, seen, dim, **options)
    return query, *(torch.randn(2, 2, seen, dim, **options) for _ in range(2))


def naive_pairs(seen: int, mask: Tensor | None, **options) -> Tensor:
    """bool [B,S,S]: the pairs that get any weight from the twin."""
    zeros = torch.zeros(2, 1, seen, 1)
    return naive_local_attention(zeros, zeros, torch.eye(seen).expand(2, 1, -1, -1), mask, **options)[:, 0] > 0


def flex_pairs(block_mask: BlockMask, seen: int) -> Tensor:
    """bool [B,H,S,S] of the real positions; the padded ones have none."""
    filled = block_mask.shape[-1]
    heads = block_mask.kv_num_blocks.shape[1]
    pairs = create_mask(block_mask.mask_mod, 2, heads, filled, filled, device="cpu")
    assert not pairs[:, :, seen:].any() and not pairs[..., seen:].any()
    return pairs[:, :, :seen, :seen]


def block_pairs(pairs: Tensor, filled: int) -> Tensor:
    """[..., S, S] -> [..., N, N]: the blocks of the kernel that hold any pair."""
    extra = filled - pairs.shape[-1]
    padded = torch.nn.functional.pad(pairs, (0, extra, 0, extra))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).any(-1).any(-2)


def make_chosen(blocks: int, heads: int, missing: int) -> Tensor:
    """[2, N, heads, 4]: a block's own first, then others before it or `missing` ones, none twice."""
    chosen = torch.full((2, blocks, heads, 4), missing)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(blocks), torch.arange(heads)).tolist():
        others = torch.randperm(index[1])[:3]
        chosen[tuple(index)][: len(others) + 1] = torch.cat([torch.tensor([index[1]]), others])
    return chosen


def chosen_pairs(chosen: Tensor, mask: Tensor, block_size: int, global_tokens: int, causal: bool) -> Tensor:
    """bool [2,H,S,S] of real tokens in chosen blocks, and of the first ones."""
    rank = mask.cumsum(-1) - 1
    sees = (chosen.transpose(1, 2)[..., None] == torch.arange(chosen.shape[1])).any(-2)  # [2, H, N, N]
    owner = (rank // block_size).clamp(min=0)
    pairs = torch.stack([sees[row][:, owner[row]][:, :, owner[row]] for row in range(2)])
    first = mask & (rank < global_tokens)
    pairs = pairs | first[:, None, None, :]
    if not causal:
        pairs = pairs | first[:, None, :, None]
    pairs = pairs & mask[:, None, None, :] & mask[:, None, :, None]
    return pairs.tril() if causal else pairs


def local(*inputs, **options) -> Tensor:
    return local_attention(*inputs, window=40, **options)


def strided(*inputs, **options) -> Tensor:
    return strided_attention(*inputs, block_size=50, num_blocks=2, **options)


def topk(*inputs, bias: None = None, **options) -> Tensor:
    return topk_attention(*inputs, block_size=64, top_k=2, **options)


@pytest.mark.cover(2)
@pytest.mark.parametrize("seen", [1, 2, 127, 128, 129, 300, 513])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("global_tokens", [0, 3])
def test_local_masks_allow_what_the_twin_allows(seen, causal, global_tokens):
    for window in (1, 60, 128, 200):
        options = {"window": window, "causal": causal, "global_tokens": global_tokens}
        for mask in (
            None,
            padding_mask("left", 2, seen),
            padding_mask("right", 2, seen),
            HOLES if seen == 300 else None,
        ):
            block_mask = flex.local_block_mask(seen, mask, device=CPU, **options)
            expected = naive_pairs(seen, mask, **options)
            assert torch.equal(flex_pairs(block_mask, seen)[:, 0], expected)
            listed, needed = block_mask.to_dense()[:, 0].bool(), block_pairs(expected, block_mask.shape[-1])
            assert not (needed & ~listed).any()  # what is not listed is not visited
            if mask is None:
                assert torch.equal(listed.expand_as(needed), needed)  # nothing is visited in vain


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("block_size", "global_tokens"), [(64, 0), (50, 3), (200, 0)])
def test_chosen_blocks_allow_what_they_say(causal, heads, block_size, global_tokens):
    seen = 300
    chosen = make_chosen(-(-seen // block_size), heads, missing=seen)
    options = {"block_size": block_size, "global_tokens": global_tokens, "causal": causal}
    for mask in (None, padding_mask("left", 2, seen), HOLES):
        block_mask = flex.chosen_block_mask(seen, mask, chosen, **options)
        whole = torch.ones(2, seen, dtype=torch.bool) if mask is None else mask
        expected = chosen_pairs(chosen, whole, **options)
        assert torch.equal(flex_pairs(block_mask, seen), expected)
        listed, needed = block_mask.to_dense().bool(), block_pairs(expected, block_mask.shape[-1])
        assert not (needed & ~listed).any()
        if mask is None:
            assert torch.equal(listed.expand_as(needed), needed)


@pytest.mark.cover(2)
@pytest.mark.parametrize("attention", [local, strided, topk])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left"])
def test_eager_flex_equals_the_plain_path(attention, causal, side, monkeypatch):
    seen, mask, asked = 300, padding_mask(side, 2, 300), []
    inputs = make_inputs(seen)
    for bias in (None, torch.randn(1, 4, 2 * seen - 1)):
        options = {"global_tokens": 2, "causal": causal, "scaling": 0.3, "bias": bias}
        plain = attention(*inputs, mask, **options)
        with monkeypatch.context() as patch:
            for module in (blocks, local_module):
                patch.setattr(module, "use_flex", lambda *inputs: asked.append(inputs) or True)
            assert_close(attention(*inputs, mask, **options), plain, 1e-5)
    assert len(asked) == 2


@pytest.mark.parametrize("causal", [False, True])
def test_eager_flex_equals_chosen_blocks(causal):
    seen, mask = 300, padding_mask("left", 2, 300)
    query, key, value = make_inputs(seen)
    options = {"block_size": 50, "global_tokens": 2, "causal": causal}
    chosen = make_chosen(6, 4, missing=seen)
    out = flex_block_attention(query, key, value, mask, chosen, 50, Options(causal, global_tokens=2))
    pairs = chosen_pairs(chosen, mask, **options)
    shared = (x.repeat_interleave(2, 1) for x in (key, value))
    assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, *shared, attn_mask=pairs), 1e-5)
    assert out[~mask[:, None, :].expand(-1, 4, -1)].eq(0).all()
    plain = naive_full_attention(query, key, value, mask, causal=causal)
    assert (out - plain).abs().max() > 1e-2  # the blocks were not ignored


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_padding_is_inert(junk):
    mask = padding_mask("left", 2, 150)
    query, key, value = make_inputs(150)
    options = Options(global_tokens=1)
    out = flex_local_attention(query, key, value, mask, 9, options)
    poisoned = (x.masked_fill(~mask[:, None, :, None], junk) for x in (key, value))
    assert torch.equal(flex_local_attention(query, *poisoned, mask, 9, options), out)


def test_masks_without_padding_are_made_once():
    options = {"window": 9, "global_tokens": 0, "causal": False, "device": CPU}
    with torch.inference_mode():
        first = flex._unpadded_local_mask(200, **options)
    assert flex._unpadded_local_mask(200, **options) is first
    assert flex._unpadded_local_mask(201, **options) is not first
    assert not first.kv_indices.is_inference()


def pretended(length: int = 256, dtype: torch.dtype = torch.float16, dim: int = 64) -> SimpleNamespace:
    """What `use_flex` looks at of a CUDA tensor."""
    return SimpleNamespace(is_cuda=True, shape=(1, 2, length, dim), dtype=dtype, requires_grad=False)


def test_what_is_declined(monkeypatch):
    monkeypatch.setattr(flex, "_HAS_TRITON", True)
    assert not use_flex(*make_inputs(256), 0.0)
    tensor, other = pretended(), pretended(dtype=torch.bfloat16)
    assert use_flex(tensor, tensor, tensor, 0.0)
    assert not use_flex(tensor, tensor, tensor, 0.1)
    assert not use_flex(pretended(1), tensor, tensor, 0.0)
    assert not use_flex(tensor, tensor, other, 0.0)
    assert not use_flex(*[pretended(dtype=torch.float64)] * 3, 0.0)
    assert not use_flex(*[pretended(dim=8)] * 3, 0.0)
    with monkeypatch.context() as patch:
        patch.setenv("HF_EFFICIENT_NO_FLEX", "1")
        assert not use_flex(tensor, tensor, tensor, 0.0)
    monkeypatch.setattr(flex, "MAX_PROGRAMS", 1)
    assert use_flex(*[pretended(200)] * 3, 0.0)  # filled up to 256, so the program is there
    assert not use_flex(*[pretended(300)] * 3, 0.0)


@pytest.mark.cover
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("attention", [local, strided, topk])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [None, "left"])
def test_kernels_equal_the_plain_path(attention, dtype, tolerance, causal, side, monkeypatch):
    for seen, global_tokens, with_bias in ((300, 0, False), (1000, 2, attention is not topk)):
        mask = padding_mask(side, 2, seen)
        mask = None if mask is None else mask.cuda()
        inputs = make_inputs(seen, dim=64, device="cuda", dtype=dtype)
        bias = torch.randn(1, 4, 2 * seen - 1, device="cuda") if with_bias else None
        direction = torch.randn(2, 4, seen, 64, device="cuda", dtype=dtype)
        results = []
        for turned_off in ("0", "1"):
            monkeypatch.setenv("HF_EFFICIENT_NO_FLEX", turned_off)
            *tensors, own_bias = leaves(*inputs, bias)
            assert use_flex(*tensors, 0.0) == (turned_off == "0")
            out = attention(*tensors, mask, global_tokens=global_tokens, causal=causal, bias=own_bias)
            wanted = tensors if own_bias is None else [*tensors, own_bias]
            results.append((out, *torch.autograd.grad((out * direction).sum(), wanted)))
        for fused, plain in zip(*results, strict=True):
            assert_close(fused, plain, tolerance * max(1, plain.abs().max().item()))
