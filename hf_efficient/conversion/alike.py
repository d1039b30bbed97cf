"""Does a real model, converted, still give what it gave where the new attention sees everything?

    check_alike(model, converted)

An entry is proven on a tiny model of the same architecture, and what a user has registered is not proven at all. So
the model itself is run once, with short made-up inputs: every converted layer gets a window wider than any text, and
the outputs must be those of the stock model. Layers with windows of their own and cross attention get full attention.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.config import MAX_WINDOW, AttentionConfig
from ..attention.dispatch import ATTACHED, make_variant, variant_of
from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.derive.compare import outputs_of, unlike
from ..models.derive.inputs import tiny_inputs
from ..models.merging import merging_nothing
from ..models.modes import eval_mode

MAX_PARAMETERS, MAX_NUMBERS = 2_000_000_000, 1_000_000  # of a model, and of one input: what is more is not cheap


@torch.no_grad()
def check_alike(model: PreTrainedModel, converted: PreTrainedModel) -> None:
    """
    Raises:
        UnsupportedModelError: it gives something else.
    """
    if model.device.type == "meta" or model.num_parameters() > MAX_PARAMETERS:
        return
    with eval_mode(model), eval_mode(converted):
        try:
            inputs = tiny_inputs(model)
        except UnsupportedModelError:
            return
        if any(value.numel() > MAX_NUMBERS for value in inputs.values()):
            return
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with merging_nothing(model), _everything_in_view(model):  # it may be converted already
            expected = outputs_of(model, {**inputs, **options})
        with merging_nothing(converted), _everything_in_view(converted) as (stand_ins, reached):
            outputs = outputs_of(converted, {**inputs, **options})
    if stand_ins and not reached:
        raise UnsupportedModelError(
            f"The conversion had no effect: {type(model).__name__} does not call transformers' attention interface "
            "where its entry says so."
        )
    if off := unlike(outputs, expected, inputs):
        raise UnsupportedModelError(
            f"Converted, this {type(model).__name__} gives something else with everything in view ({off}): what its "
            "tiny model proves does not hold for it, or an entry that you have registered is wrong. Nothing was done."
        )


@contextmanager
def _everything_in_view(model: PreTrainedModel) -> Iterator[tuple[list[nn.Module], set[nn.Module]]]:
    """Each converted layer with local attention of the widest window, or full attention. Gives the former, and those
    of them that were called by then."""
    windowed: set[nn.Module] = set()
    stand_ins: list[nn.Module] = []
    reached: set[nn.Module] = set()
    for stack in Anatomy.of(model).stacks:
        for index, layer in enumerate(stack.layers):
            for kind, attention in stack.attentions_in(index).items():  # some layers may have no cross attention
                if kind == "cross_heads" or stack.has_window(index):
                    windowed.add(layer.get_submodule(attention.module))
    wide = AttentionConfig("local", window=MAX_WINDOW, global_tokens=0)
    before = {module: variant for module in model.modules() if (variant := variant_of(module)) is not None}
    try:
        for module, variant in before.items():
            module._modules[ATTACHED] = None
            if module not in windowed:
                stand_in = make_variant(wide, variant.shape).to(model.device).eval()
                stand_in.register_forward_hook(lambda module, args, output: reached.add(module))
                module._modules[ATTACHED] = stand_in
                stand_ins.append(stand_in)
        yield stand_ins, reached
    finally:
        for module, variant in before.items():
            module._modules[ATTACHED] = variant
