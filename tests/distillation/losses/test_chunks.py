"""Losses of large logits, some rows at a time: the same numbers and gradients, without the copies."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient.distillation.losses import chunks
from hf_efficient.distillation.losses.chunks import sum_together
from hf_efficient.distillation.losses.losses import ce_loss, ce_rows, kd_loss, kd_rows
from hf_efficient.distillation.losses.tables import DIVERGENCES
from hf_efficient.distillation.losses.top_k import TopLogits
from hf_efficient.models.heads import MULTI_LABEL

from ...helpers import random_examples
from ..tiny import make_pair
from ..training import make_trainer, weights

LOSSES = ["ce", "binary", "top", *DIVERGENCES]


def problem(kind, seed, batch=3, length=5, classes=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(batch, length, classes, generator=generator, dtype=dtype) for _ in range(2))
    mask = torch.rand(batch, length, generator=generator) < 0.7
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    student.requires_grad_()
    if kind == "ce":
        return student, lambda: ce_loss(student, labels, mask)[0]
    if kind == "binary":
        whole = mask[..., None].expand_as(student)
        return student, lambda: kd_loss(student, teacher, whole, problem=MULTI_LABEL)[0]
    if kind == "top":
        top = TopLogits.of(teacher, 3, 2.0)
        return student, lambda: kd_loss(student, top, mask, temperature=2.0)[0]
    return student, lambda: kd_loss(student, teacher, mask, temperature=2.0, divergence=kind)[0]


def value_and_gradient(student, loss, factor=0.3):
    student.grad = None
    value = factor * loss()
    value.backward()
    return value.item(), student.grad


@random_examples(40)
@given(kind=st.sampled_from(LOSSES), seed=st.integers(0, 2**31), chunk=st.integers(1, 60))
def test_chunks_change_nothing(kind, seed, chunk):
    student, loss = problem(kind, seed)
    whole = value_and_gradient(student, loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        cut = value_and_gradient(student, loss)
        with torch.no_grad():
            assert (0.3 * loss()).item() == pytest.approx(whole[0], rel=1e-12, abs=1e-14)
    assert cut[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-14)
    assert torch.allclose(cut[1], whole[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, monkeypatch):
    student, loss = problem("forward", 0, dtype=dtype)
    whole = value_and_gradient(student, loss)
    monkeypatch.setattr(chunks, "CHUNK", 10)
    cut = value_and_gradient(student, loss)
    assert loss().dtype == torch.float32
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    assert cut[1].dtype == dtype and torch.allclose(cut[1], whole[1], rtol=1e-2, atol=1e-3)


def test_nothing_valid_is_a_connected_zero(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 1)
    student = torch.randn(2, 3, 4, requires_grad=True)
    total, count = kd_loss(student, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    total.backward()
    assert total == count == 0 and not student.grad.any()


def test_a_second_backward_is_an_error_rather_than_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 10)
    _, loss = problem("forward", 0)
    value = 0.5 * loss()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        value.backward()


class Largest(TorchDispatchMode):
    """Counts the storages of at least `size` bytes that live at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.live, self.peak = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() >= self.size:
                key = tensor.untyped_storage().data_ptr()
                if key not in self.live:
                    self.live[key] = weakref.ref(tensor.untyped_storage(), lambda _, key=key: self.live.pop(key, None))
        self.peak = max(self.peak, len(self.live))
        return result


@pytest.mark.parametrize("kind", ["ce", "forward", "reverse", "jsd", "top"])
def test_one_copy_of_the_logits_is_made_and_that_is_the_gradient(kind, monkeypatch):
    """Beside the logits of student and teacher. Uncut, there are more: the check can fail."""
    size = 64 * 50 * 400 * 4

    def copies():
        _, loss = problem(kind, 0, 64, 50, 400, torch.float32)
        gc.collect()
        with Largest(int(0.6 * size)) as seen:
            loss().backward()
        return seen.peak

    monkeypatch.setattr(chunks, "CHUNK", 1 << 16)
    inputs = 1 if kind in ("ce", "top") else 2
    assert copies() == inputs + 1
    monkeypatch.setattr(chunks, "CHUNK", 1 << 30)
    assert copies() > inputs + 1


def test_it_is_the_cross_entropy_of_torch(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 5)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 0, 5])
    total, count = ce_loss(logits, labels, labels != -100)
    assert (total / count).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)


# ---- several sums, one gradient -------------------------------------------------------------------------------------


@random_examples(40)
@given(
    kind=st.sampled_from(["top", *DIVERGENCES]),
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 60),
    masks_differ=st.booleans(),
)
def test_sums_together_are_the_sums_apart(kind, seed, chunk, masks_differ):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    one, two = (torch.rand(3, 5, generator=generator) < 0.7 for _ in range(2))
    two = two if masks_differ else one
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    other = TopLogits.of(teacher, 3, 2.0) if kind == "top" else teacher
    options = {"temperature": 2.0, "divergence": "forward" if kind == "top" else kind}
    apart = ce_loss(student, labels, one)[0], kd_loss(student, other, two, **options)[0]
    shares = [0.5, torch.tensor(3.0, dtype=torch.float64)]
    expected = torch.autograd.grad(8 * (shares[0] * apart[0] + shares[1] * apart[1]), student)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        found = sum_together([ce_rows(labels, one), kd_rows(other, two, **options)], student, shares)
    got = torch.autograd.grad(8 * (shares[0] * found[0] + shares[1] * found[1]), student)[0]
    assert [value.item() for value in found] == pytest.approx([value.item() for value in apart], rel=1e-12, abs=1e-14)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_other_shares_than_announced_are_an_error(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 10)
    student = torch.randn(4, 6, requires_grad=True)
    whole = torch.ones(4, dtype=torch.bool)
    sums = [ce_rows(torch.zeros(4, dtype=torch.long), whole), kd_rows(torch.randn(4, 6), whole)]
    first, second = sum_together(sums, student, [1.0, 2.0])
    with pytest.raises(RuntimeError, match="other shares"):
        (first + first + second).backward()


@pytest.mark.cover
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"divergence": "jsd", "temperature": 3.0, "soft_positions": "attended"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "temperature_final": 1.0},
    ],
    ids=["forward", "other masks", "accumulated"],
)
@pytest.mark.parametrize("case", ["llama", "masked", "t5"])
def test_training_with_one_gradient_is_training_with_two(case, more, monkeypatch, tmp_path):
    """`ce` and `kd` of logits that are cut and share their gradient, against those that are not."""
    together = []

    def spy(sums, logits, shares):
        together.append(logits.numel() > chunks.CHUNK)
        return sum_together(sums, logits, shares)

    monkeypatch.setattr("hf_efficient.distillation.sums.sum_together", spy)
    results = []
    for chunk in (1 << 30, 100):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        settings = {"losses": {"ce": 0.5, "kd": 2.0, "hidden": 1.0}, "max_steps": 2} | more
        trainer = make_trainer(case, tmp_path, pair=make_pair(case), **settings)
        trainer.train()
        results.append((weights(trainer.model), trainer.evaluate()["eval_loss"]))
    assert True in together and False in together
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-9, atol=1e-11)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)


def test_both_losses_make_one_copy_of_the_logits(monkeypatch):
    """Apart they make more: the check can fail."""
    size = 64 * 50 * 400 * 4
    monkeypatch.setattr(chunks, "CHUNK", 1 << 16)

    def copies(is_together):
        student, teacher = torch.randn(64, 50, 400, requires_grad=True), torch.randn(64, 50, 400)
        mask, labels = torch.ones(64, 50, dtype=torch.bool), torch.zeros(64, 50, dtype=torch.long)
        sums = [ce_rows(labels, mask), kd_rows(teacher, mask)]
        gc.collect()
        with Largest(int(0.6 * size)) as seen:
            found = sum_together(sums, student, [1.0, 1.0]) if is_together else [each.of(student) for each in sums]
            (found[0] + found[1]).backward()
        return seen.peak

    assert copies(True) == 3 < copies(False)
