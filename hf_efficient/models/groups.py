"""What hangs together in a model: groups of units, by the table of families, never by tracing.

A *unit* is one head (under grouped-query attention: one key/value head with its query heads) or one FFN neuron.
Removing it removes outputs of the linears that make it and inputs of the linear that reads it. A *group* is the units
of one attention module or one FFN. Where a position bias is shared by all layers of a stack (T5, which also hands a
bias of zeros from cross attention to cross attention), the heads of all layers form one group: they only leave
together.

    for group in Anatomy.of(model).groups:
        print(group.stack, group.kind, group.layers, group.units)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.dispatch import ATTACHED, variant_of
from .family import FFN, NEURON_KINDS, Attention
from .linears import holds, input_dim, num_inputs, num_outputs, output_dim
from .stacks import ModelStack

EXPERT_STEP = 8  # grouped products of matrices need rows of a multiple of 16 bytes, so 8 numbers of 2 bytes


@dataclass(frozen=True)
class Slice:
    """The rows or columns of one parameter that units own.

    `name` is its path inside the member, `dim` the dimension of the units, `widths` how many rows a unit has there: in
    a fused linear one number for each of its blocks, which stand one after another and each hold all units. The last
    `rest` rows belong to no unit, as the keys and values that all heads share.
    """

    name: str
    dim: int
    widths: tuple[int, ...] = (1,)
    rest: int = 0

    @property
    def width(self) -> int:
        """The rows of one unit, all blocks together."""
        return sum(self.widths)

    def count(self, tensor: torch.Tensor) -> int:
        """How many units a tensor of this shape holds."""
        return (tensor.shape[self.dim] - self.rest) // self.width

    def numel(self, tensor: torch.Tensor) -> int:
        """How many numbers of a tensor of this shape belong to one unit."""
        return tensor.numel() // tensor.shape[self.dim] * self.width

    def kept_rows(self, units: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The row numbers that are left where these units are, on the device of the tensor."""
        size = tensor.shape[self.dim]
        return torch.cat([self.rows(units, tensor), torch.arange(size - self.rest, size, device=tensor.device)])

    def rows(self, units: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The row numbers of these units in a tensor of this shape, on its device."""
        count, start, rows = self.count(tensor), 0, []
        for width in self.widths:  # block by block
            rows.append(start + expand(units, width))
            start += count * width
        return torch.cat(rows).to(tensor.device)

    def by_unit(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[units, numbers of a unit]`: a tensor of this shape, unit by unit."""
        count = self.count(tensor)
        # [rows, ...] -> of each block [units, width * ...] -> [units, numbers]
        rows = tensor.movedim(self.dim, 0)[: count * self.width]
        blocks = rows.split([count * width for width in self.widths])
        return torch.cat([block.unflatten(0, (count, -1)).flatten(1) for block in blocks], 1)


@dataclass(frozen=True)
class Member:
    """One module of a group: the parameters that its units own parts of, relative to `prefix`.

    `inputs` are weights of linears whose outputs are the unit, `output` is the weight of the linear that reads it, and
    `others` are what multiplies nothing: biases, a table of relative positions, learned parts of an attention variant.
    """

    prefix: str
    inputs: tuple[Slice, ...]
    output: Slice
    others: tuple[Slice, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        return (*self.inputs, self.output, *self.others)


@dataclass(frozen=True)
class Group:
    """Units that are scored and removed alike. `kind` is `heads`, `cross_heads` or one of `family.NEURON_KINDS`.
    Their number has to be a multiple of `step`, if it is not the full one. `has_experts`: each is the same neuron of
    every expert.
    """

    stack: str
    kind: str
    layers: tuple[int, ...]
    units: int
    members: tuple[Member, ...]
    step: int = 1
    has_experts: bool = False

    def __hash__(self) -> int:
        """Without the members, which are long: groups are the keys of every table of scores and costs."""
        return hash((self.stack, self.kind, self.layers))

    @property
    def is_neurons(self) -> bool:
        return self.kind in NEURON_KINDS

    @property
    def name(self) -> str:
        """`encoder.3.neurons`; of several layers the first."""
        return f"{self.stack}.{self.layers[0]}.{self.kind}"


def groups_of(stack: ModelStack) -> list[Group]:
    """The groups of one stack, layer by layer."""
    groups = [group for index in range(len(stack.layers)) for group in _layer_groups(index, stack)]
    for kind in stack.attentions if stack.family.relative_bias else ():  # the heads of all layers are one group
        alike = [group for group in groups if group.kind == kind]
        if not alike:
            continue
        layers = tuple(layer for group in alike for layer in group.layers)
        members = tuple(member for group in alike for member in group.members)
        union = replace(alike[0], layers=layers, members=members)
        groups = [union] + [group for group in groups if group.kind != kind]
    return groups


def _layer_groups(index: int, stack: ModelStack) -> list[Group]:
    layer, place = stack.layers[index], stack.layer_prefix(index)
    groups = []
    for kind, attention in stack.attentions_in(index).items():
        if not attention.query:  # its heads cannot be told apart
            continue
        width = stack.head_width
        wide = stack.group_size * width  # all query heads of one key/value head: they leave together
        inputs, rest = [(attention.query, wide)], 0
        if stack.entry.one_kv_head:  # whose rows are behind those of the queries, if one linear makes all
            rest = width * (attention.key, attention.value).count(attention.query)
        else:
            inputs += [(attention.key, width), (attention.value, width)]
        read = stack.group_size * (attention.value_size or width)
        units = num_inputs(layer.get_submodule(attention.output)) // read
        inputs = [(path, rows) for path, rows in inputs if path not in attention.wide]
        inputs += [(path, num_outputs(layer.get_submodule(path)) // units) for path in attention.wide]
        inputs += [(gate, num_outputs(layer.get_submodule(gate)) // units) for gate in attention.gates]
        learned = _learned(attention, layer, units)
        for name, dim in attention.head_parts.items():
            path = inside(attention.module, name)
            if holds(layer, path):  # as a table of the first layer alone
                learned += (Slice(path, dim, (layer.get_parameter(path).shape[dim] // units,)),)
        member = _member(layer, place, inputs, (attention.output, read), learned, attention.interleaved)
        if rest:
            member = replace(
                member,
                **{part: _with_rest(getattr(member, part), attention.query, rest) for part in ("inputs", "others")},
            )
        if stack.family.relative_bias and kind == "heads" and index == 0:
            table = Slice(f"{stack.family.relative_bias}.weight", 1, (stack.group_size,))
            member = replace(member, others=(*member.others, table))
        groups.append(_group(layer, stack.name, kind, index, member))
    for kind, ffn in stack.ffns_in(index).items():
        ups = ((up, 1) for up in ffn.up)
        member = _experts(place, ffn) if ffn.has_experts else _member(layer, place, ups, (ffn.down, 1))
        group = _group(layer, stack.name, kind, index, member)
        groups.append(replace(group, step=EXPERT_STEP, has_experts=True) if ffn.has_experts else group)
    return groups


def _experts(place: str, ffn: FFN) -> Member:
    """The same neuron of every expert: they leave together, since the experts are one tensor."""
    widths: dict[str, tuple[int, ...]] = {up: (ffn.up.count(up),) for up in ffn.up}
    if not ffn.interleaved:
        widths = {up: (1,) * width for up, (width,) in widths.items()}
    inputs = tuple(Slice(up, ffn.up_dim, blocks) for up, blocks in widths.items())
    biases = tuple(Slice(bias, 1, widths[up]) for bias, up in zip(ffn.biases, widths, strict=False))
    return Member(place, inputs, Slice(ffn.down, ffn.down_dim), biases)


def _group(layer: nn.Module, stack: str, kind: str, index: int, member: Member) -> Group:
    units = member.output.count(layer.get_parameter(member.output.name))
    return Group(stack, kind, (index,), units, (member,))


def _member(
    layer: nn.Module,
    place: str,
    writers: Iterable[tuple[str, int]],
    reader: tuple[str, int],
    others: tuple[Slice, ...] = (),
    interleaved: bool = False,
) -> Member:
    """From the linears that make the units and the one that reads them, with how many rows a unit has in each."""
    widths: dict[str, tuple[int, ...]] = {}
    for path, width in writers:  # a path that is named twice is one fused linear
        widths[path] = (*widths.get(path, ()), width)
    inputs, biases = [], []
    for path, blocks in widths.items():
        linear = layer.get_submodule(path)
        blocks = (sum(blocks),) if interleaved else blocks
        inputs.append(Slice(f"{path}.weight", output_dim(linear), blocks))
        if linear.bias is not None:
            biases.append(Slice(f"{path}.bias", 0, blocks))
    path, width = reader
    output = Slice(f"{path}.weight", input_dim(layer.get_submodule(path)), (width,))
    return Member(place, tuple(inputs), output, (*biases, *others))


def _with_rest(slices: tuple[Slice, ...], path: str, rest: int) -> tuple[Slice, ...]:
    of_path = (f"{path}.weight", f"{path}.bias")
    return tuple(replace(one, rest=rest) if one.name in of_path else one for one in slices)


def inside(module: str, name: str) -> str:
    """The path of a parameter of a module, which may be the layer itself."""
    return f"{module}.{name}" if module else name


def _learned(attention: Attention, layer: nn.Module, units: int) -> tuple[Slice, ...]:
    """The learned parts of a variant: one row for each key/value head, or for each query head."""
    variant = variant_of(layer.get_submodule(attention.module))
    if variant is None:
        return ()
    return tuple(
        Slice(f"{attention.module}.{ATTACHED}.{name}", 0, (len(parameter) // units,))
        for name, parameter in variant.named_parameters()
        if len(parameter) >= units  # fewer: of the key/value head that all share
    )


def output_module(model: PreTrainedModel, member: Member) -> nn.Module:
    """The linear that reads the units of a member, or the experts."""
    return model.get_submodule(f"{member.prefix}.{member.output.name.rpartition('.')[0]}")


def output_weight(model: PreTrainedModel, member: Member) -> nn.Parameter:
    """The weight that reads the units of a member; `member.output` says where."""
    return model.get_parameter(f"{member.prefix}.{member.output.name}")


def unit_parameters(model: PreTrainedModel, member: Member) -> list[tuple[nn.Parameter, Slice]]:
    """Every parameter that a unit owns a part of, and which part that is."""
    return [(model.get_parameter(f"{member.prefix}.{part.name}"), part) for part in member.slices]


def expand(units: torch.Tensor, width: int) -> torch.Tensor:
    """Unit numbers to row or column numbers: unit 2 of width 3 is 6, 7, 8."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
