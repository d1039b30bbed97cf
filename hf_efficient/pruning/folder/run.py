"""Prune a model that need not fit into memory: from a checkpoint folder to a checkpoint folder, layer by layer.

    prune_folder("llama-70b", PruningConfig(ratio=0.3), batches, output_dir="small")
    plan = plan_folder("llama-70b", PruningConfig(ratio=0.3), batches)

The same call again goes on with what was begun: in the hidden folder beside `output_dir` lie the shards that are
finished and, in `work`, what the passes over the layers have found. The result gets its name when it is whole.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from ...io.checkpoint import INDEX
from ...io.disk import (
    check_empty,
    clear_disk_errors,
    finish_folder,
    kept_folder,
    own_folder,
    remove_own,
    scratch_folder,
    write_atomic,
)
from ...io.json import parse_json, read_json
from ...models.on_disk import WHOLE
from ...version import __version__
from ..choose.reach import check_reachable
from ..config import PruningConfig
from ..cut.surgery import check_plan
from ..methods import IMPORTANCES
from ..plan import PruningPlan
from ..price.costs import make_costs
from ..price.forecast import forecast
from ..score.calibration import fitting_length
from ..search import Cutter, Judgement, Search
from .dense import DenseModel
from .scores import KNOWN, layer_scores, look_back, unit_scores
from .shelf import Shelf
from .small import SmallModel

WORK, CALL = "work", "call.json"
AGAIN = "Give the same call again: it goes on with what is missing."


def prune_folder(
    name: str | os.PathLike,
    how: PruningConfig | PruningPlan,
    calibration: Iterable[Any] | None,
    output_dir: str | os.PathLike,
) -> Path:
    """See `pruning.prune.prune`."""
    check_empty(output_dir)
    dense = DenseModel.open(os.fspath(name), calibration)
    if isinstance(how, PruningPlan):
        check_plan(dense.anatomy, how)
        config = how.config or PruningConfig(reconstruct=False)
    else:
        config, search = how, _search(dense, how)
    fits = config.reconstruct and bool(dense.batches)
    made = kept_folder(output_dir)
    with clear_disk_errors(output_dir, AGAIN):
        if not (made / INDEX).is_file() or (made / WORK).is_dir():
            shelf = _begin(made, _call(dense, how))
            if isinstance(how, PruningPlan):
                _passes(dense, shelf, None, config, fits)
                plan = how
            else:
                plan = _chosen(dense, search, shelf, fits)
            SmallModel(dense, plan, made).write(fits)
            remove_own(made / WORK)
        finish_folder(made, output_dir)
    return Path(output_dir)


def plan_folder(name: str | os.PathLike, config: PruningConfig, calibration: Iterable[Any] | None) -> PruningPlan:
    """See `pruning.prune.plan`."""
    dense = DenseModel.open(os.fspath(name), calibration)
    search = _search(dense, config)
    with scratch_folder() as folder, clear_disk_errors(folder, "TMPDIR says where it lies."):
        chosen = _chosen(dense, search, Shelf(folder / WORK), fits=False)
    chosen = replace(chosen, model=dense.anatomy.config.model_type, config=config)
    return replace(chosen, forecast=forecast(dense.anatomy, chosen, search.length))


def _search(dense: DenseModel, config: PruningConfig) -> Search:
    """What is asked for, checked: ConfigError names what needs the whole model."""
    units, layers = bool(config.unit_kinds), "layer" in config.granularity
    importance = config.importance if units else config.layer_importance
    refused = {
        "single weights": "weight" in config.granularity,
        "whole experts": "expert" in config.granularity,
        "metric='latency'": config.metric == "latency",
        f"steps={config.steps}": config.steps > 1,
        "layers and units together (prune the layers first, then the result)": units and layers,
        f"importance={importance!r} (from a folder: {', '.join(KNOWN)}, of layers block_influence too)": importance
        not in (*KNOWN, *(() if units else ("block_influence",))),
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ConfigError(f"A model that is read layer by layer cannot be pruned with {what}. {WHOLE}")
    needs_data = IMPORTANCES[importance].needs_data if importance in IMPORTANCES else True
    if needs_data and not dense.batches:
        raise DataError(
            f"importance={importance!r} needs calibration batches: prune(folder, config, calibration=batches, "
            "output_dir=...). Without data use importance='magnitude'."
        )
    if not dense.batches and dense.stored.model.main_input_name not in ("input_ids", "pixel_values"):
        raise UnsupportedModelError(f"Give calibration batches: how long its inputs are is not known. {WHOLE}")
    length = config.sequence_length or fitting_length(dense.batches, dense.stored.model)
    costs = make_costs(dense.anatomy, config.metric, length)
    check_reachable(dense.anatomy, config, costs)
    return Search(config, Cutter(dense.anatomy, config, dense.batches), costs, length)


def _chosen(dense: DenseModel, search: Search, shelf: Shelf, fits: bool) -> PruningPlan:
    config = search.config
    units = [group for group in dense.anatomy.groups if group.kind in config.unit_kinds]
    _passes(dense, shelf, config.importance if units else config.layer_importance, config, fits)
    if units:
        known = Judgement(units=unit_scores(dense, units, config.importance, config, search.length))
    else:
        known = Judgement(layers=layer_scores(dense, config, search.length))
    return replace(search, known=known).plan()


def _passes(dense: DenseModel, shelf: Shelf, importance: str | None, config: PruningConfig, fits: bool) -> None:
    """Through the layers, forwards and back, as far as what follows needs it."""
    looks = fits or (importance is not None and (importance not in IMPORTANCES or IMPORTANCES[importance].needs_data))
    dense.shelf = shelf
    if not looks:
        return
    dense.start(shelf)
    dense.forward()
    groups = list(dense.anatomy.groups)
    groups = [group for group in groups if group.kind in config.unit_kinds] if config.unit_kinds else groups
    look_back(dense, importance, groups, config.seed, fits)


def _begin(made: Path, call: dict[str, Any]) -> Shelf:
    """The shelf of this call; CheckpointError if the folder was begun by another one."""
    work = own_folder(made / WORK)
    if (work / CALL).is_file():
        if read_json(work / CALL) != call:
            raise CheckpointError(
                f"{made} holds what another call has begun: another model, other batches, or other settings. Delete "
                "that folder, or choose another output_dir."
            )
    elif any(made.glob("*.safetensors")):
        raise CheckpointError(f"{made} holds files of which nothing is known. Delete that folder.")
    else:
        write_atomic(work / CALL, json.dumps(call))
    return Shelf(work)


def _call(dense: DenseModel, how: PruningConfig | PruningPlan) -> dict[str, Any]:
    """What decides the result, in plain values."""
    files = sorted({one.path for one in dense.stored.tensors.values() if one.path})
    digest = hashlib.sha256()
    for batch in dense.batches:
        for key, value in sorted(batch.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    call = {
        "version": __version__,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "model": dense.anatomy.config.to_dict(),
        "how": how.to_dict(),
        "batches": digest.hexdigest(),
    }
    return parse_json(json.dumps(call, default=str))


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
