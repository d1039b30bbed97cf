"""What units, groups and layers cost: the side of the budget.

    costs = make_costs(model, "macs", length=128)
    costs.of(group, 1024), costs.total

`Costs` says what each group of one dense model costs with some of its units; where a price comes from (counting
parameters or multiply-accumulates, or a clock: `latency.py`) is not known to those who spend.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ...attention.dispatch import variant_of
from ...models.families import Stack, family_of, find_stacks
from ..cut.groups import Group, Member, find_groups, unit_parameters
from ..methods import METRICS
from ..plan import PruningPlan


@dataclass(frozen=True)
class Costs:
    """Prices in one metric.

    Fields:
        of: (group, how many of its units are kept) -> cost; falls with the number.
        layers: what each whole layer costs, by (stack, layer).
        total: what `ratio` is a fraction of.
        measure: what the model of a plan really costs, where prices are only an estimate of it (latency).
    """

    of: Callable[[Group, int], float]
    layers: dict[tuple[str, int], float]
    total: float
    measure: Callable[[PruningPlan], float] | None = None


def make_costs(model: PreTrainedModel, metric: str, length: int, batch_size: int = 8) -> Costs:
    """Parameters, multiply-accumulates (`"macs"`) on one sequence of `length` tokens, or measured nanoseconds
    (`"latency"`) of `batch_size` such sequences."""
    return METRICS[metric](model, batch_size, length)


def mac_costs(model: PreTrainedModel, batch_size: int, length: int) -> Costs:
    """Of one sequence, however many there are."""
    return _counted(model, "macs", length)


def parameter_costs(model: PreTrainedModel, batch_size: int, length: int) -> Costs:
    """Whatever the inputs are."""
    return _counted(model, "parameters", length)


def _counted(model: PreTrainedModel, metric: str, length: int) -> Costs:
    groups = find_groups(model)
    unit = {group: unit_cost(model, group, metric, length) for group in groups}
    layers = layer_costs(model, groups, metric, length)
    return Costs(lambda group, units: unit[group] * units, layers, sum(layers.values()))


def unit_cost(model: PreTrainedModel, group: Group, metric: str, length: int) -> int:
    """What one unit of the group costs: parameters, or multiply-accumulates on one sequence of `length` tokens.

    A linear costs rows x columns for each token. A head of width D under full attention costs 2 length D more for each
    token (scores and weighted sum), with fewer keys under local attention, and 2 D (D + 1) under linear attention
    (Kwon 2022, section 4.1). `length` is that of the text where a model sees an image too, whose own is known (CLIP).
    """
    if metric == "parameters":
        return sum(p.numel() // group.units for member in group.members for p, _ in unit_parameters(model, member))
    stack = next(stack for stack in family_of(model.config).stacks if stack.name == group.stack)
    if stack.sees_patches:
        length = num_patches(stack.own_config(model.config))
    total = 0
    for member in group.members:
        weights = [model.get_parameter(f"{member.prefix}.{part.name}") for part in (*member.inputs, member.output)]
        total += length * sum(weight.numel() // group.units for weight in weights)
        if group.kind != "neurons":
            total += length * _attention_macs(model, member, stack, group.kind, length)
    return total


def num_patches(config: PreTrainedConfig) -> int:
    """The length of an image: its patches and the class token."""
    size, patch = config.image_size, config.patch_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (height // rows) * (width // columns) + 1


def _attention_macs(model: PreTrainedModel, member: Member, stack: Stack, kind: str, length: int) -> int:
    """Multiply-accumulates of scores and weighted sum, for one token and one unit."""
    module = model.get_submodule(f"{member.prefix}.{stack.attentions(model.config)[kind].module}")
    variant, width = variant_of(module), stack.head_width(model.config)
    macs = 2 * length * width if variant is None else variant.macs(length, module.is_causal)
    return macs * stack.group_size(model.config)


def layer_costs(model: PreTrainedModel, groups: list[Group], metric: str, length: int) -> dict[tuple[str, int], int]:
    """What each whole layer costs: all its parameters, or the MACs of all its units."""
    if metric == "parameters":
        return {
            (stack.name, index): sum(p.numel() for p in layer.parameters())
            for stack, layers in find_stacks(model)
            for index, layer in enumerate(layers)
        }
    costs: dict[tuple[str, int], int] = {}
    for group in groups:
        for layer in group.layers:
            key = (group.stack, layer)
            share = group.units * unit_cost(model, group, metric, length) // len(group.layers)
            costs[key] = costs.get(key, 0) + share
    return costs


def total_cost(model: PreTrainedModel, metric: str, length: int) -> int:
    """The cost of all layers: what `ratio` is a fraction of."""
    return sum(layer_costs(model, find_groups(model), metric, length).values())
