"""The loss functions against their naive twins, and what must hold at the edges."""

import pytest
import torch

from hf_efficient.distillation.losses.losses import (
    ce_loss,
    hidden_loss,
    kd_loss,
)
from hf_efficient.distillation.losses.tables import DIVERGENCES, HIDDEN_DISTANCES
from hf_efficient.distillation.terms import LOSSES
from hf_efficient.errors import ConfigError, DataError
from hf_efficient.models.heads import MULTI_LABEL, REGRESSION

from .. import naive

B, T, V = 3, 5, 7


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kd_equals_the_naive_twin(mask, divergence, temperature):
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)
    settings = {"temperature": temperature, "divergence": divergence, "beta": 0.3}
    total, count = kd_loss(student, teacher, mask, **settings)
    assert total.item() == pytest.approx(naive.kd(student, teacher, mask, divergence, temperature, 0.3), rel=1e-12)
    assert count == mask.sum()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_of_kd_is_that_of_finite_differences(mask, divergence):
    student, teacher = logits(B, T, V).requires_grad_(), logits(B, T, V, seed=1)
    settings = {"temperature": 1.7, "divergence": divergence, "beta": 0.3}
    assert torch.autograd.gradcheck(lambda own: kd_loss(own, teacher, mask, **settings)[0], student)


def test_the_divergences_differ(mask):
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)
    values = {kd_loss(student, teacher, mask, divergence=name)[0].item() for name in DIVERGENCES}
    assert len(values) == len(DIVERGENCES)


def test_jsd_is_symmetric_only_in_the_middle(mask):
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)

    def jsd(a, b, beta):
        return kd_loss(a, b, mask, divergence="jsd", beta=beta)[0].item()

    assert jsd(student, teacher, 0.5) == pytest.approx(jsd(teacher, student, 0.5), rel=1e-12)
    assert jsd(student, teacher, 0.2) != pytest.approx(jsd(teacher, student, 0.2), rel=1e-3)


def test_multi_label_and_regression():
    student, teacher = logits(B, V), logits(B, V, seed=1)
    everything = torch.ones(B, V, dtype=torch.bool)
    total, count = kd_loss(student, teacher, everything, problem=MULTI_LABEL, temperature=2.0)
    assert total.item() == pytest.approx(naive.binary_kd(student, teacher, 2.0), rel=1e-12)
    assert count == B * V
    total, _ = kd_loss(student, teacher, everything, problem=REGRESSION, temperature=2.0)
    assert total.item() == pytest.approx(((student - teacher) ** 2).sum().item())


def test_ce_equals_the_naive_twin(mask):
    student = logits(B, T, V)
    labels = torch.where(mask, torch.arange(B * T).view(B, T) % V, -100)
    total, count = ce_loss(student, labels, mask)
    assert total.item() == pytest.approx(naive.ce(student, labels), rel=1e-12)
    assert count == mask.sum()


def test_ce_of_several_labels_and_of_numbers():
    student, targets = logits(B, V), (logits(B, V, seed=2) > 0).double()
    everything = torch.ones(B, V, dtype=torch.bool)
    p = student.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum().item()
    assert ce_loss(student, targets, everything, problem=MULTI_LABEL)[0].item() == pytest.approx(expected)
    squared = ((student - targets) ** 2).sum().item()
    assert ce_loss(student, targets, everything, problem=REGRESSION)[0].item() == pytest.approx(squared)


@pytest.mark.parametrize("kind", HIDDEN_DISTANCES)
def test_hidden_equals_the_naive_twin(mask, kind):
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)
    total, count = hidden_loss(student, teacher, mask, kind=kind)
    assert total.item() == pytest.approx(naive.hidden(student, teacher, mask, kind), rel=1e-12)
    assert count == mask.sum()


def test_an_image_counts_once_with_the_mean_of_its_patches():
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)
    total, count = hidden_loss(student, teacher, torch.ones(B, dtype=torch.bool))
    everything = torch.ones(B, T, dtype=torch.bool)
    assert total.item() == pytest.approx(naive.hidden(student, teacher, everything, "mse") / T)
    assert count == B


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_like_the_student_teaches_nothing(mask, divergence):
    student = logits(B, T, V).requires_grad_()
    total, _ = kd_loss(student, student.detach(), mask, divergence=divergence, temperature=2.0)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12
    for kind in HIDDEN_DISTANCES:
        assert hidden_loss(student, student, mask, kind=kind)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_lies_under_padding_is_never_read(mask, poison):
    def gradients(fill):
        student = torch.where(mask[..., None], logits(B, T, V), fill).requires_grad_()
        teacher = torch.where(mask[..., None], logits(B, T, V, seed=1), fill)
        labels = torch.where(mask, 1, -100)
        total = kd_loss(student, teacher, mask)[0] + hidden_loss(student, teacher, mask)[0]
        total = total + ce_loss(student, labels, mask)[0] + hidden_loss(student, teacher, mask, kind="cosine")[0]
        total.backward()
        return total, student.grad

    (clean, clean_gradient), (total, gradient) = gradients(0.0), gradients(poison)
    assert torch.equal(total, clean)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[~mask].eq(0).all() and gradient[mask].ne(0).any()


def test_nothing_valid_gives_a_zero_that_can_be_trained_on(mask):
    student = logits(B, T, V).requires_grad_()
    nothing = torch.zeros_like(mask)
    parts = [
        ce_loss(student, torch.full((B, T), -100), nothing),
        kd_loss(student, logits(B, T, V, seed=1), nothing),
        hidden_loss(student, logits(B, T, V, seed=1), nothing),
    ]
    assert [(total.item(), int(count)) for total, count in parts] == [(0, 0)] * 3
    sum(total for total, _ in parts).backward()
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_both_models_rule_out_are_harmless(mask, divergence):
    student, teacher = logits(B, T, V), logits(B, T, V, seed=1)
    expected = kd_loss(student, teacher, mask, divergence=divergence)[0]
    never = torch.full((B, T, 2), float("-inf"), dtype=torch.float64)
    wider = torch.cat([student, never], dim=-1).requires_grad_()
    total, _ = kd_loss(wider, torch.cat([teacher, never], dim=-1), mask, divergence=divergence)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert wider.grad.isfinite().all()


def test_the_gradient_keeps_its_size_over_temperatures(mask):
    def norm(temperature, squared):
        student = logits(B, T, V, scale=0.1).requires_grad_()
        teacher = logits(B, T, V, seed=1, scale=0.1)
        kd_loss(student, teacher, mask, temperature=temperature, temperature_squared=squared)[0].backward()
        return student.grad.norm().item()

    for temperature in (2.0, 4.0, 8.0):
        assert norm(temperature, True) == pytest.approx(norm(1.0, True), rel=0.05)
        assert norm(temperature, False) == pytest.approx(norm(1.0, True) / temperature**2, rel=0.05)


def test_half_precision_is_computed_in_float32(mask):
    student, teacher = logits(B, T, V).bfloat16(), logits(B, T, V, seed=1).bfloat16()
    total, _ = kd_loss(student, teacher, mask)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(naive.kd(student, teacher, mask, "forward", 1.0, 0.5), rel=1e-5)


def test_errors(mask):
    with pytest.raises(DataError, match="does not fit"):
        kd_loss(logits(B, T + 1, V), logits(B, T + 1, V), mask)
    with pytest.raises(ConfigError, match="forward"):
        kd_loss(logits(B, T, V), logits(B, T, V), mask, divergence="forwards")
    with pytest.raises(ConfigError, match="cosine"):
        hidden_loss(logits(B, T, V), logits(B, T, V), mask, kind="cos")


def test_the_table():
    assert list(LOSSES) == ["ce", "kd", "hidden", "attention", "relation", "attention_output", "embedding"]
    assert [name for name, loss in LOSSES.items() if not loss.needs_teacher] == ["ce"]
