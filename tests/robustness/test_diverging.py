"""Training that diverges stops and says where; nothing of it is taken for a result."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback

from hf_efficient import TrainingError, compress
from hf_efficient.training.trainers import ExactTrainer

from ..distillation.training import make_trainer
from .tiny import recipe

MANY = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 100}


def spoilt(trainer, monkeypatch, name, step, value=math.nan):
    """The trainer, one term of whose loss is `value` from that step on."""
    real = trainer._run_student

    def run(*args):
        sums, logits = real(*args)
        if trainer.state.global_step + 1 >= step:
            sums[name] = {part: total * value for part, total in sums[name].items()}
        return sums, logits

    monkeypatch.setattr(trainer, "_run_student", run)
    return trainer


@pytest.mark.parametrize(("name", "value"), [("hidden", math.nan), ("kd", math.inf)])
def test_distillation_names_the_step_and_the_term(name, value, tmp_path, monkeypatch):
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0, "kd": 1.0, "hidden": 0.5}, **MANY)
    spoilt(trainer, monkeypatch, name, 3, value)
    with pytest.raises(TrainingError, match=rf"The loss \({name}\) is nan or infinite at step 3 of 6.*learning_rate"):
        trainer.train()


def test_the_same_run_without_a_fault_ends(tmp_path):
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0, "kd": 1.0, "hidden": 0.5}, **MANY)
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("options", [{"save_strategy": "steps", "save_steps": 2}, {"logging_steps": 1}], ids=str)
def test_nothing_that_is_broken_is_saved_or_logged(options, filtered, tmp_path, monkeypatch):
    options = options | {"logging_nan_inf_filter": filtered}  # without it the Trainer does not wait for every loss
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0}, **MANY | options)
    spoilt(trainer, monkeypatch, "ce", 4)
    with pytest.raises(TrainingError, match="step 4 of 6"):
        trainer.train()
    saved = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert saved == (["checkpoint-2"] if "save_steps" in options else [])
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert max((entry["step"] for entry in trainer.state.log_history), default=0) < 4


def test_weights_that_the_last_step_broke_are_found(tmp_path):
    """The loss of the last step is that before its update."""

    class Breaking(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.classifier.bias.data[0] = math.inf

    settings = MANY | {"max_steps": 1}
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0}, callbacks=[Breaking()], **settings)
    with pytest.raises(TrainingError, match=r"the first is classifier\.bias, are nan .* after step 1"):
        trainer.train()


def test_a_step_that_a_gradient_scaler_skips_is_no_fault(tmp_path, monkeypatch):
    """Under fp16 gradients overflow now and then: the loss is finite, and the step does not happen."""
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0}, **MANY)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    real = Trainer.training_step

    def overflowing(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        return loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    monkeypatch.setattr(Trainer, "training_step", overflowing)
    monkeypatch.setattr(trainer.args, "max_grad_norm", 0.0)
    real_prepare = trainer._prepare_for_training

    def prepare(*args):
        made = real_prepare(*args)
        trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
        scaler.scale(torch.zeros(1))
        return made

    monkeypatch.setattr(trainer, "_prepare_for_training", prepare)
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_second_try_with_the_same_trainer_begins_afresh(tmp_path, monkeypatch):
    trainer = spoilt(make_trainer("bert", tmp_path, losses={"ce": 1.0}, **MANY), monkeypatch, "ce", 2)
    with pytest.raises(TrainingError):
        trainer.train()
    monkeypatch.undo()
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_stage_that_diverged_is_not_finished(tmp_path, monkeypatch):
    real = ExactTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 4 else loss

    monkeypatch.setattr(ExactTrainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match=r"The loss is nan or infinite at step 5 of 8\..* \(now 0\.001\)"):
        compress(recipe(), output_dir=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert names == {"0-teacher.partial"}
    assert [path.name for path in (tmp_path / "out").glob("*/trainer/checkpoint-*")] == ["checkpoint-4"]
