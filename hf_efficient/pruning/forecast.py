"""What a plan will give, from shapes alone: nothing is allocated, so a model may have any size.

forecast(model, plan, length=2048)          # `model` may be on the meta device
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import find_stacks
from ..measure.inputs import dummy_inputs
from ..measure.size import count_macs
from ..models.building import class_for
from ..models.configs import block_of, stock_config
from .costs import Costs, layer_costs
from .groups import find_groups
from .plan import Forecast, LayerForecast, PruningPlan
from .surgery import check_plan, planned_config


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with the head of `model` and the structure of `config`, on the meta device."""
    config = copy.deepcopy(stock_config(config) if block_of(config).is_trivial() else config)
    with torch.device("meta"):
        return class_for(model, config)(config).eval()


def forecast(model: PreTrainedModel, plan: PruningPlan, length: int, costs: Costs | None = None) -> Forecast:
    """Parameters, MACs at `length` tokens, bytes, and a table of the layers, before and after; milliseconds too if
    `costs` are measured.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    check_plan(model, plan)
    before = skeleton(model, model.config)
    config = planned_config(model, plan)
    after = skeleton(model, config)
    size = torch.empty((), dtype=model.dtype).element_size()
    rows = _layers(before, after, plan, length)
    parameters = before.num_parameters(), after.num_parameters()
    caches = _cache_numbers(before) * length * size, _cache_numbers(after) * length * size
    measured = None if costs is None or costs.measure is None else costs.measure(plan)
    return Forecast(
        length=length,
        dtype=str(model.dtype).removeprefix("torch."),
        loads_with="portable" if block_of(config).is_trivial() else "plugin",
        parameters=parameters[1],
        parameters_before=parameters[0],
        macs=_macs(after, length),
        macs_before=_macs(before, length),
        weight_bytes=parameters[1] * size,
        weight_bytes_before=parameters[0] * size,
        cache_bytes=caches[1],
        cache_bytes_before=caches[0],
        removed_macs=_removed(sum(row.macs for row in rows), sum(row.macs_before for row in rows)),
        removed_parameters=_removed(sum(row.parameters for row in rows), sum(row.parameters_before for row in rows)),
        layers=tuple(rows),
        latency_ms=None if measured is None else measured / 1e6,
        latency_ms_before=None if costs is None or measured is None else costs.total / 1e6,
    )


def _removed(after: int, before: int) -> float:
    return 1 - after / before


def _macs(model: PreTrainedModel, length: int) -> int:
    return count_macs(model, dummy_inputs(model, 1, length))


def _layers(before: PreTrainedModel, after: PreTrainedModel, plan: PruningPlan, length: int) -> list[LayerForecast]:
    old, new = (_by_layer(model, length) for model in (before, after))
    rows = []
    for stack, layers in find_stacks(before):
        kept = plan.layers.get(stack.name, tuple(range(len(layers))))
        for index in range(len(layers)):
            was = old[stack.name, index]
            now = new[stack.name, kept.index(index)] if index in kept else dict.fromkeys(was, 0)
            sizes = {key: value for name in was for key, value in ((name, now[name]), (f"{name}_before", was[name]))}
            rows.append(LayerForecast(stack.name, index, **sizes))
    return rows


def _by_layer(model: PreTrainedModel, length: int) -> dict[tuple[str, int], dict[str, int]]:
    groups = find_groups(model)
    macs, parameters = (layer_costs(model, groups, metric, length) for metric in ("macs", "parameters"))
    found = {key: {"parameters": parameters[key], "macs": macs[key], "heads": 0, "neurons": 0} for key in macs}
    sizes = {stack.name: stack.group_size(model.config) for stack, _ in find_stacks(model)}
    for group in groups:
        for layer in group.layers:
            if group.kind == "neurons":
                found[group.stack, layer]["neurons"] = group.units
            elif group.kind == "heads":
                found[group.stack, layer]["heads"] = group.units * sizes[group.stack]
    return found


def _cache_numbers(model: PreTrainedModel) -> int:
    """Keys and values for one token, in all layers that generate with a cache."""
    if not model.can_generate():
        return 0
    total = 0
    for stack, _ in find_stacks(model):
        if stack.name == "decoder":
            width = stack.head_width(model.config)
            total += sum(2 * g.units * width * len(g.layers) for g in find_groups(model) if g.kind == "heads")
    return total
