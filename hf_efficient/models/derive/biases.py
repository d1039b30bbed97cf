"""Biases that a model adds for all pairs of tokens: the table of a stack that they come from, or that they come from
elsewhere.

with read_tables(model) as tables, observing(model):
    model(**inputs)
stack, path = with_bias(stack, layers, tables)          # "self_attn.relative_attention_bias": of the first layer
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..family import HEADS, LAYERS, Stack
from .head_parts import without_part


@contextmanager
def read_tables(model: PreTrainedModel) -> Iterator[set[nn.Module]]:
    """The embeddings that are read while the model runs."""
    tables: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hook = module.register_forward_hook(lambda module, given, output: tables.add(module))
                hooks.callback(hook.remove)
        yield tables


def with_bias(stack: Stack, layers: nn.ModuleList, tables: Collection[nn.Module]) -> tuple[Stack, str | None]:
    """The entry of a stack with a bias, and the table in its first layer, if all its layers share it."""
    modules = [layer.get_submodule(stack.attention.module).named_modules() for layer in layers]
    found = [{name for name, module in named if module in tables} for named in modules]  # that of UDOP is not read
    if len(found[0]) == 1 and not any(found[1:]):
        table = found[0].pop()
        attention = without_part(stack.attention, f"{table}.weight")
        return replace(stack, attention=attention), f"{stack.attention.module}.{table}"
    stack = replace(stack, attention=replace(stack.attention, biased=True))
    for ability in () if all(len(one) == 1 for one in found) else (HEADS, LAYERS):
        stack = stack.without(ability, "a position bias that is not one table in the first layer")
    return stack, None
