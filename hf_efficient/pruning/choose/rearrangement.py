"""Rearrangement (Kwon 2022, section 4.3): which units leave a group, once it is known how many.

Scores alone take units for independent. Two that do the same are each worth little, but not both together: with the
mask gradients g of all rows, removing the set P changes the loss by 1/2 sum over rows of (sum over P of g)^2, of which
the scores hold only the squares. Greedily, as in the paper: begin with the lowest scores; offer each other unit, and
let the member leave whose leaving makes that sum smallest.
"""

import torch


def rearrange(gradients: torch.Tensor, kept: tuple[int, ...]) -> tuple[int, ...]:
    """As many units as `kept`; gradients are `[rows, units]`."""
    units = gradients.shape[1]
    gram = gradients.double().T @ gradients.double()
    removed = torch.ones(units, dtype=torch.bool)
    removed[list(kept)] = False
    shared = gram @ removed.double()  # of each unit with the sum over P
    for unit in gram.diagonal()[list(kept)].argsort().tolist():
        unit = kept[unit]
        removed[unit] = True
        shared = shared + gram[unit]
        without = torch.where(removed, gram.diagonal() - 2 * shared, torch.inf)
        leaves = int(without.argmin())
        removed[leaves] = False
        shared = shared - gram[leaves]
    return tuple((~removed).nonzero().flatten().tolist())
