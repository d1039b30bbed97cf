"""The losses once more, with loops over positions and probabilities instead of tensors of logarithms."""

import math

import torch
from torch import Tensor


def softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(x / temperature) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def divergence(name: str, teacher: list[float], student: list[float], beta: float) -> float:
    if name == "forward":
        return kl(teacher, student)
    if name == "reverse":
        return kl(student, teacher)
    mixture = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def kd(student: Tensor, teacher: Tensor, mask: Tensor, name: str, temperature: float, beta: float) -> float:
    """[batch, length, classes] and a mask [batch, length]."""
    total = 0.0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                p, q = (softmax(x[b, t].tolist(), temperature) for x in (teacher, student))
                total += temperature**2 * divergence(name, p, q, beta)
    return total


def binary_kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """[batch, labels]: KL of the yes/no distribution of each label."""
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x / temperature)) for x in (t, s))
        total += temperature**2 * kl([p, 1 - p], [q, 1 - q])
    return total


def ce(logits: Tensor, labels: Tensor) -> float:
    """[batch, length, classes], labels [batch, length] with -100."""
    total = 0.0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] != -100:
                total -= math.log(softmax(logits[b, t].tolist(), 1.0)[int(labels[b, t])])
    return total


def hidden(student: Tensor, teacher: Tensor, mask: Tensor, kind: str) -> float:
    total = 0.0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                continue
            s, u = student[b, t].tolist(), teacher[b, t].tolist()
            if kind == "mse":
                total += sum((x - y) ** 2 for x, y in zip(s, u, strict=True)) / len(s)
            else:
                dot = sum(x * y for x, y in zip(s, u, strict=True))
                total += 1 - dot / math.sqrt(sum(x * x for x in s) * sum(y * y for y in u))
    return total


def attention(student, teacher, mask: Tensor, causal: bool, kind: str) -> float:
    """Two `Projected` without grouped keys, and a mask [batch, length]."""
    total, heads = 0.0, student.query.shape[1]
    for b, i, seen in _queries(mask, causal):
        for h in range(heads):
            s, t = ([x.scaling * _dot(x.query[b, h, i], x.key[b, h, j]) for j in seen] for x in (student, teacher))
            if kind == "mse":
                total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(seen) / heads
            else:
                total += kl(softmax(t, 1.0), softmax(s, 1.0)) / heads
    return total


def relation(student, teacher, mask: Tensor, causal: bool, heads: int) -> float:
    total = 0.0
    for name in ("query", "key", "value"):
        for b, i, seen in _queries(mask, causal):
            for piece in range(heads):
                rows = []
                for side in (student, teacher):
                    heads_of = getattr(side, name)[b]  # those that several queries share, beside each of them
                    shared = side.query.shape[1] // len(heads_of)
                    flat = torch.cat([heads_of[h // shared] for h in range(side.query.shape[1])], dim=-1)
                    width = flat.shape[-1] // heads
                    own = flat[:, piece * width : (piece + 1) * width]
                    rows.append([_dot(own[i], own[j]) / math.sqrt(width) for j in seen])
                total += kl(softmax(rows[1], 1.0), softmax(rows[0], 1.0)) / heads
    return total


def _queries(mask: Tensor, causal: bool):
    """(example, query, the keys that it sees) for all that is not padding."""
    for b in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            if mask[b, i]:
                yield b, i, [j for j in range(i + 1 if causal else mask.shape[1]) if mask[b, j]]


def _dot(x: Tensor, y: Tensor) -> float:
    return sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))
