"""Interrupted and resumed, exported and reloaded: nothing is lost, nothing is left behind."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_efficient.distillation.losses.projections import (
    ATTRIBUTE,
    SIDE_FILE,
    load_projections,
    save_projections,
)
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.errors import CheckpointError

from ..distillation.caching import make_cache
from ..distillation.tiny import arguments, collate, examples, make_pair
from ..distillation.training import ALL, make_trainer, weights

SETTINGS = {
    "losses": ALL,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
}


def with_adapters(pair):
    torch.manual_seed(0)
    return get_peft_model(pair[0], LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)), pair[1]


@pytest.mark.parametrize("wrap", [lambda pair: pair, with_adapters], ids=["plain", "peft"])
def test_resuming_equals_not_having_stopped(wrap, tmp_path):
    straight = make_trainer("bert", tmp_path / "run", pair=wrap(make_pair("bert")), **SETTINGS)
    straight.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = make_trainer("bert", tmp_path / "run", pair=wrap(make_pair("bert", seed=0)), **SETTINGS)
    with torch.no_grad():
        for parameter in again.projections.parameters():
            parameter.zero_()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert torch.equal(weights(again.model), weights(straight.model))
    assert torch.equal(weights(again.projections), weights(straight.projections))


def test_a_checkpoint_without_its_projections_is_an_error(tmp_path):
    trainer = make_trainer("bert", tmp_path, **SETTINGS)
    trainer.train()
    (tmp_path / "checkpoint-3" / SIDE_FILE).unlink()
    with pytest.raises(CheckpointError, match=SIDE_FILE):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_projections_of_other_layers_are_an_error(tmp_path):
    trainer = make_trainer("bert", tmp_path, losses=ALL)
    other = make_trainer("bert", tmp_path, losses=ALL, layer_map="last")
    save_projections(tmp_path, other.projections.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_projections(tmp_path, trainer.projections)
    assert not list(Path(tmp_path).glob("*.tmp"))


def test_the_checkpoint_and_the_export_are_plain_models(tmp_path):
    trainer = make_trainer("bert", tmp_path / "run", **SETTINGS)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.model.save_pretrained(tmp_path / "export")
    assert (tmp_path / "run" / "checkpoint-6" / SIDE_FILE).is_file()
    assert not (tmp_path / "final" / SIDE_FILE).exists()
    for folder in ("run/checkpoint-6", "final", "export"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert not any("projection" in key or "teacher" in key for key in saved)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / folder, output_loading_info=True, dtype=torch.float64
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(weights(model), weights(trainer.model))


def test_the_best_checkpoint_comes_back_with_its_projections(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss_hidden", "greater_is_better": True}
    trainer = make_trainer("bert", tmp_path, **SETTINGS, **best, eval_strategy="steps", eval_steps=3)
    trainer.train()
    logs = [log["eval_loss_hidden"] for log in trainer.state.log_history if "eval_loss_hidden" in log]
    assert trainer.state.best_model_checkpoint.endswith(
        "checkpoint-3"
    )  # the loss falls, and the highest was asked for
    assert trainer.evaluate()["eval_loss_hidden"] == pytest.approx(max(logs))
    side = load_file(tmp_path / "checkpoint-3" / SIDE_FILE)
    assert all(torch.equal(side[key], value) for key, value in trainer.projections.state_dict().items())


EVERYTHING = SETTINGS | {
    "losses": {"ce": 1.0, "kd": 1.0, "hidden": 0.5, "relation": 0.5},
    "temperature": 4.0,
    "temperature_final": 1.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "warmup_steps": 0.2,
    "weight_decay": 0.1,
}


def pair_with_dropout(folder, is_cached):
    student, teacher = make_pair("bert")
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    if is_cached:
        teacher = make_cache("bert", folder / "cache", teacher, hidden_states=[0, 2, 4])
    return student, teacher


@pytest.mark.parametrize("is_cached", [False, True], ids=["live", "cached"])
def test_a_run_killed_at_any_step_gives_the_weights_of_the_uninterrupted_one(is_cached, tmp_path):
    """Bit for bit: dropout, accumulation, data order, schedules of rate and temperature, and the log."""
    losses = EVERYTHING["losses"] if not is_cached else {"ce": 1.0, "kd": 1.0, "hidden": 0.5}

    def make(folder):
        pair = pair_with_dropout(tmp_path, is_cached)
        return make_trainer("bert", folder, pair=pair, **EVERYTHING | {"losses": losses})

    def logged(trainer):
        return [entry["loss_kd"] for entry in trainer.state.log_history if "loss_kd" in entry]

    straight = make(tmp_path / "straight")
    straight.train()
    assert len(set(logged(straight))) == 6
    for step in range(1, 6):
        torch.manual_seed(step)  # another process has another state
        again = make(tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(straight.model)), step
        assert torch.equal(weights(again.projections), weights(straight.projections)), step
        assert logged(again) == logged(straight)


def test_training_stops_early_and_the_best_comes_back(tmp_path):
    """With the loss of one term as the measure, and a projection that must come back with it."""
    settings = {
        "losses": ALL,
        "max_steps": 30,
        "learning_rate": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss_kd",
    }
    trainer = make_trainer("bert", tmp_path, callbacks=[EarlyStoppingCallback(2)], **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss_kd" in entry]
    best = min(range(len(entries)), key=lambda index: entries[index]["eval_loss_kd"])
    assert trainer.state.global_step == len(entries) == best + 3 < 30
    found = trainer.evaluate()
    for name in ("eval_loss_kd", "eval_loss_hidden"):
        assert found[name] == pytest.approx(entries[best][name], rel=1e-12)


def test_a_search_makes_a_new_student_for_each_trial(tmp_path):
    """`hyperparameter_search` without its optional packages: what it does to the trainer for one trial."""
    _, teacher = make_pair("bert")
    trainer = DistillationTrainer(
        model_init=lambda: make_pair("bert")[0],
        args=arguments(tmp_path, losses=ALL, learning_rate=0.1),
        teacher=teacher,
        train_dataset=examples("bert"),
        data_collator=collate,
    )
    plain = {t: make_trainer("bert", tmp_path, losses=ALL, temperature=t, learning_rate=0.1) for t in (1.0, 5.0)}
    for temperature, expected in plain.items():
        trainer.args.temperature = temperature  # as `_hp_search_setup` sets what is tried
        trainer.train()
        expected.train()
        assert torch.equal(weights(trainer.model), weights(expected.model))
        assert not hasattr(trainer.model, ATTRIBUTE)


def test_what_goes_to_the_hub_is_the_plain_model(tmp_path, monkeypatch):
    """Through the Trainer's own `push_to_hub`, against a Hub that notes what it is given."""
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, ignore_patterns, **options):
            names = [path.name for path in Path(folder_path).iterdir()]
            pushed[repo_id] = {name for name in names if not any(fnmatch(name, p) for p in ignore_patterns)}

    monkeypatch.setattr("transformers.trainer.hf_api", Hub, raising=False)
    monkeypatch.setattr("transformers.trainer.create_repo", Hub().create_repo, raising=False)  # before 5.23
    monkeypatch.setattr("transformers.trainer.upload_folder", Hub().upload_folder, raising=False)
    trainer = make_trainer("bert", tmp_path / "run", **SETTINGS, hub_model_id="me/student")
    trainer.train()
    trainer.push_to_hub()
    assert {"config.json", "model.safetensors", "README.md"} <= pushed["me/student"]
    assert SIDE_FILE not in pushed["me/student"] and "checkpoint-6" not in pushed["me/student"]
    assert not any("projection" in key for key in load_file(tmp_path / "run" / "model.safetensors"))


def test_a_reporter_is_told_every_term(tmp_path, monkeypatch):
    """`report_to` names a callback; it gets the unweighted losses of training and evaluation."""
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(set(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notebook_of_the_lab", Reporter)
    trainer = make_trainer("bert", tmp_path, losses=ALL, report_to="notebook_of_the_lab")
    trainer.train()
    trainer.evaluate()
    terms = {"loss", *(f"loss_{name}" for name in ALL)}
    assert any(terms <= names for names in told)
    assert any({f"eval_{name}" for name in (*terms, "teacher_agreement")} <= names for names in told)
