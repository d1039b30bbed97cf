"""The linears of all families: `nn.Linear` with a weight `[out, in]`, and GPT-2's `Conv1D` with a weight `[in, out]`.

resize_linear(layer.mlp.c_fc, outputs=512)
"""

from torch import nn
from transformers.pytorch_utils import Conv1D


def output_dim(linear: nn.Module) -> int:
    """The dimension of the weight that counts outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def input_dim(linear: nn.Module) -> int:
    """The dimension of the weight that counts inputs."""
    return 1 - output_dim(linear)


def holds(layer: nn.Module, path: str) -> bool:
    """Whether a layer has a module or a parameter at this path."""
    place, _, name = path.rpartition(".")
    try:
        module = layer.get_submodule(place)
    except AttributeError:
        return False
    return not path or name in module._modules or name in module._parameters


def narrow_parameter(module: nn.Module, path: str, dim: int, size: int) -> None:
    """Narrow a parameter inside of a module in place to its first rows in one dimension."""
    place, _, name = path.rpartition(".")
    holder = module.get_submodule(place)
    if isinstance(holder, nn.Linear | Conv1D) and name == "weight":
        is_input = dim == input_dim(holder)
        bias, holder.bias = holder.bias, None  # which is a parameter of its own
        resize_linear(holder, inputs=size if is_input else None, outputs=None if is_input else size)
        holder.bias = bias
        return
    setattr(holder, name, nn.Parameter(getattr(holder, name).narrow(dim, 0, size).clone()))
    if isinstance(holder, nn.Embedding):
        holder.num_embeddings, holder.embedding_dim = holder.weight.shape


def num_inputs(linear: nn.Module) -> int:
    return linear.weight.shape[input_dim(linear)]


def num_outputs(linear: nn.Module) -> int:
    return linear.weight.shape[output_dim(linear)]


def resize_linear(linear: nn.Module, inputs: int | None = None, outputs: int | None = None) -> None:
    """Narrow a linear in place to its first inputs or outputs. Weights that fit are loaded afterwards."""
    weight = linear.weight
    if inputs is not None:
        weight = weight.narrow(input_dim(linear), 0, inputs)
    if outputs is not None:
        weight = weight.narrow(output_dim(linear), 0, outputs)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[:outputs].clone())
    linear.weight = nn.Parameter(weight.clone())
    sizes = weight.shape[input_dim(linear)], weight.shape[output_dim(linear)]
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = sizes
    else:
        linear.in_features, linear.out_features = sizes
