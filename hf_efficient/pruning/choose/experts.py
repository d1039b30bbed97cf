"""Which experts stay: of every mixture as many, since a stock config has one number, and of every group of a router.

kept = choose_experts(scores, costs.experts, remove)
"""

from collections.abc import Mapping

import torch

from ...errors import ConfigError
from ...models.mixtures import Mixture
from .allocation import ROUNDING

ExpertScores = dict[Mixture, torch.Tensor]  # [experts]


def choose_experts(
    scores: ExpertScores, costs: Mapping[Mixture, float], remove: float
) -> dict[Mixture, tuple[int, ...]]:
    """Those of the highest scores, so few that at least the amount `remove` leaves. Mixtures of several sizes keep
    about the same part.

    Raises:
        ConfigError: too few can leave.
    """
    steps = max((len(mixture.counts()) for mixture in scores), default=1) - 1
    for step in range(1, steps + 1):
        counts = {mixture: _count(mixture, step / steps) for mixture in scores}
        if sum(costs[one] * (one.experts - count) for one, count in counts.items()) > remove - ROUNDING:
            return {mixture: _best(mixture, scores[mixture], count) for mixture, count in counts.items()}
    raise ConfigError(
        "This ratio cannot be reached: every router keeps at least one expert, or two in each of its groups. Lower "
        "`ratio`, or add to `granularity`."
    )


def _count(mixture: Mixture, part: float) -> int:
    """How many are left when this part of those that may leave has left."""
    counts = mixture.counts()
    return counts[round(part * (len(counts) - 1))]


def _best(mixture: Mixture, scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """The best of each group, of equal ones the first."""
    by_group = scores.view(mixture.groups, -1)
    order = by_group.sort(dim=1, descending=True, stable=True).indices[:, : count // mixture.groups]
    first = torch.arange(mixture.groups)[:, None] * by_group.shape[1]
    return tuple(sorted((order + first).flatten().tolist()))
