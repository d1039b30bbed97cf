"""Steps that the loss scaler of fp16 skips give no scores."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_efficient import PruningCallback
from tests.helpers import assert_close

from ..tiny import batch, logits
from ..training import Before, make_trainer, pruning

LEARNED = ("taylor", "fisher", "movement")


class Scaled(Trainer):
    """Steps of a loss scaler that begins too high, as in fp16; on a CPU, where accelerate offers none."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
        self.accelerator.scaler = scaler
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(self.optimizer.optimizer)

    def compute_loss(self, *args, **kwargs):
        return 16 * super().compute_loss(*args, **kwargs)


class Skipped(TrainerCallback):
    """Did the scaler back off, and did the scores change?"""

    def __init__(self, callback: PruningCallback):
        self.callback, self.steps, self.changed = callback, [], []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.scale = optimizer.scaler.get_scale()
        self.before = {part: score.clone() for part, score in self.callback.removal.scores.items()}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.steps.append(optimizer.scaler.get_scale() < self.scale)
        after = self.callback.removal.scores
        self.changed.append(any(not torch.equal(after[part], score) for part, score in self.before.items()))


@pytest.mark.cover
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("granularity", [("head", "neuron"), "weight"])
@pytest.mark.parametrize("importance", LEARNED)
def test_steps_that_a_loss_scaler_skips_do_not_count(importance, granularity, optimizer, tmp_path):
    callback = pruning(granularity=granularity, importance=importance)
    skipped, before = Skipped(callback), Before(batch("bert"))
    plain = make_trainer("bert", tmp_path, [], optim=optimizer)
    trainer = Scaled(plain.model, plain.args, train_dataset=plain.train_dataset, callbacks=[before, callback, skipped])
    trainer.train()
    assert skipped.steps[0] and not skipped.steps[-1]
    assert skipped.changed == [not step for step in skipped.steps]
    assert all(score.isfinite().all() for score in callback.removal.scores.values())
    assert_close(logits(trainer.model.eval(), batch("bert")), before.logits, 1e-5)
