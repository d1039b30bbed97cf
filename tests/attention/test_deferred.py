"""Attention that a module writes out itself: however it is written, our attention is called with what it says."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient import AttentionConfig, UnsupportedModelError
from hf_efficient.attention.config import MAX_WINDOW
from hf_efficient.attention.dispatch import attach
from hf_efficient.attention.variant import HeadShape
from hf_efficient.attention.watched import route, routing

B, H, T, D = 2, 4, 11, 8
LOW = torch.finfo(torch.float64).min
WIDE, NARROW = (AttentionConfig("local", window=window, global_tokens=0) for window in (MAX_WINDOW, 2))


class Written(nn.Module):
    """A module whose attention is one of the functions below."""

    is_causal = False

    def __init__(self, code):
        super().__init__()
        self.code, self.dropout, self.softmax = code, nn.Dropout(0.0), nn.Softmax(dim=-1)

    def forward(self, query, key, value, mask, output_attentions=False):
        return self.code(self, query, key, value, mask)


def plain(self, query, key, value, mask):
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(D) + mask
    weights = self.dropout(F.softmax(scores, dim=-1))
    return weights @ value, weights


def flat(self, query, key, value, mask):  # OPT, XGLM, BART
    query, key, value = (one.reshape(B * H, T, D) for one in (query * D**-0.5, key, value))
    scores = torch.bmm(query, key.transpose(1, 2))
    assert scores.size() == (B * H, T, T)
    scores = scores.view(B, H, T, T) + mask
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).view(B * H, T, T)
    kept = F.softmax(scores, dim=-1, dtype=torch.float64).to(value.dtype).view(B, H, T, T)
    output = torch.bmm(F.dropout(kept.view(B * H, T, T), 0.1, self.training), value)
    return output.view(B, H, T, D), kept


def added(self, query, key, value, mask):  # BLOOM, GPT-NeoX-Japanese
    slopes = torch.arange(B * H, dtype=query.dtype)[:, None, None] * torch.arange(T)[None, None] / 50
    query, key = (one.reshape(B * H, T, D) for one in (query, key))
    scores = slopes.baddbmm(batch1=query, batch2=key.transpose(1, 2), beta=1.0, alpha=0.3).view(B, H, T, -1)
    weights = (scores + mask).softmax(-1)
    return torch.bmm(weights.view(B * H, T, T), value.reshape(B * H, T, D)).view(B, H, T, D), weights


def summed(self, query, key, value, mask):  # Funnel, XLNet: tokens before heads
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    scores = torch.einsum("bind,bjnd->bnij", query, key) * 0.2
    weights = torch.softmax(scores + mask, dim=3)
    return torch.einsum("bnij,bjnd->bind", weights, value).transpose(1, 2), weights


def filled(self, query, key, value, mask):  # MPT, CPM-Ant, GPT-Neo
    scores = (query * 0.3) @ key.mT
    scores = torch.where(mask == 0, scores, torch.tensor(LOW, dtype=scores.dtype))
    weights = self.softmax(scores.float() if scores.dtype == torch.half else scores)
    return torch.matmul(torch.masked_fill(weights, mask < 0, torch.scalar_tensor(0)), value), weights


def multiplied(self, query, key, value, mask):  # GPT
    scores, kept = torch.matmul(query, key.mT) / 3, (mask == 0).to(query.dtype)
    weights = nn.Softmax(dim=-1)(scores * kept + -1e4 * (1 - kept))
    return weights @ value, weights


def changed(self, query, key, value, mask):  # in place
    scores = query @ key.mT
    scores /= 3
    scores.masked_fill_(mask < 0, LOW)
    weights = scores.softmax(dim=-1)
    return weights @ value, weights


def windowed(self, query, key, value, mask):  # Swin: as many masks as windows, scales of heads
    scores = (query @ key.mT) * torch.linspace(0.1, 0.4, H, dtype=query.dtype)[:, None, None]
    scores = scores + torch.arange(H, dtype=query.dtype)[None, :, None, None] * torch.eye(T, dtype=query.dtype)
    scores = scores.view(1, B, H, T, T) + mask.expand(B, 1, T, T)[None]
    weights = scores.view(-1, H, T, T).softmax(-1)
    return weights @ value, weights


def shifted(self, query, key, value, mask):  # LayoutLMv3: the largest score becomes 0
    scores = (query @ key.mT) / 5 + mask
    scores = (scores - scores.amax(dim=-1).unsqueeze(-1)) * 2
    weights = scores.softmax(-1)
    return weights @ value, weights


def fused(self, query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask == 0, scale=0.2), None


def shared(self, query, key, value, mask):  # Falcon: one key/value head
    weights = (query @ key[:, :1].transpose(-1, -2) * 0.2 + mask).softmax(-1)
    return weights @ value[:, :1], weights


def whole(self, query, key, value, mask):  # one function of torch, with projections that change nothing
    query, key, value = (one.permute(2, 0, 1, 3).reshape(T, B, H * D) for one in (query, key, value))
    same, none = torch.eye(H * D, dtype=query.dtype), torch.zeros(H * D, dtype=query.dtype)
    hidden = (mask < 0)[:, 0, 0]
    output, _ = F.multi_head_attention_forward(
        *(query, key, value, H * D, H, same.repeat(3, 1), none.repeat(3), None, None, False, 0.0, same, none),
        key_padding_mask=hidden,
    )
    return output.view(T, B, H, D).permute(1, 2, 0, 3), None


CODES = plain, flat, added, summed, filled, multiplied, changed, windowed, shifted, fused, shared, whole


def tensors():
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    hidden = torch.zeros(B, 1, 1, T, dtype=torch.bool)
    hidden[0, ..., 8:] = True
    return query, key, value, torch.zeros(B, 1, T, T, dtype=torch.float64).masked_fill(hidden, LOW)


def converted(code, config=WIDE, **kwargs):
    module = Written(code).eval()
    route(module)
    attach(module, config, HeadShape(H, H, D), **kwargs)
    return module


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_however_it_is_written_all_in_view_is_the_same(code):
    given = tensors()
    wanted, _ = Written(code).eval()(*given)
    output, weights = converted(code)(*given)
    torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
    assert weights is None
    noise = torch.randn_like(wanted)
    for left, right in zip(
        *(torch.autograd.grad((one * noise).sum(), given[:3]) for one in (output, wanted)), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_a_window_is_that_of_the_written_scores(code):
    """Told apart from the scores that are computed by the module's own steps, with what is too far away hidden."""
    given = tensors()
    far = (torch.arange(T)[:, None] - torch.arange(T)).abs() > 2
    seen = []

    def attend(watch, weights, value):
        seen.append(weights.shape)
        return weights.tensor(lambda scores: scores.masked_fill(far, LOW)) @ value

    module = Written(code).eval()
    with routing([module], attend):
        wanted, _ = module(*given)
    assert len(seen) == 1 and type(module) is Written
    output, _ = converted(code, NARROW)(*given)
    for left, right, others in zip(output, wanted, module(*given)[0], strict=True):
        torch.testing.assert_close(
            left[:, :8], right[:, :8], rtol=1e-9, atol=1e-9
        )  # the others are padding in one row
        assert not torch.allclose(left[:, :8], others[:, :8], atol=1e-2)


def test_weights_come_where_they_are_asked_for():
    given = tensors()
    _, wanted = Written(flat).eval()(*given)
    _, weights = converted(flat)(*given, output_attentions=True)
    torch.testing.assert_close(weights, wanted, rtol=1e-9, atol=1e-9)
    _, narrow = converted(flat, NARROW)(*given, True)
    assert narrow.shape == wanted.shape and (narrow == 0).sum() > (wanted == 0).sum()


def squared(self, query, key, value, mask):
    return (query @ key.mT * 0.1 + mask).softmax(-1).square() @ value, None


def sines(self, query, key, value, mask):
    return (torch.sin(query @ key.mT) + mask).softmax(-1) @ value, None


def by_queries(self, query, key, value, mask):
    return (query @ key.mT + mask).softmax(-2) @ value, None


def twice(self, query, key, value, mask):
    return plain(self, query, key, value, mask)[0] + sines(self, query, key, value, mask)[0], None


def none(self, query, key, value, mask):
    return query @ (key.mT @ value), None


def uneven(self, query, key, value, mask):  # weights that are hidden after the softmax, but were not before
    return (query @ key.mT).softmax(-1).masked_fill(mask < 0, 0) @ value, None


@pytest.mark.parametrize("code", [squared, sines, by_queries, twice, none, uneven], ids=lambda code: code.__name__)
def test_what_is_no_such_attention_is_an_error(code):
    given = tensors()
    Written(code)(*given)
    with pytest.raises(UnsupportedModelError, match="Written computed its attention itself in a way that cannot"):
        converted(code)(*given)


def test_what_is_not_known_is_computed_as_it_would_be():
    """Scores that are read beside, or written into."""

    def code(self, query, key, value, mask):
        scores = query @ key.mT
        read = scores.std(), scores.mT.sum(), torch.cat([scores, scores]).mean(), scores[0, 0, 0].max(), scores.shape
        scores[:, :, 0] = 1.0
        return (scores.mT.contiguous() @ value), read

    given, noted = tensors(), []

    def beside(self, query, key, value, mask):
        noted.append(code(self, query, key, value, mask))
        return plain(self, query, key, value, mask)

    wanted, read = code(None, *given)
    converted(beside)(*given)
    torch.testing.assert_close(noted[0][0].tensor(), wanted)  # a product of matrices, which may become attention
    assert noted[0][1] == read


def test_no_tensor_of_all_pairs_is_made():
    def code(self, query, key, value, mask):
        weights = ((query @ key.mT) / 3).view(1, 512, 512).softmax(-1)
        return self.dropout(weights) @ value.view(1, 512, D), weights

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and 0 not in output.stride():
                self.numel = max(self.numel, output.numel())
            return output

    def largest(module):
        with torch.no_grad(), Largest() as mode:
            module(*torch.randn(3, 1, 1, 512, D), None)
        return mode.numel

    module = Written(code).eval()
    assert largest(module) == 512 * 512
    route(module)
    attach(module, AttentionConfig("local", window=8, global_tokens=0), HeadShape(1, 1, D))
    assert largest(module) < 512 * 512 / 4


def test_dropout_is_that_of_the_module():
    given = tensors()
    module = converted(flat, NARROW)
    without = module(*given)[0]
    module.train()
    assert not torch.equal(module(*given)[0], without)
    many = torch.stack([module(*given)[0] for _ in range(400)]).mean(0)
    assert (many - without).abs().max() < 0.2


def test_without_a_variant_it_is_the_stock_module_and_copies_are_of_the_same_class():
    given, module = tensors(), Written(plain).eval()
    wanted = module(*given)[0]
    route(module)
    assert type(module) is not Written and isinstance(module, Written) and type(module).__name__ == "Written"
    assert torch.equal(module(*given)[0], wanted)
    attach(module, NARROW, HeadShape(H, H, D))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module)
        assert torch.equal(again(*given)[0], module(*given)[0])


@pytest.mark.parametrize("kind", ["linear", "strided"])
def test_masks_that_say_no_more_than_padding_and_order_are_obeyed_by_kinds_without_pairs(kind):
    query, key, value, mask = tensors()
    mask = mask.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), LOW)
    module = converted(plain, AttentionConfig(kind), cross=True)
    module.is_causal = True
    output, _ = module(query, key, value, mask)
    rows = converted(plain, AttentionConfig(kind), cross=True)
    rows.is_causal = True
    torch.testing.assert_close(output[1:], rows(*(one[1:] for one in (query, key, value)), mask[1:])[0])
    short, _ = rows(*(one[:1, :, :8] for one in (query, key, value)), mask[:1, :, :8, :8])
    torch.testing.assert_close(output[:1, :, :8], short)
    if kind == "linear":
        with pytest.raises(UnsupportedModelError, match="takes a 2D attention_mask"):
            module(query, key, value, mask + torch.eye(T))


@pytest.mark.parametrize("name", ["view", "masked_fill", "softmax"])
def test_methods_that_an_exporter_has_replaced_are_known(name, monkeypatch):
    """As transformers' exporters do, by functions that are all called `patch`."""
    original = getattr(torch.Tensor, name)

    def patch(tensor, *args, **kwargs):
        return original(tensor, *args, **kwargs)

    def written(self, query, key, value, mask):
        scores = (query.reshape(B * H, T, D) @ key.reshape(B * H, T, D).mT).view(B, H, T, T)
        return scores.masked_fill(mask < 0, LOW).softmax(-1) @ value, None

    given = tensors()
    wanted, _ = Written(written).eval()(*given)
    monkeypatch.setattr(torch.Tensor, name, patch)
    output, _ = converted(written)(*given)
    torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)


def test_what_an_exporter_asks_of_scores_is_no_other_use_of_them(monkeypatch):
    """Its functions ask of their tensors whether they are complex, before they call torch's."""
    original = torch.unsqueeze

    def patch(tensor, dim):
        assert not torch.is_complex(tensor)
        return original(tensor, dim)

    def written(self, query, key, value, mask):
        weights = (query @ key.mT * 0.3 + mask).softmax(-1)
        return torch.unsqueeze(weights, 0).squeeze(0) @ value, None

    given = tensors()
    wanted, _ = Written(written).eval()(*given)
    monkeypatch.setattr(torch, "unsqueeze", patch)
    output, _ = converted(written)(*given)
    torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
