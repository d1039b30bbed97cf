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

from ..errors import ConfigError, DataError, UnsupportedModelError, shown
from ..models.families import family_of
from ..models.loading import load_config
from ..models.rebuild import check_model
from .choose.allocation import allocate_alike, choose_layers
from .choose.reach import check_reachable
from .config import PruningConfig
from .cut.groups import find_groups
from .cut.surgery import check_plan
from .methods import IMPORTANCES, LAYER_IMPORTANCES
from .plan import PruningPlan
from .price.costs import Costs, make_costs
from .price.forecast import forecast
from .score.calibration import check_calibration, fitting_length
from .score.finite import check_weights
from .score.stream import Batch
from .search import Cutter, Search, is_kept
from .weights import check_data, check_learned, prune_weights


@torch.inference_mode(False)
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
        plan: what to keep, as `hf_efficient.plan` makes it; nothing is scored again. Its `config` says whether weights
            are reconstructed.

    Returns:
        A stock model where the stock config can say the result, else an efficient one; on the same device. With
        granularity `"weight"` alone a model of the same class and size, with zeros.

    Raises:
        ConfigError: the ratio cannot be reached; the plan does not fit the model; neither or both are given.
        DataError: calibration is missing, or has batches that the model cannot read; weights or what is computed from
            them are not finite.
        UnsupportedModelError: the model cannot be pruned.
    """
    if (config is None) == (plan is None):
        raise ConfigError("prune needs a config or a plan: prune(model, PruningConfig(ratio=0.5), calibration).")
    if plan is not None:
        return _carry_out(model, plan, calibration)
    if isinstance(config, PruningConfig) and "weight" in config.granularity:
        return _with_zeros(model, config, calibration)
    found = search(model, config, calibration)
    return found.cutter.cut(found.plan())


def search(model: PreTrainedModel, config: PruningConfig | None, calibration: Iterable[Batch] | None) -> Search:
    """Everything checked before any long work: its `plan` is what prune keeps, `at` is for other ratios.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `prune`.
    """
    config, batches = _check_config(config), _checked(model, calibration)
    if "weight" in config.granularity:
        raise ConfigError(
            "A plan names layers, heads and neurons; single weights become zeros and change no size. Call "
            "prune(model, config, calibration), or leave 'weight' out of granularity."
        )
    _check_data(config, batches)
    length = config.sequence_length or fitting_length(batches, model)
    return Search(config, Cutter(model, config, batches), _costs(model, config, length), length)


def _checked(model: PreTrainedModel, calibration: Iterable[Batch] | None) -> list[Batch]:
    """The batches, if they and the weights are fit to be worked with."""
    check_model(model)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedModelError(
            "The model has parameters on the meta device, so there are no weights to prune. Load it with weights "
            "(without offloading to disk); what pruning would give says plan(model.config, config)."
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            "The model was loaded or made in torch.inference_mode, where no gradient can be computed. Load it outside."
        )
    batches = check_calibration(model, calibration)
    check_weights(model)
    return batches


def _check_config(config: object) -> PruningConfig:
    if not isinstance(config, PruningConfig):
        raise ConfigError(f"config must be a PruningConfig, such as PruningConfig(ratio=0.5); got {shown(config)}.")
    return config


def _with_zeros(model: PreTrainedModel, config: PruningConfig, calibration: Iterable[Batch] | None) -> PreTrainedModel:
    batches = _checked(model, calibration)
    check_data(config, batches)
    rest, length = config.without_weights(), config.sequence_length or fitting_length(batches, model)
    check_reachable(model, config, make_costs(model, "macs", length))
    return prune_weights(prune(model, rest, batches) if rest else model, config, batches)


def _carry_out(model: PreTrainedModel, plan: PruningPlan, calibration: Iterable[Batch] | None) -> PreTrainedModel:
    if not isinstance(plan, PruningPlan):
        raise ConfigError(f"plan must be a PruningPlan, such as PruningPlan.load(path); got {shown(plan)}.")
    batches = _checked(model, calibration)
    if not plan.chosen:
        raise ConfigError(
            "This plan holds sizes only: it was made from a config, without weights to choose by. Make it from the "
            "model: plan(model, config, calibration)."
        )
    if not plan.layers and not plan.units:
        raise ConfigError("This plan removes nothing: `layers` and `units` are empty.")
    check_plan(model, plan)
    return Cutter(model, plan.config or PruningConfig(reconstruct=False), batches).cut(plan)


@torch.inference_mode(False)
def plan(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    config: PruningConfig,
    calibration: Iterable[Batch] | None = None,
) -> PruningPlan:
    """What `prune(model, config, calibration)` would keep, and what that gives. No weight is touched.

    It scores and allocates, and leaves surgery and reconstruction to `prune(model, plan=plan)`; but for what later
    scores are taken on: with `steps` above 1, or layers beside units, the model after each step but the last. With
    `metric="latency"` the planned model is made and timed.

    Parameters:
        model: a model; or, where only sizes are asked for, its config or a name to load it by. A model on the meta
            device counts as a config: there are no weights to choose by, so every layer is taken to lose the same
            (`chosen` is False), and a model of any size takes seconds.
        calibration: as for `prune`.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `prune`, and before any long work.
    """
    if isinstance(model, PreTrainedConfig | str | os.PathLike):
        model = _without_weights(model)
    check_model(model)
    if model.device.type == "meta":
        length = _check_config(config).sequence_length or fitting_length([], model)
        found, costs = _sizes_only(model, config, length), None
    else:
        own = search(model, config, calibration)
        found, costs, length = own.plan(), own.costs, own.length
    return described(model, found, config, length, costs)


def described(
    model: PreTrainedModel, found: PruningPlan, config: PruningConfig, length: int, costs: Costs | None
) -> PruningPlan:
    """The plan with how it was made, and what it will give."""
    chosen = model.device.type != "meta"
    found = replace(found, model=model.config.model_type, config=config, chosen=chosen)
    told = forecast(model, found, length, costs)
    narrower = [row for row in told.layers if row.parameters and row.macs < row.macs_before]
    if not chosen and narrower and config.allocation == "global":
        told = replace(told, loads_with="plugin")  # here all layers lose alike, then each by its scores
    return replace(found, forecast=told)


def _without_weights(model: PreTrainedConfig | str | os.PathLike) -> PreTrainedModel:
    config = model if isinstance(model, PreTrainedConfig) else load_config(os.fspath(model))
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    head = next((one for one in named if one is not None), None)
    with torch.device("meta"):
        return head._from_config(config) if head is not None else transformers.AutoModel.from_config(config)


def _sizes_only(model: PreTrainedModel, config: PruningConfig, length: int) -> PruningPlan:
    """As many units go from each layer; which layers, and which units, is not known: the last ones are named."""
    if config.metric == "latency":
        raise ConfigError("metric='latency' is measured, which needs a model with weights. Ask for 'macs' first.")
    check_learned(config)
    costs = _costs(model, config, length)
    rest, family, layers = config.without_weights(), family_of(model.config), {}
    if rest is None:  # zeros change no size
        return PruningPlan()
    config = rest
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
        remove = left - (1 - config.ratio) * costs.total
        kept = allocate_alike(model, groups, config, costs.of, remove)
        found = replace(found, units={group.name: units for group, units in kept.items()})
    return found


def _check_data(config: PruningConfig, batches: list[Batch]) -> None:
    asked = [config.importance] if config.unit_kinds else []
    asked += [config.layer_importance] if "layer" in config.granularity else []
    check_learned(config)
    for name in asked:
        if (IMPORTANCES | LAYER_IMPORTANCES)[name].needs_data and not batches:
            raise DataError(
                f"importance={name!r} needs calibration batches: prune(model, config, calibration=batches). "
                "Without data use importance='magnitude'."
            )


def _costs(model: PreTrainedModel, config: PruningConfig, length: int) -> Costs:
    costs = make_costs(model, config.metric, length, config.latency_batch_size)
    check_reachable(model, config, costs)
    return costs
