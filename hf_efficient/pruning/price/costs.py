"""What units, groups and layers cost: the side of the budget.

    costs = make_costs(Anatomy.of(model), "macs", length=128)
    costs.of(group, 1024), costs.total

`Costs` says what each group of one dense model costs with some of its units. Where a price comes from (counting
parameters or multiply-accumulates, or a clock) says `methods.METRICS`; those who spend do not know it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig, PreTrainedModel

from ...attention.dispatch import variant_of
from ...attention.variant import hides_future
from ...models.anatomy import Anatomy
from ...models.family import HEADS, NEURONS
from ...models.groups import Group, unit_parameters
from ...models.mixtures import Mixture, expert_parameters
from ...models.stacks import ModelStack
from ..methods import METRICS
from ..plan import PruningPlan


@dataclass(frozen=True)
class Costs:
    """Prices in one metric.

    Fields:
        of: (group, how many of its units are kept) -> cost; falls with the number.
        experts: what one expert of each mixture costs, where the metric falls with their number.
        layers: what each whole layer costs, by (stack, layer).
        total: what `ratio` is a fraction of.
        measure: what the model of a plan really costs, where prices are only an estimate of it (latency).
    """

    of: Callable[[Group, int], float]
    layers: dict[tuple[str, int], float]
    total: float
    measure: Callable[[PruningPlan], float] | None = None
    experts: dict[Mixture, float] = field(default_factory=dict)


def make_costs(anatomy: Anatomy, metric: str, length: int, batch_size: int = 8) -> Costs:
    """Parameters, multiply-accumulates (`"macs"`) on one sequence of `length` tokens, or measured nanoseconds
    (`"latency"`) of `batch_size` such sequences."""
    return METRICS[metric](anatomy, batch_size, length)


def mac_costs(anatomy: Anatomy, batch_size: int, length: int) -> Costs:
    """Of one sequence, however many there are."""
    return _counted(anatomy, "macs", length)


def parameter_costs(anatomy: Anatomy, batch_size: int, length: int) -> Costs:
    """Whatever the inputs are."""
    return _counted(anatomy, "parameters", length)


def _counted(anatomy: Anatomy, metric: str, length: int) -> Costs:
    unit = {group: unit_cost(anatomy, group, metric, length) for group in anatomy.groups}
    layers = layer_costs(anatomy, metric, length)
    counts = metric == "parameters"  # as many experts work for a token, however many there are
    experts = {one: expert_parameters(anatomy.model, one) for one in anatomy.mixtures if counts}
    return Costs(lambda group, units: unit[group] * units, layers, sum(layers.values()), experts=experts)


def unit_cost(anatomy: Anatomy, group: Group, metric: str, length: int) -> int:
    """What one unit of the group costs: parameters, or multiply-accumulates on one sequence of `length` tokens.

    A linear costs rows x columns for each token, experts the part of it that works for one. A head of width D under
    full attention costs 2 length D more for each token (scores and weighted sum), with fewer keys under local
    attention, and 2 D (D + 1) under linear attention (Kwon 2022, section 4.1). `length` is that of the text where a
    model sees an image too, whose own is known (CLIP).
    """
    model, stack = anatomy.model, anatomy.stack(group.stack)
    if metric == "parameters":
        return sum(part.numel(p) for member in group.members for p, part in unit_parameters(model, member))
    if stack.entry.sees_patches and hasattr(stack.sizes, "image_size"):  # of Qwen's kin an image is as long as it is
        length = num_patches(stack.sizes)
    total = 0
    for member in group.members:
        parts = (*member.inputs, member.output)
        macs_of_all = length * sum(part.numel(model.get_parameter(f"{member.prefix}.{part.name}")) for part in parts)
        total += int(macs_of_all * _active(stack, group))
        if not group.is_neurons:
            module = model.get_submodule(f"{member.prefix}.{stack.attentions[group.kind].module}")
            variant = variant_of(module)
            macs = 2 * length * stack.head_width if variant is None else variant.macs(length, hides_future(module))
            total += length * macs * stack.group_size  # a unit is a key/value head with its query heads
    return total


def _active(stack: ModelStack, group: Group) -> float:
    """The part of a group's weights that works for one token: few of many experts, where the config says how many."""
    ffn = stack.ffns.get(group.kind)
    if ffn is None or ffn.active is None:
        return 1.0
    [layer] = group.layers
    experts = len(stack.layers[layer].get_parameter(ffn.down))
    return min(1.0, getattr(stack.sizes, ffn.active) / experts)


def num_patches(config: PreTrainedConfig) -> int:
    """The length of an image: its patches and the class token."""
    size, patch = config.image_size, config.patch_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (height // rows) * (width // columns) + 1


def layer_costs(anatomy: Anatomy, metric: str, length: int) -> dict[tuple[str, int], int]:
    """What each whole layer costs: all its parameters, or the MACs of all its units."""
    if metric == "parameters":
        return {
            (stack.name, index): sum(p.numel() for p in layer.parameters())
            for stack in anatomy.stacks
            for index, layer in enumerate(stack.layers)
        }
    costs: dict[tuple[str, int], int] = {}
    for group in anatomy.groups:
        # T5's heads are one group in all layers, of which each has an equal part.
        share = group.units * unit_cost(anatomy, group, metric, length) // len(group.layers)
        for layer in group.layers:
            costs[group.stack, layer] = costs.get((group.stack, layer), 0) + share
    for stack in anatomy.stacks:
        is_in_part = stack.entry.why_not(HEADS) or stack.entry.why_not(NEURONS)  # experts, and what else has no units
        for index, layer in enumerate(stack.layers):
            groups = [one for one in anatomy.groups if one.stack == stack.name and index in one.layers]
            if groups and not is_in_part:
                continue
            members = [member for group in groups for member in group.members]
            known = {id(weight) for member in members for weight, _ in unit_parameters(anatomy.model, member)}
            rest = sum(p.numel() for p in layer.parameters() if p.ndim > 1 and id(p) not in known)
            if rest:  # none in a layer that left a gap
                costs[stack.name, index] = costs.get((stack.name, index), 0) + length * rest
    return costs


def total_cost(model: PreTrainedModel, metric: str, length: int) -> int:
    """The cost of all layers: what `ratio` is a fraction of."""
    return sum(layer_costs(Anatomy.of(model), metric, length).values())
