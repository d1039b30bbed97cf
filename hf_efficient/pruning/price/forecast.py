"""What a plan will give, from shapes alone: nothing is allocated, so a model may have any size.

forecast(Anatomy.of(model), plan, length=2048)          # the model may be on the meta device
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...io.text import for_terminal
from ...measurement.size import count_macs
from ...models.anatomy import Anatomy, ConfigAnatomy
from ...models.classes import stock_config
from ...models.groups import Group, output_weight
from ...models.inputs import dummy_inputs
from ...models.rebuild import class_for
from ...reporting.numbers import format_bytes, format_count
from ...reporting.tables import align
from ..cut.surgery import check_plan, kept_layers, planned_config
from ..plan import Forecast, LayerForecast, PruningPlan
from .costs import Costs, layer_costs
from .serving import serving, serving_lines


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with the head of `model` and the structure of `config`, on the meta device."""
    config = copy.deepcopy(stock_config(config) if ConfigAnatomy.of_config(config).block.is_trivial() else config)
    with torch.device("meta"):
        return class_for(model, config)(config).eval()


def forecast(
    anatomy: Anatomy,
    plan: PruningPlan,
    length: int,
    costs: Costs | None = None,
    config: PreTrainedConfig | None = None,
) -> Forecast:
    """Parameters, MACs at `length` tokens, bytes, and a table of the layers, before and after; milliseconds too if
    `costs` are measured. MACs are those of a whole forward, of the layers alone where a model needs values for it.
    `config` is that of the result, where the plan does not say all of it.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    check_plan(anatomy, plan)
    model, config = anatomy.model, config or planned_config(anatomy, plan)
    before, after = (skeleton(model, one) for one in (model.config, config))
    small = Anatomy.of(after)
    rows = _layers(anatomy, small, plan, length)
    parameters = before.num_parameters(), after.num_parameters()
    size = torch.empty((), dtype=model.dtype).element_size()
    measured = None if costs is None or costs.measure is None else costs.measure(plan)
    macs, macs_before = _macs(small, length), _macs(Anatomy.of(before), length)
    if macs is None or macs_before is None:
        macs, macs_before = sum(row.macs for row in rows), sum(row.macs_before for row in rows)
    return Forecast(
        length=length,
        dtype=str(model.dtype).removeprefix("torch."),
        loads_with="portable" if small.block.is_trivial() else "plugin",
        parameters=parameters[1],
        parameters_before=parameters[0],
        macs=macs,
        macs_before=macs_before,
        weight_bytes=parameters[1] * size,
        weight_bytes_before=parameters[0] * size,
        cache_bytes=_cache_numbers(small) * length * size,
        cache_bytes_before=_cache_numbers(anatomy) * length * size,
        removed_macs=1 - sum(row.macs for row in rows) / sum(row.macs_before for row in rows),
        removed_parameters=1 - sum(row.parameters for row in rows) / sum(row.parameters_before for row in rows),
        layers=tuple(rows),
        latency_ms=None if measured is None else measured / 1e6,
        latency_ms_before=None if costs is None or measured is None else costs.total / 1e6,
        active_experts=_active_experts(anatomy, config),
        active_experts_before=_active_experts(anatomy, model.config),
        serving=serving(small),
    )


def _macs(anatomy: Anatomy, length: int) -> int | None:
    """None: the model reads values, and on the meta device there are none."""
    model = anatomy.model
    inputs = dummy_inputs(model, 1, length)
    for part in model.modules():  # or transformers looks at ids and masks, which have no values on the meta device
        if isinstance(part, PreTrainedModel):
            part.config.pad_token_id = None
    if not anatomy.block.is_converted():
        model.set_attn_implementation("eager")  # as many MACs as any
    try:
        return count_macs(model, inputs)
    except Exception:  # whatever the code of a model may raise where a tensor has no values
        return None


def _active_experts(dense: Anatomy, config: PreTrainedConfig) -> int | None:
    """Of the first stack that has experts which may leave, by the config of what is left."""
    fields = ((stack.entry, stack.entry.experts.active) for stack in dense.stacks if stack.entry.experts)
    return next((getattr(entry.own_config(config), active) for entry, active in fields if active), None)


def _layers(dense: Anatomy, small: Anatomy, plan: PruningPlan, length: int) -> list[LayerForecast]:
    old, new = (_by_layer(anatomy, length) for anatomy in (dense, small))
    mixtures = {(one.stack, one.layer): one for one in dense.mixtures}
    rows = []
    for stack in dense.stacks:
        kept = kept_layers(stack, plan)
        for index in range(len(stack.layers)):
            was = old[stack.name, index]
            now = new[stack.name, kept.index(index)] if index in kept else dict.fromkeys(was, 0)
            sizes = {key: value for name in was for key, value in ((name, now[name]), (f"{name}_before", was[name]))}
            if mixture := mixtures.get((stack.name, index)):
                left = len(plan.units.get(mixture.name, range(mixture.experts))) if index in kept else 0
                sizes |= {"experts": left, "experts_before": mixture.experts}
            rows.append(LayerForecast(stack.name, index, **sizes))
    return rows


def _by_layer(anatomy: Anatomy, length: int) -> dict[tuple[str, int], dict[str, int]]:
    macs, parameters = (layer_costs(anatomy, metric, length) for metric in ("macs", "parameters"))
    sizes = {key: {"parameters": parameters[key], "macs": macs[key], "heads": 0, "neurons": 0} for key in macs}
    for group in anatomy.groups:
        for layer in group.layers:
            if group.is_neurons:
                sizes[group.stack, layer]["neurons"] += group.units * _experts(anatomy, group)
            elif group.kind == "heads":
                sizes[group.stack, layer]["heads"] = group.units * anatomy.stack(group.stack).group_size
    return sizes


def _experts(anatomy: Anatomy, group: Group) -> int:
    weight = output_weight(anatomy.model, group.members[0])
    return len(weight) if weight.ndim == 3 else 1


def _cache_numbers(anatomy: Anatomy) -> int:
    """Keys and values for one token, in all layers that generate with a cache."""
    if not anatomy.model.can_generate():
        return 0
    heads = [group for group in anatomy.groups if (group.stack, group.kind) == ("decoder", "heads")]
    if not heads:
        return 0
    stack = anatomy.stack("decoder")
    return sum(2 * (1 if stack.entry.one_kv_head else g.units) * stack.head_width * len(g.layers) for g in heads)


def plan_table(plan: PruningPlan) -> str:
    """The forecast of a plan for a terminal: the whole model, then its layers."""
    after = plan.forecast
    if after is None:
        return "This plan has no forecast: make it with hf_efficient.plan."
    is_whole = after.macs_before != sum(row.macs_before for row in after.layers)
    macs = "MACs" if is_whole else "MACs of the layers"
    whole = [
        ("parameters", format_count(after.parameters_before), format_count(after.parameters)),
        (f"{macs}, {after.length} tokens", format_count(after.macs_before), format_count(after.macs)),
        (f"weights, {after.dtype}", format_bytes(after.weight_bytes_before), format_bytes(after.weight_bytes)),
    ]
    if after.cache_bytes_before:
        cache = format_bytes(after.cache_bytes_before), format_bytes(after.cache_bytes)
        whole.append((f"cache, {after.length} tokens", *cache))
    if after.latency_ms is not None and after.latency_ms_before is not None:
        whole.append(("latency", f"{after.latency_ms_before:.1f} ms", f"{after.latency_ms:.1f} ms"))
    if after.active_experts is not None and after.active_experts != after.active_experts_before:
        whole.append(("experts that work for a token", str(after.active_experts_before), str(after.active_experts)))
    has_experts = any(row.experts_before for row in after.layers)
    layers = [
        (
            f"{row.stack} {row.layer}",
            f"{row.heads} of {row.heads_before}",
            f"{row.neurons} of {row.neurons_before}",
            *([f"{row.experts} of {row.experts_before}"] if has_experts else []),
            f"{format_count(row.parameters)} of {format_count(row.parameters_before)}",
            f"{format_count(row.macs)} of {format_count(row.macs_before)}",
        )
        for row in after.layers
    ]
    head = ("layer", "heads", "neurons", *(["experts"] if has_experts else []), "parameters", "MACs")
    sure = "" if plan.chosen else "Sizes only, every layer alike: which units stay is chosen when there are weights.\n"
    return for_terminal(
        f"{align(('', 'before', 'after'), whole)}\n\n"
        f"{align(head, layers)}\n\n"
        f"Of what the layers cost, {after.removed_macs:.1%} of the MACs and {after.removed_parameters:.1%} of the "
        f"parameters go.\n{sure}Loads as: {_LOADS[after.loads_with]}"
        + "".join(f"\n{line}" for line in serving_lines(plan))
    )


_LOADS = {
    "portable": "the stock class, without hf_efficient (portable)",
    "plugin": "after `import hf_efficient`, or with trust_remote_code=True (plugin)",
}
