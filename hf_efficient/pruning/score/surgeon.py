"""`obs` of units: how far the answer still moves when a unit is gone and least squares has made up for it.

Optimal Brain Surgeon (Hassibi & Stork 1993), of whole structures as in ZipLM (Kurtic 2023, section 3.1). W `[out, in]`
reads the units of a group, x_t at token t, and g_t = dL/dy_t says how the answer depends on what W gives there, for L
a random direction of the answer. Without the inputs S, all others updated as well as can be, the answer moves by

    tr(G W_S ([H^-1]_SS)^-1 W_S')
    H = sum over t of ||g_t||^2 (x_t - m)(x_t - m)' + lambda I,    G = sum over t of g_t g_t' / sum over t of ||g_t||^2

G and the weights of tokens in H are the two factors of a Kronecker-factored Fisher matrix (Martens & Grosse 2015), so
that errors of all layers count in the same unit. m is the weighted mean where W has a bias, which takes it over.

The cheapest unit leaves, W and H^-1 are updated, then the next, to the last: a score is the price at which its unit
left, and no lower than that of a unit that left before.
"""

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.groups import Group, Member, output_module, output_weight
from ...models.modes import eval_mode
from ...training.progress import told
from ...training.ranks import share, total
from .calibration import Loss, answer_loss, wide
from .finite import check_finite
from .handing import Batch
from .statistics import check_seen, output_gradients

DAMPING = 0.01  # lambda, as a part of the mean of the diagonal
PORTIONS = 256  # of more units than that several leave at once
NUMBERS = 1 << 28  # in the matrices that one pass over the batches fills: 1 GiB

Matrices = dict[Member, list[Tensor]]  # sums over tokens: c x x' [in, in], c x [in], g g' [out, out]


def obs(
    model: PreTrainedModel, groups: list[Group], *, batches: Sequence[Batch], seed: int, **unused
) -> dict[Group, Tensor]:
    """`[units]` for each group, in units of the squared change of the answer.

    Raises:
        DataError: what a linear reads or how the answer depends on it is not finite.
        UnsupportedModelError: experts in one tensor, which read what no hook sees.
    """
    check_seen(model, groups)
    scores = {}
    for portion in _portions(model, groups):
        sums = _collect(model, [member for group in portion for member in group.members], batches, answer_loss(seed))
        for group in portion:
            readers = [_reader(model, member, *sums.pop(member)) for member in group.members]
            scores[group] = prices(readers, group.units)
    return scores


def _portions(model: PreTrainedModel, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups whose matrices are in memory together."""
    portion, numbers = list[Group](), 0
    for group in groups:
        shapes = [output_weight(model, member).shape for member in group.members]
        own = sum(rows**2 + columns**2 for rows, columns in shapes)
        if portion and numbers + own > NUMBERS:
            yield portion
            portion, numbers = [], 0
        portion.append(group)
        numbers += own
    yield portion


def _collect(model: PreTrainedModel, members: Sequence[Member], batches: Sequence[Batch], loss: Loss) -> Matrices:
    modules = {member: output_module(model, member) for member in members}
    sums: Matrices = {}
    for member in members:  # a linear that no batch reaches reads zeros
        weight = wide(output_weight(model, member).detach()).movedim(member.output.dim, -1)
        rows, columns = weight.shape
        sums[member] = [weight.new_zeros(size) for size in ((columns, columns), (columns,), (rows, rows))]
    with eval_mode(model):
        for batch in told(share(batches), "calibrate"):
            for member, read, gradient in output_gradients(model, modules, batch, loss):
                x, g = (wide(one.flatten(0, -2)) for one in (read, gradient))
                weighted = x * g.square().sum(-1, keepdim=True)
                for summed, new in zip(sums[member], (weighted.T @ x, weighted.sum(0), g.T @ g), strict=True):
                    summed += new
    places = [(member, part) for member in members for part in range(3)]
    everything = total({(member, part): sums[member][part] for member, part in places}, places)
    return {member: [everything[member, part] for part in range(3)] for member in members}


def _reader(
    model: PreTrainedModel, member: Member, gram: Tensor, moment: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """sqrt(G) W `[out, in]` and H^-1 `[in, in]`, in float64."""
    check_finite(gram, f"What {member.prefix}.{member.output.name} reads, or how the answer depends on it,")
    gram, moment, spread = gram.double(), moment.double(), spread.double()
    total = spread.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
    if output_module(model, member).bias is not None:
        gram = gram - torch.outer(moment, moment) / total
    weight = output_weight(model, member).detach().movedim(member.output.dim, -1).double()
    values, directions = torch.linalg.eigh(spread / total)  # a norm behind it leaves directions without an effect
    root = values.clamp(min=0).sqrt()[:, None] * directions.T
    return root @ weight, damped_inverse(gram)


def damped_inverse(gram: Tensor) -> Tensor:
    """(gram + lambda I)^-1, for a gram of finite numbers."""
    damped = gram.clone()
    damped.diagonal().add_((DAMPING * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny ** 0.5))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def prices(readers: Sequence[tuple[Tensor, Tensor]], units: int) -> Tensor:
    """`[units]`: the price at which each leaves. `readers` are W `[out, units x width]` and H^-1 of each linear that
    reads the units; both are changed in place."""
    left, highest = torch.arange(units), 0.0
    scores = torch.zeros(units, dtype=torch.float64)
    while len(left):
        errors = sum(_errors(weight, inverse, left, units) for weight, inverse in readers)
        chosen = errors.argsort(stable=True)[: ceil(units / PORTIONS)]
        leaving = left[chosen]
        error = sum(_remove(weight, inverse, leaving, units) for weight, inverse in readers) / len(leaving)
        highest = max(highest, error)
        scores[leaving] = highest
        left = left[~torch.isin(left, leaving)]
    return scores


def _errors(weight: Tensor, inverse: Tensor, left: Tensor, units: int) -> Tensor:
    """Of each of the units that are left, if it alone leaves next."""
    width = weight.shape[1] // units
    columns = weight.unflatten(1, (units, width))[:, left].movedim(0, -1)  # [left, width, out]
    blocks = inverse.view(units, width, units, width)[left, :, left]  # [left, width, width]
    if width == 1:
        return (columns.square().sum(-1) / blocks[..., 0])[:, 0].cpu()
    return (columns * _solve(blocks, columns)).sum((1, 2)).cpu()


def _solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Of symmetric positive matrices. Not by LU: that of MKL hangs on batches of them on some processors."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrices.contiguous()))


def _remove(weight: Tensor, inverse: Tensor, leaving: Tensor, units: int) -> float:
    """Takes units out and updates the rest; the error of that."""
    width = weight.shape[1] // units
    gone = (leaving[:, None] * width + torch.arange(width)).flatten().to(weight.device)
    columns, rows = weight[:, gone], inverse[gone]
    both = _solve(rows[:, gone], torch.cat([columns.T, rows], 1))
    by_columns, by_rows = both.split([len(weight), weight.shape[1]], 1)
    error = float((columns.T * by_columns).sum())
    weight.addmm_(columns, by_rows, alpha=-1)
    inverse.addmm_(rows.T, by_rows, alpha=-1)
    return error
