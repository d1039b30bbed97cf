"""Queries, keys and values of chosen attentions, as the attention function gets them.

    with recording(modules) as seen:                 # {("encoder", 3): attention module}
        model(**inputs)
    seen["encoder", 3].query                         # [batch, heads, length, head_dim], after rotary positions
    seen["encoder", 3].output                        # [batch, length, width], what the module gives

All families of the table call transformers' attention interface, so one place sees them all: under SDPA, flash or our
own variants, with fused or pruned projections. `output_attentions` could not: SDPA has no weights to give, and those
that eager attention gives while training have gone through dropout.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError, UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.interface import changed_interface
from ..models.linears import num_inputs, output_dim
from ..models.registry import is_known
from ..training.batch import base_of
from .losses.relations import Projected

Place = tuple[str, int]  # stack, and layer from 0
Modules = dict[Place, nn.Module]


def self_attentions(model: nn.Module, stacks: tuple[str, ...]) -> Modules:
    """The self-attention modules of a model, by stack and layer.

    Raises:
        UnsupportedModelError: a family outside the table.
        ConfigError: eager attention, which does not go through the interface.
    """
    base = base_of(model)
    if not is_known(base.config):
        raise UnsupportedModelError(
            "The losses `attention`, `relation` and `attention_output` need a family of the table; "
            f"{base.config.model_type!r} is not one. Leave them out of losses."
        )
    for stack in Anatomy.of(base).stacks:
        if stack.entry.attending is not None:
            raise UnsupportedModelError(
                "The losses `attention`, `relation` and `attention_output` need softmax attention in every layer; of "
                f"the {stack.name} of {base.config.model_type!r} only {stack.attending} have it."
            )
    modules = {
        (name, index): layer.get_submodule(stack.entry.attention.module)
        for name, stack in zip(stacks, Anatomy.of(base).stacks, strict=False)
        for index, layer in enumerate(stack.layers)
    }
    for module in modules.values():
        if _implementation(module) not in ALL_ATTENTION_FUNCTIONS:
            raise ConfigError(
                "The losses `attention`, `relation` and `attention_output` cannot look into "
                f"{_implementation(module)!r} attention. Call "
                f'{type(base).__name__}.set_attn_implementation("sdpa"), or load the model with it.'
            )
    return modules


def output_widths(model: nn.Module, stacks: tuple[str, ...]) -> dict[Place, int]:
    """The width of what each self-attention module gives, by stack and layer; see `self_attentions`.

    BERT's and ELECTRA's give the heads side by side, which are less wide than the model where heads were pruned; the
    output linear, which makes them the model's width again, is a module beside them.
    """
    self_attentions(model, stacks)  # raises where there are none
    widths = {}
    for name, stack in zip(stacks, Anatomy.of(base_of(model)).stacks, strict=False):
        attention = stack.entry.attention
        is_inside = attention.output.startswith(f"{attention.module}.")
        for index, layer in enumerate(stack.layers):
            linear = layer.get_submodule(attention.output)
            widths[name, index] = linear.weight.shape[output_dim(linear)] if is_inside else num_inputs(linear)
    return widths


@contextmanager
def recording(modules: Mapping[Place, nn.Module]) -> Iterator[dict[Place, Projected]]:
    """Within it the attention function notes what the given modules hand to it, and they what they give.

    Raises:
        ConfigError: from the forward, where a layer runs without gradients that were on before: nothing would be
            learned from what is noted there.
    """
    if not modules:
        yield {}
        return
    with_gradients = torch.is_grad_enabled()
    places = {module: place for place, module in modules.items()}
    seen: dict[Place, Projected] = {}

    def noting(function: Callable) -> Callable:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in places:
                if with_gradients and not torch.is_grad_enabled():
                    raise ConfigError(
                        "Reentrant gradient checkpointing runs layers without gradients first, so `attention`, "
                        "`relation` and `attention_output` would learn nothing. Turn it on with "
                        'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                    )
                scaling = kwargs.get("scaling")
                seen[places[module]] = Projected(
                    query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
                )
            return function(module, query, key, value, *args, **kwargs)

        return attend

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        place = places[module]
        if place in seen:
            seen[place] = replace(seen[place], output=output if torch.is_tensor(output) else output[0])

    with ExitStack() as hooks, changed_interface() as functions:
        for module in places:
            hooks.callback(module.register_forward_hook(note_output).remove)
        for name in {_implementation(module) for module in places}:
            functions[name] = noting(functions[name])
        yield seen


def _implementation(module: nn.Module) -> str:
    config: Any = module.config
    return config._attn_implementation
