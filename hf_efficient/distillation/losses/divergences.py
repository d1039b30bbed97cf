"""Distances between a teacher's and a student's distribution, row by row, from log-probabilities.

    forward  KL(p || q) = sum_i p_i (log p_i - log q_i)            Hinton et al. 2015 (p teacher, q student)
    reverse  KL(q || p)                                            MiniLLM, Gu et al. 2023
    jsd      b KL(p || m) + (1 - b) KL(q || m), m = b p + (1-b) q  generalised Jensen-Shannon, GKD, Agarwal et al. 2023

    divergence = jensen_shannon(teacher_log_probs, student_log_probs, beta=0.5)     # [..., classes] -> [...]

`jsd` tends to 0, not to a KL, as `beta` goes to 0 or 1: the two KLs have their own names.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Stands for log 0. Its exp is 0, and 0 times it is 0, where 0 times -inf would be NaN.
LOG_ZERO = -1e30


def log_probabilities(logits: Tensor, temperature: float = 1.0, *, binary: bool = False) -> Tensor:
    """log softmax(logits / temperature); `binary`: each logit is its own yes/no question, [...] -> [..., 2]."""
    scaled = logits / temperature
    if binary:
        scaled = torch.stack([scaled, torch.zeros_like(scaled)], dim=-1)
    return scaled.log_softmax(dim=-1).clamp_min(LOG_ZERO)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class _ForwardKL(torch.autograd.Function):
    """The sum over all rows of KL(p || q), from logits: the gradient, (q - p) / T, is at hand once both are known."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        difference = log_probabilities(teacher, temperature)  # log p: [rows, V], as all below
        log_q = log_probabilities(student, temperature)
        p = difference.exp()
        # Three tensors of that size at most: the differences take the place of log p, the gradient that of log q, and
        # `dot` needs no product.
        total = torch.dot(p.flatten(), difference.sub_(log_q).flatten())
        ctx.gradient = log_q.exp_().sub_(p).div_(temperature) if ctx.needs_input_grad[0] else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * output, None, None


def forward_kl_of_logits(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`forward_kl(...).sum()` of softmax(logits / temperature), in half the time and a third of the memory.

    Shapes: [..., classes] both -> []. Gradients go to the student's logits alone.
    """
    return _ForwardKL.apply(student, teacher, temperature)


def forward_kl(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    return kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    return kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    # log m = log(exp(log b + log p) + exp(log(1 - b) + log q)), which neither overflows nor loses small numbers
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
