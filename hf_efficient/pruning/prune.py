"""Prune a model: scores, allocation, plan, surgery, reconstruction.

    small = prune(model, PruningConfig(ratio=0.5), calibration=batches)

or in two steps, with a look at the plan, and perhaps a change, in between:

    plan = hf_efficient.plan(model, PruningConfig(ratio=0.5), calibration=batches)
    small = prune(model, plan=plan, calibration=batches)

The given model stays as it is: it is usually the teacher of the next stage.
"""

import os
from collections.abc import Iterable
from dataclasses import replace

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, DataError
from ..families import family_of
from ..loading import load_config
from ..models.building import check_model
from .allocation import choose_layers
from .calibration import average_length, check_calibration
from .config import IMPORTANCES, LAYER_IMPORTANCES, PruningConfig
from .costs import Costs, make_costs
from .forecast import forecast
from .groups import find_groups
from .plan import PruningPlan
from .reach import check_reachable
from .search import Cutter, Search, allocate, is_kept
from .stream import Batch
from .weights import check_data, check_learned, prune_weights


def prune(
    model: PreTrainedModel,
    config: PruningConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    plan: PruningPlan | None = None,
) -> PreTrainedModel:
    """A smaller copy of `model`.

    Parameters:
        model: a stock or efficient model of a family in the table.
        config: how much, what, and how to choose. Or give a `plan`.
        calibration: batches of model inputs (dicts of tensors), with or without labels; a few hundred examples. Needed
            by most importances and for reconstruction; MACs are counted at their average length.
        plan: what to keep, as `hf_efficient.plan` makes it. Its `config` says whether weights are reconstructed.

    Returns:
        A stock model where the stock config can say the result, else an efficient one; on the same device. With
        granularity `"weight"` alone a model of the same class and size, with zeros.

    Raises:
        ConfigError: the ratio cannot be reached; the plan does not fit the model; neither or both are given.
        DataError: calibration is missing or no batches.
        UnsupportedModelError: the model cannot be pruned.
    """
    if (config is None) == (plan is None):
        raise ConfigError("prune needs a config or a plan: prune(model, PruningConfig(ratio=0.5), calibration).")
    check_model(model)
    batches = check_calibration(model, calibration)
    if plan is not None:
        return _carry_out(model, plan, batches)
    length = config.sequence_length or average_length(batches, model)
    if "weight" in config.granularity:
        return _with_zeros(model, config, batches, length)
    _check_data(config, batches)
    costs = _costs(model, config, length)
    return Search(model, config, batches, costs, length).run()[1]


def _with_zeros(model: PreTrainedModel, config: PruningConfig, batches: list[Batch], length: int) -> PreTrainedModel:
    check_data(config, batches)
    rest = config.without_weights()
    check_reachable(model, config, make_costs(model, "macs", length))
    return prune_weights(prune(model, rest, batches) if rest else model, config, batches)


def _carry_out(model: PreTrainedModel, plan: PruningPlan, batches: list[Batch]) -> PreTrainedModel:
    if not plan.chosen:
        raise ConfigError(
            "This plan holds sizes only: it was made from a config, without weights to choose by. Make it from the "
            "model: plan(model, config, calibration)."
        )
    if not plan.layers and not plan.units:
        raise ConfigError("This plan removes nothing: `layers` and `units` are empty.")
    return Cutter(model, plan.config or PruningConfig(reconstruct=False), batches).cut(plan)


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    config: PruningConfig,
    calibration: Iterable[Batch] | None = None,
) -> PruningPlan:
    """What `prune(model, config, calibration)` would keep, and what that gives. No weight is touched.

    Parameters:
        model: a model; or, where only sizes are asked for, its config or a name to load it by. A model on the meta
            device counts as a config: there are no weights to choose by, so every layer is taken to lose the same
            (`chosen` is False), and a model of any size takes seconds.
        calibration: as for `prune`.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `prune`, and before any long work.
    """
    if not isinstance(model, PreTrainedModel):
        model = _without_weights(model)
    check_model(model)
    batches = check_calibration(model, calibration)
    length = config.sequence_length or average_length(batches, model)
    sizes_only, costs = model.device.type == "meta", None
    if sizes_only:
        found = _sizes_only(model, config, length)
    else:
        _check_data(config, batches)
        costs = _costs(model, config, length)
        found = Search(model, config, batches, costs, length).run()[0]
    found = replace(found, model=model.config.model_type, config=config, chosen=not sizes_only)
    return replace(found, forecast=forecast(model, found, length, costs))


def _without_weights(model: PreTrainedConfig | str | os.PathLike) -> PreTrainedModel:
    config = model if isinstance(model, PreTrainedConfig) else load_config(str(model))
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    head = next((one for one in named if one is not None), None)
    with torch.device("meta"):
        return head._from_config(config) if head is not None else transformers.AutoModel.from_config(config)


def _sizes_only(model: PreTrainedModel, config: PruningConfig, length: int) -> PruningPlan:
    """As many units go from each layer; which layers, and which units, is not known: the last ones are named."""
    if config.metric == "latency":
        raise ConfigError("metric='latency' is measured, which needs a model with weights. Ask for 'macs' first.")
    costs = _costs(model, config, length)
    family, layers = family_of(model.config), {}
    if "layer" in config.granularity:
        later_first = {key: float(-key[1]) for key in costs.layers}
        share, alone = config.layer_share * costs.total, not config.unit_kinds
        layers = choose_layers(later_first, costs.layers, share, alone, family.deepest, family.first_stays)
    found = PruningPlan(layers=layers)
    if config.unit_kinds:
        left = sum(cost for key, cost in costs.layers.items() if is_kept(key, found))
        groups = [
            group
            for group in find_groups(model)
            if group.kind in config.unit_kinds and any(is_kept((group.stack, i), found) for i in group.layers)
        ]
        equal = {group: torch.ones(group.units) * costs.of(group, 1) for group in groups}
        remove = left - (1 - config.ratio) * costs.total
        kept = allocate(model, equal, replace(config, allocation="uniform"), costs, remove)
        found = replace(found, units={group.name: units for group, units in kept.items()})
    return found


def _check_data(config: PruningConfig, batches: list[Batch]) -> None:
    asked = [config.importance] if config.unit_kinds else []
    asked += [config.layer_importance] if "layer" in config.granularity else []
    check_learned(config)
    for name in asked:
        if (IMPORTANCES | LAYER_IMPORTANCES)[name] and not batches:
            raise DataError(
                f"importance={name!r} needs calibration batches: prune(model, config, calibration=batches). "
                "Without data use importance='magnitude'."
            )


def _costs(model: PreTrainedModel, config: PruningConfig, length: int) -> Costs:
    costs = make_costs(model, config.metric, length, config.latency_batch_size)
    check_reachable(model, config, costs)
    return costs
