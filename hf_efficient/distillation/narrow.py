"""A narrower stream: a smaller `hidden_size`, without the dimensions that matter least.

    student = build_student(teacher, layers=3, hidden_size=192, calibration=batches)

The hidden states run through all of a model, so one set of dimensions stays in embeddings, norms, linears and head
(Minitron, Muralidharan et al. 2024). Which tensors have an entry for each dimension is not listed anywhere: they are
those whose shape changes when the class is built, without memory, for the smaller width.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.classes import stock_config, with_block
from ..models.modes import evaluating
from ..models.rebuild import class_for, rebuild
from ..pruning.score.calibration import token_mask
from ..pruning.score.handing import Batch, forward

Axes = dict[str, tuple[int, ...]]
Norms = dict[str, nn.Module]


def narrow(model: PreTrainedModel, hidden_size: int, batches: Sequence[Batch] = ()) -> PreTrainedModel:
    """A copy of `model` with the `hidden_size` most important dimensions of its stream. Heads keep their dimension,
    and must already be as many as `heads_for` says.

    Without `batches` the dimensions with the largest weights stay. With them, those that are largest in what the
    norms give; and each norm is scaled by what it would give else: the mean ratio, over tokens, of the kept
    dimensions' standard deviation (or root mean square) to that of all.

    Raises:
        UnsupportedModelError: something else than the stream depends on the width.
    """
    anatomy = Anatomy.of(model)
    full = anatomy.stacks[0].width
    if hidden_size == full:
        return model
    config = _narrow_config(anatomy, hidden_size)
    axes = _stream_axes(model, config, full, hidden_size)
    # The norms of the stream: what has a weight of one axis, along it.
    modules = {key: model.get_submodule(key.removesuffix(".weight")) for key in axes if key.endswith(".weight")}
    norms = {key.removesuffix(".weight"): norm for key, norm in modules.items() if norm.weight.dim() == 1}
    scores = _by_activations(model, norms, batches) if batches else _by_weights(model, axes)
    kept = scores.topk(hidden_size).indices.sort().values  # in the teacher's order
    state = dict(model.state_dict())
    for key, along in axes.items():
        for axis in along:
            state[key] = state[key].index_select(axis, kept.to(state[key].device))
    # A norm divides by the spread of what it reads. Over fewer dimensions that spread is another, and all that follows
    # would be scaled by it: the weight of the norm takes the mean ratio.
    if batches and anatomy.family.norm is not None:  # else a norm's weight is no plain factor (Gemma)
        for name, ratio in _ratios(model, norms, kept, batches).items():
            state[f"{name}.weight"] = state[f"{name}.weight"] * ratio
    return rebuild(model, config, state)


def heads_for(anatomy: Anatomy, hidden_size: int, heads: int | None) -> int | None:
    """How many heads each layer must have in a stream of this width: `heads`, or as many as fill it where the stock
    config has no field for their dimension (BERT, GPT-2, BART). `None`: all of them.

    Raises:
        ConfigError: a width, or number of heads, that the stock config cannot say.
        UnsupportedModelError: towers of several widths, or positions that are a formula of the width.
    """
    family = anatomy.family
    if family.sinusoidal or any(stack.entry.config for stack in anatomy.stacks):
        reason = (
            "its positions are a formula of the width" if family.sinusoidal else "its towers have widths of their own"
        )
        raise UnsupportedModelError(
            f"hidden_size cannot be changed in models of type {family.model_type!r}: {reason}. Use heads and neurons."
        )
    stack, full = anatomy.stacks[0], anatomy.stacks[0].width
    if type(hidden_size) is not int or not 1 <= hidden_size <= full:
        raise ConfigError(f"hidden_size={hidden_size!r} must be from 1 to {full}, the width of the teacher.")
    dim = stack.head_width
    if stack.entry.head_dim is None:
        if hidden_size % dim or heads not in (None, hidden_size // dim):
            raise ConfigError(
                f"hidden_size={hidden_size} with heads={heads}: the heads of a {family.model_type} model have {dim} "
                f"dimensions and fill its width, so hidden_size must be a multiple of {dim} up to {full}, and heads "
                f"hidden_size / {dim} or left out."
            )
        return hidden_size // dim
    count = stack.num_heads if heads is None else heads * stack.group_size  # of queries
    if family.heads_divide_hidden and hidden_size % count:
        raise ConfigError(
            f"hidden_size={hidden_size} must be a multiple of the number of query heads, {count}, as the stock config "
            f"of {family.model_type} models asks for."
        )
    return heads


def _narrow_config(anatomy: Anatomy, hidden_size: int) -> PreTrainedConfig:
    fields, blocks = {}, dict(anatomy.block.stacks)
    for stack in anatomy.stacks:
        names = stack.entry
        fields[names.hidden] = hidden_size
        if names.neurons is not None:  # said by its field: else some configs make it of the width (GPT-2)
            fields[names.neurons] = stack.num_neurons
        if names.head_dim is not None:
            fields[names.head_dim] = stack.head_width
            continue
        fields[names.heads] = hidden_size // stack.head_width
        if stack.name in blocks:  # the stock config says it now
            sizes = {k: v for k, v in blocks[stack.name].sizes.items() if k not in ("heads", "cross_heads")}
            blocks[stack.name] = replace(blocks[stack.name], sizes=sizes, kept_heads=())
    block = replace(anatomy.block, stacks={k: v for k, v in blocks.items() if v.sizes or v.is_converted()})
    config = with_block(anatomy.config, block, **fields)
    return stock_config(config) if block.is_trivial() else config


def _stream_axes(model: PreTrainedModel, config: PreTrainedConfig, full: int, hidden_size: int) -> Axes:
    """The tensors of the state dict that have an entry for each dimension of the stream, and on which axes."""
    with torch.device("meta"):  # shapes alone: no memory, no time
        smaller = class_for(model, config)(config).state_dict()
    axes: Axes = {}
    for key, tensor in model.state_dict().items():
        shape = smaller[key].shape if key in smaller else ()
        changed = tuple(
            axis for axis, sizes in enumerate(zip(tensor.shape, shape, strict=False)) if len(set(sizes)) > 1
        )
        # Only an axis that goes from the full width to the new one has an entry for each dimension.
        sizes = {(tensor.shape[axis], shape[axis]) for axis in changed}
        if len(shape) != tensor.dim() or sizes - {(full, hidden_size)}:
            raise UnsupportedModelError(
                f"hidden_size cannot be changed in this {type(model).__name__}: {key} of shape {tuple(tensor.shape)} "
                "depends on it in another way. Use heads and neurons."
            )
        if changed:
            axes[key] = changed
    return axes


def _by_weights(model: PreTrainedModel, axes: Axes) -> Tensor:
    """`[width]`: the squared norm of all weights that read or write each dimension."""
    total = torch.zeros(())
    for name, parameter in model.named_parameters():  # tied ones come once
        for axis in axes.get(name, ()):
            squares = parameter.detach().float().square().movedim(axis, 0)
            total = total + squares.reshape(parameter.shape[axis], -1).sum(1).cpu()
    return total


def _by_activations(model: PreTrainedModel, norms: Norms, batches: Sequence[Batch]) -> Tensor:
    """`[width]`: the sum of squares, over norms and real tokens, of what the norms give."""
    squares: list[Tensor] = []
    _watch(model, norms, batches, lambda name, read, output: squares.append(output.square().sum(0).cpu()))
    return torch.stack(squares).sum(0)


def _ratios(model: PreTrainedModel, norms: Norms, kept: Tensor, batches: Sequence[Batch]) -> dict[str, float]:
    """For each norm: by how much more the kept dimensions of what it reads spread than all do, on average."""
    ratios_of: dict[str, list[Tensor]] = {}

    def note(name: str, read: Tensor, output: Tensor) -> None:
        own, whole = (_spread(part, norms[name]) for part in (read[:, kept.to(read.device)], read))
        ratios_of.setdefault(name, []).append(own / whole.clamp_min(torch.finfo(whole.dtype).tiny))

    _watch(model, norms, batches, note)
    return {name: torch.cat(ratios).mean().item() for name, ratios in ratios_of.items()}


def _spread(states: Tensor, norm: nn.Module) -> Tensor:
    """`[tokens]`: what a norm divides by."""
    centred = states - states.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else states
    return centred.square().mean(-1).sqrt()


def _watch(
    model: PreTrainedModel, norms: Norms, batches: Sequence[Batch], note: Callable[[str, Tensor, Tensor], None]
) -> None:
    """`note(name, what it read, what it gave)`, [real tokens, width] both, for each call of each norm."""

    def hook(name: str, batch: Batch, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        read, gives = (states if states.dim() == 3 else states.flatten(0, -2)[:, None] for states in (args[0], output))
        stack = "encoder" if "encoder" in name.split(".") else None
        real = token_mask(batch, model, stack, read[..., 0]).bool()
        wide = torch.promote_types(read.dtype, torch.float32)
        note(name, read[real].to(wide), gives[real].to(wide))

    with evaluating(model):
        for batch in batches:
            with ExitStack() as hooks:
                for name, norm in norms.items():
                    hooks.callback(norm.register_forward_hook(partial(hook, name, batch)).remove)
                forward(model, batch)
