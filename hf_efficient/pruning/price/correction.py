"""The last word of a clock: allocate, time what comes out, ask for more or less, until the time is the wanted one.

Prices of single parts do not quite add up to the time of a whole model. The scores stay as they are, so a correction
costs one measurement and no data; the next amount is the one on the line through the two nearest tries.
"""

from collections.abc import Callable

from transformers.utils import logging

from ...errors import ConfigError
from ...models.groups import Group

Kept = dict[Group, tuple[int, ...]]

CLOSE = 0.03  # of the wanted cost: near enough
FAR = 0.1  # worth a warning
CORRECTIONS = 4

logger = logging.get_logger(__name__)


def correct(
    allocate: Callable[[float], Kept],
    measure: Callable[[Kept], float],
    total: float,
    start: float,
    goal: float,
    most: float,
) -> Kept:
    """What is kept so that the model costs about `goal`.

    Parameters:
        allocate: what is kept if so much leaves, by the price list.
        measure: what a model that keeps this really costs.
        total: the cost of the dense model. start: that of the model from which units leave.
        most: what leaves, by the price list, with all units that can.

    Raises:
        ConfigError: with all of them gone it still costs more.
    """
    amount = min(start - goal, most)
    above, below = [(0.0, start)], list[tuple[float, float]]()  # (amount, cost) of tries on either side of the goal
    tries: list[tuple[float, float, Kept]] = []
    for _ in range(1 + CORRECTIONS):
        kept = allocate(amount)
        cost = measure(kept)
        tries.append((abs(cost / goal - 1), cost, kept))
        if abs(cost / goal - 1) <= CLOSE:
            break
        if cost > goal and amount >= most:
            raise ConfigError(
                f"A speed-up of {total / goal:.2f} is out of reach: with one head and `round_to` neurons in every "
                f"layer the model is {total / cost:.2f} times as fast. Lower `ratio` to at most "
                f"{1 - cost / total:.2f}, or add to `granularity`."
            )
        (above if cost > goal else below).append((amount, cost))
        amount = _next_amount(above, below, goal, most)
    off, cost, kept = min(tries, key=lambda one: one[0])
    if off > FAR:
        logger.warning(
            f"The pruned model is {total / cost:.2f} times as fast instead of {total / goal:.2f}: its units leave in "
            "steps too large for more, or the machine is too busy to measure."
        )
    return kept


def _next_amount(
    above: list[tuple[float, float]], below: list[tuple[float, float]], goal: float, most: float
) -> float:
    """Where the line through two tries meets `goal`: the nearest on both sides, or the last two that cost too much."""
    (x, y), (next_x, next_y) = (above[-2], above[-1]) if not below else (max(above), min(below))
    if next_y >= y:  # noise: more left, and nothing was gained
        return (next_x + most) / 2
    return min(max(x + (y - goal) * (next_x - x) / (y - next_y), 0.0), most)
