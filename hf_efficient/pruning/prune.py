"""Prune a model: scores, allocation, plan, surgery, reconstruction.

    small = prune(model, PruningConfig(ratio=0.5), calibration=batches)

or in two steps, with a look at the plan, and perhaps a change, in between:

    plan = hf_efficient.plan(model, PruningConfig(ratio=0.5), calibration=batches)
    small = prune(model, plan=plan, calibration=batches)

The given model stays as it is: it is usually the teacher of the next stage. One that does not fit into memory is named
by its folder, and pruned layer by layer into another one:

    prune("llama-70b", PruningConfig(ratio=0.3), calibration=batches, output_dir="small")
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, DataError, UnsupportedModelError, shown
from ..models.anatomy import Anatomy
from ..models.loading import load_config
from ..models.rebuild import check_model
from ..training.ranks import check_same, count, from_main, same_everywhere, together
from .choose.allocation import allocate_alike, choose_layers
from .choose.experts import choose_experts
from .choose.reach import check_reachable
from .config import PruningConfig
from .cut.surgery import check_plan
from .folder.run import plan_folder, prune_folder
from .methods import EXPERT_IMPORTANCES, IMPORTANCES, LAYER_IMPORTANCES
from .plan import PruningPlan
from .price.costs import Costs, make_costs
from .price.forecast import forecast
from .score.calibration import check_calibration, fitting_length
from .score.finite import check_weights
from .score.handing import Batch
from .search import Cutter, Search, is_kept, kept_groups, kept_mixtures, with_kept
from .weights import check_data, check_learned, prune_weights


@overload
def prune(
    model: PreTrainedModel,
    config: PruningConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    plan: PruningPlan | None = None,
) -> PreTrainedModel: ...


@overload
def prune(
    model: str | os.PathLike,
    config: PruningConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    plan: PruningPlan | None = None,
    output_dir: str | os.PathLike,
) -> Path: ...


@torch.inference_mode(False)
def prune(
    model: PreTrainedModel | str | os.PathLike,
    config: PruningConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    plan: PruningPlan | None = None,
    output_dir: str | os.PathLike | None = None,
) -> PreTrainedModel | Path:
    """A smaller copy of `model`.

    Parameters:
        model: a stock or efficient model of a family in the table; or a folder with one, of which no more than a layer
            is in memory at a time (docs/scaling.md says what that takes, and which models can be read so).
        config: how much, what, and how to choose. Or give a `plan`.
        calibration: batches of model inputs (dicts of tensors), with or without labels; a few hundred examples. Needed
            by most importances and for reconstruction; MACs are counted at their average length.
        plan: what to keep, as `hf_efficient.plan` makes it; nothing is scored again. Its `config` says whether weights
            are reconstructed.
        output_dir: where the result of a folder is written, with the tokenizer; new or empty. The same call again
            goes on with one that was killed.

    Returns:
        A stock model where the stock config can say the result, else an efficient one; on the same device. With
        granularity `"weight"` alone a model of the same class and size, with zeros. Of a folder `output_dir`.

    In a process group all processes call it with the same model and calibration, share the batches out, and get the
    same model; so it is with `plan`.

    Raises:
        CheckpointError: the folder or its weights cannot be read; `output_dir` is not empty; the disk is full.
        ConfigError: the ratio cannot be reached; the plan does not fit the model; neither or both are given; something
            that takes the whole model is asked of a folder.
        DataError: calibration is missing, or has batches that the model cannot read; weights or what is computed from
            them are not finite.
        UnsupportedModelError: the model cannot be pruned.
    """
    if (config is None) == (plan is None):
        raise ConfigError("prune needs a config or a plan: prune(model, PruningConfig(ratio=0.5), calibration).")
    if isinstance(model, str | os.PathLike):
        if output_dir is None:
            raise ConfigError(
                f"To prune the model in {os.fspath(model)!r} layer by layer say where the result goes: output_dir=... "
                "To have it in memory load it first, and give the model."
            )
        chosen, place = _check_plan(plan) or _check_config(config), output_dir
        with together("prune"):  # one process reads and writes
            return Path(from_main(lambda: os.fspath(prune_folder(model, chosen, calibration, place))))
    if output_dir is not None:
        raise ConfigError("output_dir is for a model that is named by its folder. Save this one: save_pretrained.")
    with together("prune"):
        given = _check_plan(plan)
        small = _pruned(model, config, calibration) if given is None else _carry_out(model, given, calibration)
        same_everywhere((*small.parameters(), *small.buffers()))
    return small


def _pruned(
    model: PreTrainedModel, config: PruningConfig | None, calibration: Iterable[Batch] | None
) -> PreTrainedModel:
    if isinstance(config, PruningConfig) and "weight" in config.granularity:
        anatomy, batches = _checked(model, calibration)
        check_data(config, batches)
        rest, length = config.without_weights(), config.sequence_length or fitting_length(batches, model)
        check_reachable(anatomy, config, make_costs(anatomy, "macs", length))
        return prune_weights(Anatomy.of(_pruned(model, rest, batches)) if rest else anatomy, config, batches)
    one = search(model, config, calibration)
    return one.cutter.cut(one.plan()).model


def search(model: PreTrainedModel, config: PruningConfig | None, calibration: Iterable[Batch] | None) -> Search:
    """Checked before any long work, and raises, as `prune`; its `plan` is what prune keeps, `at` another ratio."""
    config, (anatomy, batches) = _check_config(config), _checked(model, calibration)
    if "weight" in config.granularity:
        raise ConfigError(
            "A plan names layers, heads and neurons; single weights become zeros and change no size. Call "
            "prune(model, config, calibration), or leave 'weight' out of granularity."
        )
    check_learned(config)
    names = [config.importance] if config.unit_kinds else []
    names += [config.layer_importance] if "layer" in config.granularity else []
    asked = [((IMPORTANCES | LAYER_IMPORTANCES)[name], name, "magnitude") for name in names]
    if "expert" in config.granularity:
        asked.append((EXPERT_IMPORTANCES[config.expert_importance], config.expert_importance, "random"))
    for importance, name, other in asked:
        if importance.needs_data and not batches:
            raise DataError(
                f"importance={name!r} needs calibration batches: prune(model, config, calibration=batches). "
                f"Without data use importance={other!r}."
            )
    length = config.sequence_length or fitting_length(batches, model)
    return Search(config, Cutter(anatomy, config, batches), _costs(anatomy, config, length), length)


def _checked(model: PreTrainedModel, calibration: Iterable[Batch] | None) -> tuple[Anatomy, list[Batch]]:
    """What the model is made of, and the batches, if they and the weights are fit to be worked with."""
    anatomy = Anatomy.of(check_model(model))
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedModelError(
            "The model has parameters on the meta device, so there are no weights to prune. Load it with weights "
            "(without offloading to disk); what pruning would give says plan(model.config, config)."
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            "The model was loaded or made in torch.inference_mode, where no gradient can be computed. Load it outside."
        )
    batches = check_calibration(anatomy, calibration)
    check_weights(model)
    if count() > 1:
        check_same(
            {"model": _digest(model.state_dict().values()), "calibration": _digest(*(b.values() for b in batches))}
        )
    return anatomy, batches


def _digest(*tensors: Iterable[torch.Tensor]) -> str:
    """Of their shapes, and of some of their numbers."""
    digest = hashlib.sha256()
    for tensor in (one.detach() for some in tensors for one in some):
        few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
        digest.update(f"{tuple(tensor.shape)} {few.tolist()}".encode())
    return digest.hexdigest()


def _check_config(config: object) -> PruningConfig:
    if not isinstance(config, PruningConfig):
        raise ConfigError(f"config must be a PruningConfig, such as PruningConfig(ratio=0.5); got {shown(config)}.")
    return config


def _check_plan(plan: object) -> PruningPlan | None:
    """A plan that can be carried out; None if none is given."""
    if plan is None:
        return None
    if not isinstance(plan, PruningPlan):
        raise ConfigError(f"plan must be a PruningPlan, such as PruningPlan.load(path); got {shown(plan)}.")
    if not plan.chosen:
        raise ConfigError(
            "This plan holds sizes only: it was made from a config, without weights to choose by. Make it from the "
            "model: plan(model, config, calibration)."
        )
    if not plan.layers and not plan.units:
        raise ConfigError("This plan removes nothing: `layers` and `units` are empty.")
    return plan


def _carry_out(model: PreTrainedModel, plan: PruningPlan, calibration: Iterable[Batch] | None) -> PreTrainedModel:
    anatomy, batches = _checked(model, calibration)
    check_plan(anatomy, plan)
    return Cutter(anatomy, plan.config or PruningConfig(reconstruct=False), batches).cut(plan).model


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
        calibration: as for `prune`. With it a folder is read layer by layer, and units are chosen by its weights.

    Raises:
        ConfigError, DataError, UnsupportedModelError: as `prune`, and before any long work.
    """
    if isinstance(model, str | os.PathLike) and calibration is not None:
        checked = _check_config(config)
        with together("plan"):  # one process reads
            return PruningPlan.from_dict(from_main(lambda: plan_folder(model, checked, calibration).to_dict()))
    if isinstance(model, PreTrainedConfig | str | os.PathLike):
        model = without_weights(model)
    check_model(model)
    if model.device.type != "meta":
        with together("plan"):
            return described(search(model, config, calibration))
    anatomy, length = Anatomy.of(model), _check_config(config).sequence_length or fitting_length([], model)
    sizes = replace(_sizes_only(anatomy, config, length), model=model.config.model_type, config=config, chosen=False)
    expected = forecast(anatomy, sizes, length)
    narrower = [row for row in expected.layers if row.parameters and row.macs < row.macs_before]
    if narrower and config.allocation == "global":
        expected = replace(expected, loads_with="plugin")  # here all layers lose alike, then each by its scores
    return replace(sizes, forecast=expected)


def described(search: Search) -> PruningPlan:
    """The plan that a search finds, with how it was made, and what it will give."""
    chosen = replace(search.plan(), model=search.dense.config.model_type, config=search.config)
    return replace(chosen, forecast=forecast(search.dense, chosen, search.length, search.costs))


def without_weights(model: PreTrainedConfig | str | os.PathLike) -> PreTrainedModel:
    """The model of a config, or of a name to load it by, on the meta device."""
    config = model if isinstance(model, PreTrainedConfig) else load_config(os.fspath(model))
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    head = next((one for one in named if one is not None), None)
    with torch.device("meta"):
        return head._from_config(config) if head is not None else transformers.AutoModel.from_config(config)


def _sizes_only(anatomy: Anatomy, config: PruningConfig, length: int) -> PruningPlan:
    """As many units go from each layer; which layers, and which units, is not known: the last ones are named."""
    if config.metric == "latency":
        raise ConfigError("metric='latency' is measured, which needs a model with weights. Ask for 'macs' first.")
    check_learned(config)
    costs = _costs(anatomy, config, length)
    units = config.without_weights()
    if units is None:  # zeros change no size
        return PruningPlan()
    layers = {}
    if "layer" in units.granularity:
        later_first = {key: float(-key[1]) for key in costs.layers if key[0] in anatomy.droppable}
        share, family = units.layer_share * costs.total, anatomy.family
        exact = tuple(units.granularity) == ("layer",)
        layers = choose_layers(later_first, costs.layers, share, exact, family.deepest, family.first_stays)
    plan = PruningPlan(layers=layers)
    start = sum(cost for key, cost in costs.layers.items() if is_kept(key, plan))
    goal = (1 - units.ratio) * costs.total
    if "expert" in units.granularity and (mixtures := kept_mixtures(anatomy, plan)):
        remove = start - (goal if not units.unit_kinds else (start * goal) ** 0.5)
        first = {one: -torch.arange(one.experts, dtype=torch.float64) for one in mixtures}
        plan = replace(plan, units={one.name: k for one, k in choose_experts(first, costs.experts, remove).items()})
        start, costs = with_kept(costs, plan, start)
    if not units.unit_kinds:
        return plan
    groups = [group for group in kept_groups(anatomy, plan) if group.kind in units.unit_kinds]
    kept = allocate_alike(anatomy, groups, units, costs.of, start - goal)
    return replace(plan, units=plan.units | {group.name: numbers for group, numbers in kept.items()})


def _costs(anatomy: Anatomy, config: PruningConfig, length: int) -> Costs:
    costs = make_costs(anatomy, config.metric, length, config.latency_batch_size)
    check_reachable(anatomy, config, costs)
    return costs
