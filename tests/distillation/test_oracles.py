"""Our losses against those of other packages, on the same numbers. Skipped where a package is not installed.

TextBrewer's and TRL's are compared in `benchmarks/distillation.py`, which needs them anyway.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from hf_efficient.distillation.losses.losses import kd_loss

ROWS, CLASSES = 12, 50
MASK = torch.arange(ROWS) < 9
LABELS = torch.where(MASK, torch.arange(ROWS), -100)


def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(ROWS, CLASSES, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def torchtune_losses():
    """The file of its losses alone: torchtune 0.6.1, the last one, does not import with torchao above 0.9."""
    spec = find_spec("torchtune")
    if spec is None:
        pytest.skip("needs torchtune")
    path = Path(spec.origin).parent / "modules" / "loss" / "kd_losses.py"
    own = spec_from_file_location("torchtune_kd_losses", path)
    module = module_from_spec(own)
    own.loader.exec_module(module)
    return module


def same(ours, theirs, student):
    """Value and gradient."""
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-3
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_modelopt(temperature):
    losses = pytest.importorskip("modelopt.torch.distill.losses")
    student, teacher = logits()
    total, count = kd_loss(student, teacher, torch.ones(ROWS, dtype=torch.bool), temperature=temperature)
    same(total / count, losses.LogitsDistillationLoss(temperature, reduction="batchmean")(student, teacher), student)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "symmetric"])
def test_torchtune(divergence):
    losses = torchtune_losses()
    student, teacher = logits()

    def ours(kind):
        total, count = kd_loss(student, teacher, MASK, divergence=kind)
        return total / count

    soft = teacher[MASK].softmax(-1)
    entropy = -(soft * soft.log()).sum(-1).mean()  # what its forward loss, a cross-entropy, has more
    if divergence == "forward":
        same(ours("forward") + entropy, losses.ForwardKLLoss()(student, teacher, LABELS), student)
    elif divergence == "reverse":
        same(ours("reverse"), losses.ReverseKLLoss()(student, teacher, LABELS), student)
    else:
        mixed = 0.3 * (ours("forward") + entropy) + 0.7 * ours("reverse")
        same(mixed, losses.SymmetricKLLoss(sym_kd_ratio=0.3)(student, teacher, LABELS), student)
