"""The weights that can become zero: the linears of the attentions and FFNs of all layers, in every family we know.

    for linear in find_linears(Anatomy.of(model)):
        print(linear.name, matrix(model, linear).shape)     # [out, in], for GPT-2's Conv1D too
    zeros, total = count_zeros(model)

Embeddings, norms, biases, task heads and the learned parts of attention variants are not among them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...models.anatomy import Anatomy
from ...models.linears import holds

# What a linear reads: tokens of one of these, or of nothing that can be padded.
MAIN, DECODER, ENCODER_STATES, UNPADDED = "main", "decoder", "encoder states", "unpadded"


@dataclass(frozen=True)
class Linear:
    """One linear: its path in the model, the path of its layer, and whose tokens it reads."""

    name: str
    layer: str
    reads: str


def find_linears(anatomy: Anatomy) -> list[Linear]:
    """All linears, stack by stack and layer by layer; a fused one once."""
    linears: list[Linear] = []
    two_stacks = anatomy.config.is_encoder_decoder
    for stack in anatomy.stacks:
        own = DECODER if two_stacks and stack.name == "decoder" else UNPADDED if stack.name == "vision" else MAIN
        other = MAIN if two_stacks else ENCODER_STATES
        reads: dict[str, str] = {}
        for kind, attention in stack.attentions.items():
            # Cross attention makes its keys and values of what the encoder gives.
            read = other if kind == "cross_heads" else own
            reads |= {attention.query: own, attention.key: read, attention.value: read, attention.output: own}
        for ffn in stack.ffns.values():
            reads |= {} if ffn.has_experts else dict.fromkeys((*ffn.up, ffn.down), own)
        for index, layer in enumerate(stack.layers):
            place = stack.layer_prefix(index)
            paths = [path for path in reads if path and holds(layer, path)]
            linears += [Linear(f"{place}.{path}", place, reads[path]) for path in paths]
    return linears


def module_of(model: PreTrainedModel, linear: Linear) -> nn.Module:
    return model.get_submodule(linear.name)


def parameter_of(model: PreTrainedModel, linear: Linear) -> nn.Parameter:
    return model.get_parameter(f"{linear.name}.weight")


def as_matrix(model: PreTrainedModel, linear: Linear, tensor: Tensor) -> Tensor:
    """A tensor of the shape of the weight as `[out, in]`: a view."""
    return tensor.T if isinstance(module_of(model, linear), Conv1D) else tensor


def matrix(model: PreTrainedModel, linear: Linear) -> Tensor:
    """The weight as `[out, in]`: a view that can be written to."""
    return as_matrix(model, linear, parameter_of(model, linear).detach())


def count_zeros(model: PreTrainedModel) -> tuple[int, int]:
    """(zeros, all) of the weights of the linears."""
    weights = [matrix(model, linear) for linear in find_linears(Anatomy.of(model))]
    return sum(w.numel() - int(torch.count_nonzero(w)) for w in weights), sum(w.numel() for w in weights)
