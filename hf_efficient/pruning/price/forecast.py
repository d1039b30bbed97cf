"""What a plan will give, from shapes alone: nothing is allocated, so a model may have any size.

forecast(model, plan, length=2048)          # `model` may be on the meta device
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...io.text import for_terminal
from ...measurement.size import count_macs
from ...models.classes import block_of, stock_config
from ...models.families import find_stacks
from ...models.inputs import dummy_inputs
from ...models.rebuild import class_for
from ...reporting.tables import align, format_bytes, format_count
from ..cut.groups import find_groups
from ..cut.surgery import check_plan, planned_config
from ..plan import Forecast, LayerForecast, PruningPlan
from .costs import Costs, layer_costs


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
    inputs = dummy_inputs(model, 1, length)
    for part in model.modules():  # or transformers looks at ids and masks, which have no values on the meta device
        if isinstance(part, PreTrainedModel):
            part.config.pad_token_id = None
    if not block_of(model.config).is_converted():
        model.set_attn_implementation("eager")  # as many MACs as any
    return count_macs(model, inputs)


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


def plan_table(plan: PruningPlan) -> str:
    """The forecast of a plan for a terminal: the whole model, then its layers."""
    told = plan.forecast
    if told is None:
        return "This plan has no forecast: make it with hf_efficient.plan."
    whole = [
        ("parameters", format_count(told.parameters_before), format_count(told.parameters)),
        (f"MACs, {told.length} tokens", format_count(told.macs_before), format_count(told.macs)),
        (f"weights, {told.dtype}", format_bytes(told.weight_bytes_before), format_bytes(told.weight_bytes)),
    ]
    if told.cache_bytes_before:
        cache = format_bytes(told.cache_bytes_before), format_bytes(told.cache_bytes)
        whole.append((f"cache, {told.length} tokens", *cache))
    if told.latency_ms is not None and told.latency_ms_before is not None:
        whole.append(("latency", f"{told.latency_ms_before:.1f} ms", f"{told.latency_ms:.1f} ms"))
    rows = [
        (
            f"{row.stack} {row.layer}",
            f"{row.heads} of {row.heads_before}",
            f"{row.neurons} of {row.neurons_before}",
            f"{format_count(row.parameters)} of {format_count(row.parameters_before)}",
            f"{format_count(row.macs)} of {format_count(row.macs_before)}",
        )
        for row in told.layers
    ]
    sure = "" if plan.chosen else "Sizes only, every layer alike: which units stay is chosen when there are weights.\n"
    return for_terminal(
        f"{align(('', 'before', 'after'), whole)}\n\n"
        f"{align(('layer', 'heads', 'neurons', 'parameters', 'MACs'), rows)}\n\n"
        f"Of what the layers cost, {told.removed_macs:.1%} of the MACs and {told.removed_parameters:.1%} of the "
        f"parameters go.\n{sure}Loads as: {_LOADS[told.loads_with]}"
    )


_LOADS = {
    "portable": "the stock class, without hf_efficient (portable)",
    "plugin": "after `import hf_efficient`, or with trust_remote_code=True (plugin)",
}
