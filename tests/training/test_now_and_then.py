"""Within a long epoch checkpoints are written too, and a run that was stopped goes on from the last of them."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient import Recipe, compress
from hf_efficient.training import trainers

from ..pipeline.tiny import TINY, TRAINING

STOP = 6


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(("seconds", "first"), [(-1.0, STOP), (3600.0, 1)])
def test_a_run_goes_on_within_an_epoch(seconds, first, tmp_path, monkeypatch):
    """Steps are looked at one by one; either every one is due, or none."""
    monkeypatch.setattr(trainers, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(trainers, "SAVE_STEPS", 1)
    settings = TRAINING | {"epochs": 1, "batch_size": 16}
    recipe = Recipe.from_dict(copy.deepcopy(TINY) | {"teacher": settings, "stages": []})
    compress(recipe, output_dir=tmp_path / "whole")
    steps = []
    ordinary = trainers.ExactTrainer.training_step

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        if steps.count(STOP) == 1 and steps[-1] == STOP:
            raise KeyboardInterrupt
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(trainers.ExactTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, output_dir=tmp_path / "stopped")
    assert steps == list(range(1, STOP + 1))
    compress(recipe, output_dir=tmp_path / "stopped")
    assert steps[STOP] == first and steps[-1] == 10
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
