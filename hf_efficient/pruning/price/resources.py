"""What it takes to prune a model from its folder, layer by layer: memory, disk and time, from shapes alone.

    needs = predict(model, plan, rows=256, length=512, batch_size=16)        # the model may be on the meta device
    needs.memory_bytes, needs.disk_bytes, needs.seconds

Memory is that of the phase that needs most, beside what Python and its libraries take:

    embedding and head     weights outside of the layers, logits of a portion of rows (five copies)
    back through a layer   its weights, and what a batch leaves in it for the gradient
    fitting a layer        its weights as they were and as they will be, and for the widest block of n inputs four
                           float64 matrices [n, n] and five [n, hidden]

Time is that of the multiplications at the speed that a product of two matrices has here: one forward, one back (a
forward and a gradient), one more of the dense model for what the fit aims at, two and a third of the pruned one, the
products x x' of the fit, and the solutions of its equations.
"""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ...models.groups import Group, output_weight
from ...reporting.numbers import format_bytes
from ..plan import PruningPlan

PROCESS = 430 << 20  # bytes of Python, torch and transformers
LOGITS = 1 << 26  # numbers in the logits of the rows that go through the head together: 256 MiB in float32
COPIES = 5  # of them at once: in the dtype of the model, in float32, their softmax, two gradients
LAMBDAS = 6  # systems of equations for each block: five to choose from, and the last
SIZE = 1536  # of the matrices whose product is timed


@dataclass(frozen=True)
class Resources:
    """Predicted needs. `seconds` holds for this machine, and for as many threads as there are now."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    rows: int
    length: int


def predict(model: PreTrainedModel, plan: PruningPlan, rows: int, length: int, batch_size: int) -> Resources:
    """For a plan with a forecast, and `rows` texts of `length` tokens in batches.

    Parameters:
        model: the dense one, with weights or without.
    """
    assert plan.forecast is not None
    after, anatomy = plan.forecast, Anatomy.of(model)
    stack, item = anatomy.stacks[0], torch.empty((), dtype=model.dtype).element_size()
    kept = 1 - after.removed_macs
    layer = max((row.parameters_before for row in after.layers), default=0) * item
    outside = (after.parameters_before - sum(row.parameters_before for row in after.layers)) * item
    tokens, batch = rows * length, batch_size * length
    output = model.get_output_embeddings()
    classes = 1 if output is None else output.weight.shape[0]
    logits = max(1, min(batch_size, LOGITS // (length * classes))) * length * classes * 4
    widths = [_inputs(anatomy, group, plan) for group in anatomy.groups]
    widest, hidden = max(widths, default=0), stack.width
    inner = sum(row.neurons_before for row in after.layers) // max(1, len(after.layers))
    activations = batch * (24 * hidden + 6 * inner) * item
    fit = 8 * (4 * widest**2 + 5 * widest * hidden) + batch * 4 * (2 * widest + 2 * hidden)
    states = batch * hidden * item
    memory = PROCESS + max(outside + COPIES * logits, layer + activations, int(layer * (1 + kept)) + fit) + 4 * states
    disk = (stack.depth + 6) * tokens * hidden * item + after.weight_bytes
    macs = after.macs_before * rows * (4 + 7 / 3 * kept) + tokens * sum(width**2 for width in widths)
    solving = sum(LAMBDAS * (width**3 / 3 + width**2 * hidden) for width in widths)
    seconds = macs / _macs_per_second(model.dtype) + solving / _macs_per_second(torch.float64)
    return Resources(memory, disk, seconds, rows, length)


def resources_line(needs: Resources) -> str:
    """For a terminal."""
    minutes = needs.seconds / 60
    time_here = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
    return (
        f"\nFrom its folder, layer by layer, with {needs.rows:,} texts of {needs.length:,} tokens: about "
        f"{format_bytes(needs.memory_bytes)} of memory, {format_bytes(needs.disk_bytes)} of disk, {time_here} here."
    )


def _inputs(anatomy: Anatomy, group: Group, plan: PruningPlan) -> int:
    """The inputs that are left of the linear that reads a group."""
    member = group.members[0]
    whole = output_weight(anatomy.model, member).shape[member.output.dim]
    return whole * len(plan.units.get(group.name, range(group.units))) // group.units


def _macs_per_second(dtype: torch.dtype) -> float:
    """Of a product of two matrices, the best of three."""
    left, right = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return SIZE**3 / best
