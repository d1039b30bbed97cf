"""Does a real model that was cut give what the whole one gives when what left contributes nothing?

    check_cut(dense, small, plan, batches[0])

An entry is proven on a tiny model of the same architecture, and what a user has registered is not proven at all. So
the first calibration batch is run by both: in the whole model what reads the units that left has zeros there, experts
that left are never chosen, and layers that left hand on what they are given.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...models.anatomy import Anatomy
from ...models.derive.compare import outputs_of, unlike
from ...models.derive.proof import hand_on
from ...models.mixtures import without_experts
from ...models.modes import eval_mode
from ...models.token_masks import real_inputs
from ..plan import PruningPlan


@torch.no_grad()
def check_cut(dense: Anatomy, small: PreTrainedModel, plan: PruningPlan, batch: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        UnsupportedModelError: it gives something else.
    """
    model = dense.model
    inputs = real_inputs({key: value.to(model.device) for key, value in batch.items()}, model)
    inputs |= {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with eval_mode(model), eval_mode(small):
        with _silenced(dense, plan):
            expected = outputs_of(model, inputs)
        outputs = outputs_of(small, inputs)
    if off := unlike(outputs, expected, inputs):
        raise UnsupportedModelError(
            f"Cut, this {type(model).__name__} gives something else than the whole one without what left ({off}): "
            "what its tiny model proves does not hold for it, or an entry that you have registered is wrong."
        )


@contextmanager
def _silenced(dense: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """The whole model, in which what the plan removes contributes nothing."""
    weights = dense.model.state_dict()
    before: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
    with ExitStack() as hooks:
        try:
            for group in dense.groups:
                gone = sorted(set(range(group.units)) - set(plan.units.get(group.name, range(group.units))))
                for member in group.members if gone else ():
                    weight = weights[f"{member.prefix}.{member.output.name}"]
                    dim, rows = member.output.dim, member.output.rows(torch.tensor(gone), weight)
                    before.append((weight, dim, rows, weight.index_select(dim, rows)))
                    weight.index_fill_(dim, rows, 0)
            for stack in dense.stacks:
                kept = plan.layers.get(stack.name, range(len(stack.layers)))
                for index in set(range(len(stack.layers))) - set(kept):
                    handle = stack.layers[index].register_forward_hook(hand_on, with_kwargs=True, prepend=True)
                    hooks.callback(handle.remove)
            gone = {
                mixture: sorted(set(range(mixture.experts)) - set(plan.units[mixture.name]))
                for mixture in dense.mixtures
                if mixture.name in plan.units
            }
            if gone:
                hooks.enter_context(without_experts(dense.model, gone))
            yield
        finally:
            for weight, dim, rows, values in before:
                weight.index_copy_(dim, rows, values)
