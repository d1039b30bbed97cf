"""Some tokens drawn from a distribution, with its entropy: a cache of a vocabulary without the bias of the largest k.

    drawn = DrawnTokens.of(logits, k=64, temperature=2.0, generator=generator)        # [..., V] -> ids [..., 1 + k]
    drawn.forward_kl(student_logits)                                                  # [...]

The cross-entropy sum_i p_i (-log q_i) is a mean over tokens i ~ p, so the mean over k draws has the right expected
value and gradient, whatever the tail holds (random sampling distillation, Anshumann et al. 2025). The largest k say of
all others only what they are together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import log_probabilities


@dataclass(frozen=True)
class DrawnTokens:
    """
    Fields:
        ids: the most likely entry, then those drawn with replacement from softmax(logits / temperature): [..., 1 + k].
        entropy: of that distribution, in nats: [...].
    """

    ids: Tensor
    entropy: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float, generator: torch.Generator) -> "DrawnTokens":
        logs = log_probabilities(logits.to(torch.promote_types(logits.dtype, torch.float32)), temperature)
        chances = logs.exp()
        rows = chances.flatten(0, -2)
        drawn = torch.multinomial(rows, k, replacement=True, generator=generator) if len(rows) else rows[:, :k].long()
        drawn = drawn.view(*logits.shape[:-1], k)
        return cls(torch.cat([logits.argmax(-1, keepdim=True), drawn], -1), -(chances * logs).sum(-1), temperature)

    def forward_kl(self, student: Tensor) -> Tensor:
        """An unbiased estimate of KL(teacher || student) of the logits divided by the temperature. It may be below 0.

        Shapes: student [..., V] -> [...].
        """
        # sum_i p_i (-log q_i) = logsumexp(z / T) - sum_i p_i z_i / T. The last is a mean over the draws; ids 0, the
        # argmax, is none of them.
        scaled = student / self.temperature
        crossed = scaled.logsumexp(-1) - scaled.gather(-1, self.ids[..., 1:]).mean(-1)
        return crossed - self.entropy.to(crossed.dtype)
