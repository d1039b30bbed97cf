"""Is what is said of a mixture of experts right? Some experts of each layer are cut out of the tiny model, which must
then give what it gives where the router's scores of these are -inf.

prove_experts(trial)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..block import StackBlock
from ..cutting import cut_experts
from ..mixtures import Mixture, without_experts
from ..stacks import mixtures_of, model_stacks
from .compare import outputs_of
from .roles import NotDerivable
from .trial import Trial


def prove_experts(trial: Trial) -> None:
    """In each layer another expert of each group leaves; stacks whose number is one field lose them together.

    Raises:
        NotDerivable: it gives something else, or nothing shows that it does not.
    """
    model, own = trial.model, mixtures_of(trial.stack)
    if not own or own[0].fewest > own[0].experts - own[0].groups:
        raise NotDerivable("a tiny model has too few experts that any could leave")
    mixtures = [one for stack in model_stacks(model, trial.family) for one in mixtures_of(stack)]
    mixtures = [one for one in mixtures if one.field == own[0].field]
    gone, kept = {}, {}
    for number, mixture in enumerate(mixtures):
        size = mixture.experts // mixture.groups
        gone[mixture] = [group * size + number % size for group in range(mixture.groups)]
        kept[mixture.name] = [expert for expert in range(mixture.experts) if expert not in gone[mixture]]
    fields = own[0].entry.fields(trial.stack.sizes, len(kept[own[0].name]))
    with _numbered(model, mixtures):
        state = cut_experts(model.state_dict(), mixtures, kept)
        small = trial.rebuilt(StackBlock(), state, **trial.stack.changed({}, fields))
        whole = outputs_of(model, trial.inputs)
        with without_experts(model, gone):
            wanted = outputs_of(model, trial.inputs)
        trial.compare(small, wanted, "without some experts")
        replace(trial, expected=whole).check_matters(wanted, "without some experts")


@contextmanager
def _numbered(model: PreTrainedModel, mixtures: Sequence[Mixture]) -> Iterator[None]:
    """What has one number for each expert, such as a bias of zeros, is unlike for all of them for a while."""
    state = model.state_dict(keep_vars=True)
    names = {mixture.path(name) for mixture in mixtures for name in mixture.entry.rows}
    rows = [state[name] for name in names if name in state and state[name].is_floating_point()]
    rows = [row for row in rows if row.numel() == max(row.shape)]
    before = [row.detach().clone() for row in rows]
    try:
        with torch.no_grad():
            for row in rows:
                row.add_(torch.linspace(0.1, -0.1, row.numel()).view(row.shape))
        yield
    finally:
        with torch.no_grad():
            for row, values in zip(rows, before, strict=True):
                row.copy_(values)
