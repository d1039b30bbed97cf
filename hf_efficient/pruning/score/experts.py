"""How much each expert of a mixture matters: one score for each, larger is more important.

- `reap`: the mean over the tokens that are routed to an expert of g ||f(x)||, its gate times the norm of what it
  gives: router-weighted expert activation (REAP, Lasby 2025). An expert that no token is routed to has 0.
- `frequency`: how many tokens are routed to it.
- `random`: uniform noise, a control.

Tokens are the real ones of calibration batches: padding has no part, on either side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.anatomy import Anatomy
from ...models.mixtures import Mixture
from ...models.modes import evaluating
from ...training.progress import told
from ..config import PruningConfig
from ..methods import EXPERT_IMPORTANCES
from .calibration import state_mask, wide
from .finite import check_finite
from .handing import Batch, forward

ExpertScores = dict[Mixture, Tensor]  # [experts], float64 on the CPU
TOKENS = 4096  # that an expert is given at once
UNSEEN = 1e-6  # of the largest number: a difference that is rounding


def reap(anatomy: Anatomy, mixtures: Sequence[Mixture], *, batches: Sequence[Batch], **unused) -> ExpertScores:
    """`[experts]` mean gate times norm."""
    return {one: total / counts.clamp(min=1) for one, (total, counts) in _routed(anatomy, mixtures, batches).items()}


def frequency(anatomy: Anatomy, mixtures: Sequence[Mixture], *, batches: Sequence[Batch], **unused) -> ExpertScores:
    """`[experts]` numbers of tokens."""
    return {one: counts for one, (_, counts) in _routed(anatomy, mixtures, batches).items()}


def random(anatomy: Anatomy, mixtures: Sequence[Mixture], *, seed: int, **unused) -> ExpertScores:
    """`[experts]` noise."""
    generator = torch.Generator().manual_seed(seed)
    return {one: torch.rand(one.experts, generator=generator, dtype=torch.float64) for one in mixtures}


def score_experts(
    anatomy: Anatomy, mixtures: Sequence[Mixture], config: PruningConfig, batches: Sequence[Batch]
) -> ExpertScores:
    """By `config.expert_importance`; DataError for scores that are not finite."""
    scores = EXPERT_IMPORTANCES[config.expert_importance](anatomy, mixtures, batches=batches, seed=config.seed)
    for mixture, values in scores.items():
        check_finite(values, f"The {config.expert_importance} scores of {mixture.name}")
    return scores


Sums = dict[Mixture, tuple[Tensor, Tensor]]  # of each expert: gates times norms, and tokens


def _routed(anatomy: Anatomy, mixtures: Sequence[Mixture], batches: Sequence[Batch]) -> Sums:
    """Sums over the real tokens that are routed to each expert."""
    sums: Sums = {one: (torch.zeros(one.experts).double(), torch.zeros(one.experts).double()) for one in mixtures}
    with evaluating(anatomy.model):
        for batch in told(batches, "calibrate"):
            with ExitStack() as hooks:
                for mixture in mixtures:
                    hooks.enter_context(_watching(anatomy, mixture, batch, sums[mixture]))
                forward(anatomy.model, batch)
    return sums


@contextmanager
def _watching(anatomy: Anatomy, mixture: Mixture, batch: Batch, sums: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Adds to the sums what one forward says of a mixture: what its experts are given tells it, where that is states
    `[tokens, width]` with numbers of experts and gates `[tokens, k]`; else what is missing without an expert."""
    model, entry = anatomy.model, mixture.entry
    seen = False

    def real(states: Tensor) -> Tensor:
        return state_mask(batch, model, mixture.stack, states).flatten().bool()

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal seen
        if (call := _call(args, kwargs)) is not None:
            seen = True
            states, chosen, gates = call
            _add_routed(module.forward, states, chosen, gates, real(states), sums)

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not seen:
            _add_missing(model, mixture, partial(module.forward, *args, **kwargs), output, real, sums)

    experts, block = (model.get_submodule(mixture.path(path)) for path in (entry.module, entry.block))
    handles = [experts.register_forward_pre_hook(before, with_kwargs=True)] if experts is not block else []
    handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor] | None:
    """States, numbers of experts and gates, if that is what the experts are given."""
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    if len(given) != 3 or any(one.ndim != 2 for one in given):
        return None
    states, chosen, gates = given
    is_call = not chosen.is_floating_point() and chosen.dtype != torch.bool and gates.is_floating_point()
    return (states, chosen, gates) if is_call and chosen.shape == gates.shape and len(chosen) == len(states) else None


def _add_routed(
    forward: Callable[..., Tensor],
    states: Tensor,
    chosen: Tensor,
    gates: Tensor,
    real: Tensor,
    sums: tuple[Tensor, Tensor],
) -> None:
    """Each expert is given its tokens alone, with a gate of one: by the code of the experts themselves, whatever they
    compute. Together that is as much as one more forward of them."""
    for expert in range(len(sums[0])):
        tokens, places = ((chosen == expert) & real[:, None]).nonzero(as_tuple=True)
        for part, place in zip(tokens.split(TOKENS), places.split(TOKENS), strict=True):
            if not len(part):
                continue
            alone = torch.full((len(part), 1), expert, dtype=chosen.dtype, device=chosen.device)
            given = wide(forward(states[part], alone, torch.ones_like(alone, dtype=gates.dtype))).norm(dim=-1)
            sums[0][expert] += float((given * gates[part, place]).sum(dtype=torch.float64))
            sums[1][expert] += len(part)


def _add_missing(
    model: nn.Module,
    mixture: Mixture,
    again: Callable[[], Any],
    output: Any,
    real: Callable[[Tensor], Tensor],
    sums: tuple[Tensor, Tensor],
) -> None:
    """What the block gives less when the weights of one expert are zero is its gate times what it gives: one forward
    of the block for each expert, for lists of modules and what else hides the choice."""
    whole = _first(output)
    counted = real(whole)
    for expert in range(mixture.experts):
        with _zeroed(model, mixture, expert):
            missing = wide(whole - _first(again())).flatten(0, -2).norm(dim=-1)[counted]
        routed = missing > UNSEEN * wide(whole).abs().max()
        sums[0][expert] += float(missing[routed].sum(dtype=torch.float64))
        sums[1][expert] += int(routed.sum())


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _zeroed(model: nn.Module, mixture: Mixture, expert: int) -> Iterator[None]:
    module = model.get_submodule(mixture.path(mixture.entry.module))
    own: Sequence[Tensor] = list(module.get_submodule(mixture.names[expert]).parameters()) if mixture.names else []
    own = own or [model.get_parameter(mixture.path(name))[expert] for name in mixture.entry.own]
    before = [one.detach().clone() for one in own]
    try:
        for one in own:
            one.detach().zero_()
        yield
    finally:
        for one, values in zip(own, before, strict=True):
            one.detach().copy_(values)
