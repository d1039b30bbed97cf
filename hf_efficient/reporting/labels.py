"""Where the names of a chart's points stand: beside, above or below, on as little else as can be.

chosen = place_labels([[(0, 0, 30, 9), (0, 20, 30, 29)]], taken=[(10, 5, 12, 7)], frame=(0, 0, 100, 50))     # [1]
"""

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, low, right, high: of the two numbers on an axis the smaller one first


def place_labels(choices: Sequence[Sequence[Box]], taken: Sequence[Box], frame: Box) -> list[int]:
    """Which of its boxes each name gets, in turn: the first of those that share least with what is there.

    Parameters:
        choices: the boxes that each name could have, the best looking first.
        taken: what is drawn: dots, error bars. frame: what leaves it is worst.
    """
    taken, chosen = list(taken), []
    for boxes in choices:
        costs = [_shared(box, taken) + 100 * _outside(box, frame) for box in boxes]
        chosen.append(costs.index(min(costs)))
        taken.append(boxes[chosen[-1]])
    return chosen


def _shared(box: Box, taken: Sequence[Box]) -> float:
    left, low, right, high = box
    return sum(
        max(0, min(right, other[2]) - max(left, other[0])) * max(0, min(high, other[3]) - max(low, other[1]))
        for other in taken
    )


def _outside(box: Box, frame: Box) -> float:
    left, low, right, high = frame
    return max(0, left - box[0]) + max(0, low - box[1]) + max(0, box[2] - right) + max(0, box[3] - high)
