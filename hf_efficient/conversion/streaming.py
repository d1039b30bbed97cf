"""Does a converted model turn its queries as `engines.streaming` takes it to?

    check_streaming(converted)

Some models turn other pairs of numbers, some norm what was turned, some layers have no positions at all: there global
tokens would be seen from a wrong place, and nobody would notice. So the model itself is run at two places: queries
that are turned back must be the same, and those that are not must differ.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.dispatch import variant_of
from ..attention.engines.streaming import NOT_ROTARY, Rotary
from ..errors import UnsupportedModelError
from ..models.modes import eval_mode
from .probe import forward_names, tiny_inputs

OFFSET = 3  # places between the two runs
TOLERANCE = 1e-2  # of the largest number; angles of half precision are off by a part of it


@torch.no_grad()
def check_streaming(model: PreTrainedModel) -> None:
    """
    Raises:
        UnsupportedModelError: a layer with streaming whose queries are turned in another way, or not at all.
    """
    named = {name: variant_of(module) for name, module in model.named_modules()}
    variants = {name: one for name, one in named.items() if one is not None and one.config.streaming}
    if not variants or model.device.type == "meta":
        return
    if "position_ids" not in forward_names(model):
        raise UnsupportedModelError(f"{type(model).__name__} takes no position_ids. {NOT_ROTARY}")
    runs = [_queries(model, variants, first) for first in (0, OFFSET)]
    for name, queries in runs[0].items():
        (here, turned_back), (there, also) = queries, runs[1][name]
        size = turned_back.abs().max() * TOLERANCE
        if (turned_back - also).abs().max() > size or (here - there).abs().max() < size:
            raise UnsupportedModelError(
                f"The queries of {name} do not turn with their places as streaming=True needs it. {NOT_ROTARY}"
            )


def _queries(model: PreTrainedModel, variants: dict[str, nn.Module], first: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each variant the queries of a few tokens from place `first` on, as they are and turned back."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            rotary = Rotary(*(x.float() for x in kwargs["rotary"]))
            query = args[0][..., : rotary.cos.shape[-1]].float()
            found[name] = query, rotary.turn_back(query)

        return hook

    handles = [one.register_forward_pre_hook(look(name), with_kwargs=True) for name, one in variants.items()]
    inputs = tiny_inputs(model, main_only=True)
    places = torch.arange(first, first + inputs["input_ids"].shape[1], device=model.device)[None]
    try:
        with eval_mode(model):
            model.base_model(**inputs, position_ids=places, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
