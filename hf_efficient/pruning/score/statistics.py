"""What calibration batches say of each unit: derivatives of the loss with respect to masks, in one pass.

A mask multiplies what a unit hands to the linear that reads it: 1 keeps the unit, 0 removes it (Kwon 2022, section 3).
No weight is touched and no weight gradient is computed. What experts in one tensor hand on cannot be seen: there the
mask multiplies the weights that read the unit, which is the same, but is one mask for all rows of a batch.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...io.process import trim_memory
from ...models.groups import Group, Member, output_module, output_weight
from ...models.modes import eval_mode, evaluating
from ...training.progress import told
from ...training.ranks import gather, share, total
from .calibration import Loss, state_mask, wide
from .handing import Batch, forward

MaskGradients = dict[Group, torch.Tensor]


def mask_gradients(
    model: PreTrainedModel,
    groups: list[Group],
    batches: Sequence[Batch],
    loss: Loss,
    beside: "OutputGradients | None" = None,
) -> MaskGradients:
    """`[rows, units]` for each group: d loss / d mask, for every row of every batch.

    `loss(model, batch)` is a scalar summed over the rows of a batch, so that rows do not mix. A unit that got no
    gradient has zeros. Of experts in one tensor the rows of a batch are one row. `beside` takes what it asks for from
    the same pass.
    """
    rows: dict[Group, list[torch.Tensor]] = {group: [] for group in groups}
    places: dict[Group, list[int]] = {group: [] for group in groups}
    own = share(batches)
    with eval_mode(model):
        for place, batch in enumerate(told(own, "calibrate")):
            masks: dict[Group, torch.Tensor] = {}
            with ExitStack() as hooks, torch.enable_grad():
                for group in groups:
                    for member in group.members:
                        if output_weight(model, member).ndim == 3:
                            hooks.enter_context(_masked_experts(model, group, member, masks))
                            continue
                        handle = output_module(model, member).register_forward_pre_hook(masked(group, masks))
                        hooks.callback(handle.remove)
                if beside is not None:
                    beside.watch(hooks)
                scalar = loss(model, batch)
            reached = [group for group in groups if group in masks]
            sources = [masks[group] for group in reached] + (beside.offsets if beside is not None else [])
            everything = torch.autograd.grad(scalar, sources, allow_unused=True)
            gradients = everything[: len(reached)]
            if beside is not None:
                beside.take(everything[len(reached) :])
            for group, gradient in zip(reached, gradients, strict=True):
                if gradient is not None:
                    rows[group].append(wide(gradient).cpu())
                    places[group].append(getattr(batch, "number", place))
            trim_memory()
    rows = {group: gather(parts, places[group]) for group, parts in rows.items()}
    return {group: torch.cat(parts) if parts else torch.zeros(1, group.units) for group, parts in rows.items()}


def masked(group: Group, masks: dict[Group, torch.Tensor]) -> Callable:
    """A hook that multiplies the input `[B, ..., units x width]` of a linear by a mask `[B, units]` of ones."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = args[0]
        if group not in masks:
            masks[group] = torch.ones(len(states), group.units, dtype=states.dtype, device=states.device)
            masks[group].requires_grad_()
        by_unit = states.reshape(len(states), -1, group.units, states.shape[-1] // group.units)
        return (by_unit * masks[group][:, None, :, None]).reshape(states.shape), *args[1:]

    return hook


@contextmanager
def _masked_experts(
    model: PreTrainedModel, group: Group, member: Member, masks: dict[Group, torch.Tensor]
) -> Iterator[None]:
    """The parameter `[experts, ., .]` that reads the units is, for a while, its product with a mask `[1, units]`."""
    module, name = output_module(model, member), member.output.name.rpartition(".")[2]
    weight = module._parameters[name]
    assert weight is not None
    masks[group] = torch.ones(1, group.units, dtype=weight.dtype, device=weight.device, requires_grad=True)
    shape = [1] * weight.ndim
    shape[member.output.dim] = group.units
    del module._parameters[name]
    setattr(module, name, weight.detach() * masks[group].view(shape))
    try:
        yield
    finally:
        delattr(module, name)
        module.register_parameter(name, weight)


class OutputGradients:
    """d loss / d what each module gives, of a forward and backward that may be made for something else as well:

        with ExitStack() as hooks, torch.enable_grad():
            beside.watch(hooks)
            scalar = loss(model, batch)
        beside.take(torch.autograd.grad(scalar, beside.offsets, allow_unused=True))
        beside.calls

    `calls`: of each call of each module its name, what it read, and the gradient, which is zero where the loss does
    not depend on it.
    """

    def __init__(self, modules: Mapping[Hashable, nn.Module]):
        self.modules = modules
        self.offsets: list[torch.Tensor] = []  # zeros, whose gradient is that of the output that they are added to
        self.calls: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self._read: list[tuple[Any, torch.Tensor]] = []

    def watch(self, hooks: ExitStack) -> None:
        self.offsets, self._read = [], []
        for name, module in self.modules.items():
            hooks.callback(module.register_forward_hook(partial(self._add_zeros, name)).remove)

    def take(self, gradients: Iterable[torch.Tensor | None]) -> None:
        self.calls = [
            (name, read, torch.zeros_like(offset) if gradient is None else gradient)
            for (name, read), offset, gradient in zip(self._read, self.offsets, gradients, strict=True)
        ]

    def _add_zeros(self, name: Hashable, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        self.offsets.append(torch.zeros_like(output, requires_grad=True))
        self._read.append((name, args[0].detach()))
        return output + self.offsets[-1]


def output_gradients(
    model: PreTrainedModel, modules: Mapping[Any, nn.Module], batch: Batch, loss: Loss
) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """`OutputGradients.calls` of one batch. No weight gradient is computed."""
    own = OutputGradients(modules)
    with ExitStack() as hooks, torch.enable_grad():
        own.watch(hooks)
        scalar = loss(model, batch)
    own.take(torch.autograd.grad(scalar, own.offsets, allow_unused=True))
    return own.calls


def check_seen(model: PreTrainedModel, groups: list[Group]) -> None:
    """UnsupportedModelError for experts in one tensor, which read what no hook sees."""
    hidden = [group for group in groups for member in group.members if output_weight(model, member).ndim == 3]
    if hidden:
        raise UnsupportedModelError(
            f"What the experts of {hidden[0].name} read cannot be seen, for they are one tensor. Use importance "
            "'fisher', 'taylor' or 'magnitude'."
        )


def input_squares(
    model: PreTrainedModel, groups: list[Group], batches: Sequence[Batch], run: Callable = forward
) -> dict[Group, list[torch.Tensor]]:
    """What the output linears read: for each member of a group `[units x width]`, the sum of x^2 over real tokens.
    `run(model, batch)` is what calls them.

    Raises:
        UnsupportedModelError: experts in one tensor, which read what no hook sees.
    """
    check_seen(model, groups)
    sums: dict[Group, list[torch.Tensor]] = {group: [torch.zeros(1)] * len(group.members) for group in groups}

    def add(batch: Batch, group: Group, number: int, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        states = wide(args[0])
        mask = state_mask(batch, model, group.stack, states)
        squares = (states.square() * mask[..., None]).flatten(0, -2).sum(0)
        sums[group][number] = sums[group][number] + squares.cpu()

    with evaluating(model):
        for batch in told(share(batches), "calibrate"):
            with ExitStack() as hooks:
                for group in groups:
                    for number, member in enumerate(group.members):
                        hook = partial(add, batch, group, number)
                        hooks.callback(output_module(model, member).register_forward_pre_hook(hook).remove)
                run(model, batch)
    reached = {
        (group, number): own for group, all_own in sums.items() for number, own in enumerate(all_own) if len(own) > 1
    }
    places = [(group, number) for group in groups for number in range(len(group.members))]
    for (group, number), everything in total(reached, places).items():
        sums[group][number] = everything
    return sums
