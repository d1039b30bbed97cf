"""A recipe that runs in seconds, and a run of it in this process."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_efficient import Recipe
from hf_efficient.pipeline.run import Run
from hf_efficient.pipeline.workspace import Workspace

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
TINY: dict[str, Any] = {
    "name": "tiny",
    "task": "image-classification",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
    },
    "data": {"name_or_path": "bundled:digits", "limit": 40},
    "teacher": TRAINING,
    "stages": [
        {"prune": {"ratio": 0.3, "calibration_samples": 8}},
        {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 0.5, "hidden": 0.1}}},
    ],
    "measure": {"repeats": 2},
}


def recipe(**overrides: Any) -> Recipe:
    return Recipe.from_dict(copy.deepcopy(TINY)).with_overrides(overrides)


def run_stage(asked: Recipe, name: str, folder: Path, target: str) -> dict[str, Any]:
    """One stage as the pipeline runs it, without measuring what comes out."""
    target_folder, run = folder / target, Run(asked, folder)
    target_folder.mkdir(parents=True, exist_ok=True)
    set_seed(asked.seed)
    stage = next(stage for place, stage in asked.folders.items() if place.endswith(f"-{name}"))
    return stage.run(run, run.teacher_folder, target_folder)


def run_stages(asked: Recipe, folder: Path) -> Path:
    """All stages in a workspace, so that each has its manifest; the folder of the last."""
    space, run = Workspace(folder, asked), Run(asked, folder)
    space.open(run.inputs())
    source = folder
    try:
        for name, stage in asked.folders.items():
            set_seed(asked.seed)
            source, _ = space.stage(name, {}, partial(stage.run, run, source))
    finally:
        space.close()
    return source
