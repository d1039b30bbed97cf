"""The FFNs of a layer: what widens, and what narrows again.

A *neuron* is an output of one linear that changes exactly one input of another, with no attention between them.
Experts in one tensor show no linears: there a neuron is what the parameter that narrows reads, and to it belong those
rows of the one that widens that change nothing while the neuron is silent.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..family import FFN, NEURON_KINDS, Attention
from .observe import SMALL, LayerRun, differs, is_same
from .roles import NotDerivable, rounds

MOST_ROUNDS = 200  # in which the outputs of one linear are tried


def find_ffns(layers: Sequence[LayerRun], attention: Attention) -> tuple[FFN, ...]:
    """Those of a stack, each in some layers at least, with their widths in `num_neurons`; the first of linears is
    `neurons`, the first of experts `expert_neurons`.

    Raises:
        NotDerivable: there is none, or it is not as wide in all layers.
    """
    found: dict[tuple, FFN] = {}
    problems: list[str] = []
    for layer in layers:
        for find in (_of_linears, _of_experts):
            try:
                own = find(layer, attention)
            except NotDerivable as reason:
                problems.append(str(reason))
                continue
            for ffn in own:
                known = found.setdefault((ffn.up, ffn.down), ffn)
                if known != ffn:
                    raise NotDerivable("the FFNs of its layers are unlike each other")
    if not found:
        raise NotDerivable(problems[0] if problems else "no FFNs in one layer")
    rest = iter(NEURON_KINDS[2:])
    named, taken = [], set()
    for ffn in found.values():
        kind = NEURON_KINDS[int(ffn.has_experts)]
        kind = kind if kind not in taken else next(rest, "")
        taken.add(kind)
        named += [replace(ffn, kind=kind)] if kind else []
    return tuple(named)


def _of_linears(layer: LayerRun, attention: Attention) -> list[FFN]:
    """
    Raises:
        NotDerivable: the neurons of one lie in an order of their own.
    """
    attending = _attending(layer) | {attention.query, attention.key, attention.value, attention.output}
    pairs: dict[str, list[tuple[str, list[int]]]] = {}
    rest = [name for name in layer.linears if name not in attending]
    for name in rest:
        for other in rest:
            if layer.reaches(name, other) and (mapping := _mapping(layer, name, other)) is not None:
                pairs.setdefault(other, []).append((name, mapping))
    ffns = []
    for down, makers in pairs.items():
        arriving = [name for name in layer.linears if layer.reaches(name, down)]
        if set(layer.last(arriving)) != {name for name, _ in makers}:
            continue  # a gate of what an attention gives
        count, up = layer.base.inputs[down].shape[-1], []
        for name, mapping in makers:
            if mapping != list(range(count)) * (len(mapping) // count):
                raise NotDerivable("the neurons lie in the linear in an order of their own")
            up += [name] * (len(mapping) // count)
        ffns.append(FFN("", tuple(up), down, num_neurons=count))
    return ffns


def _mapping(layer: LayerRun, name: str, other: str) -> list[int | None] | None:
    """For each output of one linear the one input of another that it changes; None if one changes several."""
    output, given = layer.base.outputs[name], layer.base.inputs[other]
    if output.ndim < 2 or given.shape[:-1] != output.shape[:-1] or output.shape[:-1].numel() < 4:
        return None
    if output.shape[-1] > MOST_ROUNDS * output.shape[:-1].numel():  # hours, and no tiny model has it
        return None
    mapping: list[int | None] = [None] * output.shape[-1]
    for first in rounds(output):
        for shift in (0, 1, 3):  # at one token alone its gate, or a ReLU, may be closed
            units = first.view(-1).roll(shift).view(first.shape)
            seen = layer.run(name, units).inputs.get(other)
            if seen is None or seen.shape != given.shape:
                return None
            hit = (seen - given).abs() > SMALL * given.abs().max()
            if (hit.any(-1) & (units < 0)).any() or (hit.sum(-1) > 1).any():
                return None
            for place in (hit.any(-1) & (units >= 0)).nonzero().tolist():
                where = tuple(place)
                mapping[int(units[where])] = int(hit[where].nonzero()[0])
    return mapping if None not in mapping else None


def _attending(layer: LayerRun) -> set[str]:
    """The linears that make or read the heads of any attention of the layer."""
    names = set()
    for index, call in enumerate(layer.base.calls):
        names |= {name for name, given in layer.base.inputs.items() if is_same(given, call.output)}
        for letter in range(3):
            arriving = set()
            for name in layer.linears:
                calls = layer.disturbed(name).calls
                if index < len(calls) and differs(calls[index].tensors[letter], call.tensors[letter]):
                    arriving.add(name)
            names |= set(layer.last(arriving))
    return names


def _of_experts(layer: LayerRun, attention: Attention) -> list[FFN]:
    """Parameters `[experts, ., .]` of one module, or of modules side by side."""
    sets: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in layer.layer.named_modules():
        own = {f"{path}.{name}": one for name, one in module.named_parameters(recurse=False) if one.ndim == 3}
        place = path if len(own) > 1 else path.rpartition(".")[0]
        sets.setdefault(place, {}).update(own)
    found = (_expert_ffn(layer, tensors) for tensors in sets.values() if len(tensors) > 1)
    return [ffn for ffn in found if ffn is not None]


def _expert_ffn(layer: LayerRun, tensors: dict[str, nn.Parameter]) -> FFN | None:
    """The last of these that can be what narrows: its neurons lie in the other dimension than in the rest."""
    if layer.states is None or len({len(one) for one in tensors.values()}) > 1:
        return None
    hidden = layer.states.shape[-1]
    for down in reversed(tensors):
        for down_dim in (1, 2):
            count, up_dim = tensors[down].shape[down_dim], 3 - down_dim
            if tensors[down].shape[up_dim] != hidden or count == hidden:
                continue
            ups = {name: one.shape[up_dim] for name, one in tensors.items() if name != down}
            parts = [name for name, size in ups.items() for _ in range(size // count)]
            fits = all(tensors[n].shape[down_dim] == hidden and not s % count and s >= count for n, s in ups.items())
            if fits and len(parts) <= 2:
                ffn = FFN("", tuple(parts), down, None, count, up_dim, down_dim)
                return _with_details(layer, ffn, tensors)
    return None


def _with_details(layer: LayerRun, ffn: FFN, tensors: dict[str, nn.Parameter]) -> FFN | None:
    """With what lies beside the weights: biases `[experts, neurons]` and integers."""
    width, biases, integers = ffn.num_neurons, [], []
    sizes = {up: ffn.up.count(up) * width for up in dict.fromkeys(ffn.up)}
    for place in dict.fromkeys(path.rpartition(".")[0] for path in tensors):
        module = layer.layer.get_submodule(place)
        shape = [len(tensors[ffn.down]), sum(sizes.values())]
        own = module.named_parameters(recurse=False)
        biases += [f"{place}.{name}" for name, one in own if list(one.shape) == shape]
        numbers = ((name, value) for name, value in vars(module).items() if type(value) is int)
        integers += [f"{place}.{name}" for name, value in numbers if value == width]
    if len(biases) > len(sizes):
        return None
    ffn = replace(ffn, biases=tuple(biases), integers=tuple(integers))
    if len(sizes) == len(ffn.up):  # a tensor each: nothing to take turns in
        return ffn
    for rows, interleaved in (((0, width), False), ((0, 1), True)):
        if _is_silent(layer, ffn, rows):
            return replace(ffn, interleaved=interleaved)
    return None


def _is_silent(layer: LayerRun, ffn: FFN, rows: tuple[int, ...]) -> bool:
    """Whether these rows of what widens change nothing where the first neuron is not read."""
    up, down = (layer.layer.get_parameter(path) for path in (ffn.up[0], ffn.down))
    before = up.detach().clone(), down.detach().clone()
    try:
        with torch.no_grad():
            down.select(ffn.down_dim, 0).zero_()
            without = layer.run().result
            for row in rows:
                up.select(ffn.up_dim, row).add_(1.0)
            return not differs(layer.run().result, without)
    finally:
        with torch.no_grad():
            up.copy_(before[0])
            down.copy_(before[1])
