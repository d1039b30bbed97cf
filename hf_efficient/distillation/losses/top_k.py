"""The k largest logits of a distribution and its log-sum-exp: what a cache keeps of a vocabulary.

    top = TopLogits.of(logits, k=64, temperature=2.0)        # [..., V] -> ids, logits [..., k]
    teacher, student = top.buckets(student_logits)           # log-probabilities [..., k + 1]

The teacher's probabilities of the k entries are exact. What is left is one more bucket, the sum of all other entries:
a divergence of the buckets is never above that of the whole distributions (data processing inequality), and equal to
it where both models spread the rest alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopLogits:
    """
    Fields:
        ids, logits: of the k largest logits, largest first: [..., k].
        log_sum_exp: of all logits divided by `temperature`: [...].
    """

    ids: Tensor
    logits: Tensor
    log_sum_exp: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> "TopLogits":
        values, ids = logits.topk(k, dim=-1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cls(ids, values, (wide / temperature).logsumexp(-1), temperature)

    def where(self, mask: Tensor) -> "TopLogits":
        return TopLogits(self.ids[mask], self.logits[mask], self.log_sum_exp[mask], self.temperature)

    def buckets(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of teacher and student, of the k entries and of all others together: [..., k + 1]."""
        wide = torch.promote_types(self.logits.dtype, student.dtype)
        own = self.logits.to(wide) / self.temperature - self.log_sum_exp[..., None].to(wide)
        scaled = student / self.temperature
        other = scaled.gather(-1, self.ids) - scaled.logsumexp(-1, keepdim=True)
        return _with_rest(own), _with_rest(other)


def _with_rest(log_probabilities: Tensor) -> Tensor:
    # log(1 - mass) by expm1, since mass is close to 1 for a sure teacher; where it is 1 to rounding the rest would be
    # log 0, so it is held below.
    eps = torch.finfo(log_probabilities.dtype).eps  # the least that 1 - mass can be told from 0
    mass = log_probabilities.logsumexp(-1, keepdim=True).clamp_max(-eps)
    return torch.cat([log_probabilities, torch.log(-torch.expm1(mass))], dim=-1)
