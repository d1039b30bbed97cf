"""A checkpoint that a disk or a stranger has changed: one message with the file, what is wrong, and what to do."""

import json
import logging
import shutil

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_efficient import DistillationTrainer
from hf_efficient.errors import CheckpointError

from ..distillation.tiny import arguments
from ..distillation.training import make_trainer, weights

SETTINGS = {
    "losses": {"ce": 1.0},
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer("bert", folder, **SETTINGS)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4"))


def resume(run):
    trainer = make_trainer("bert", run, **SETTINGS)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


def refused(run, file):
    with pytest.raises(CheckpointError, match=f"checkpoint-2/{file} .* Delete the folder .*checkpoint-2"):
        resume(run)


def test_whole_checkpoint_is_resumed(run, made):
    assert torch.equal(weights(resume(run).model), made[1])


@pytest.mark.cover
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", b"\x80\x04K\x01."])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_file_that_is_none(run, file, content):
    (run / "checkpoint-2" / file).write_bytes(content)
    refused(run, file)


@pytest.mark.cover
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_file_that_is_cut_short(run, file, kept):
    path = run / "checkpoint-2" / file
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refused(run, file)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.cover
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("value", [[], 7, {}, {"a": torch.ones(2)}, None, pytest.param(Evil(), id="evil")], ids=str)
def test_file_that_holds_something_else(run, file, value):
    torch.save(value, run / "checkpoint-2" / file)
    refused(run, file)


@pytest.mark.parametrize("change", ["shape", "groups"])
def test_optimizer_of_another_model(run, change):
    path = run / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    if change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        state["param_groups"].pop()
    torch.save(state, path)
    refused(run, "optimizer.pt")


@pytest.mark.parametrize("value", ["soon", None, [1]])
def test_schedule_of_something_else(run, value):
    path = run / "checkpoint-2" / "scheduler.pt"
    torch.save(torch.load(path, weights_only=True) | {"last_epoch": value}, path)
    refused(run, "scheduler.pt")


@pytest.mark.parametrize("text", ["", "null", "[]", "7", "{", "[" * 5000, '{"global_step": 1e999}', '{"a": ' * 200])
def test_state_that_is_none(run, text):
    (run / "checkpoint-2" / "trainer_state.json").write_text(text)
    refused(run, "trainer_state.json")


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": "2"},
        {"global_step": -1},
        {"global_step": 3},
        {"global_step": 10**12},
        {"global_step": True},
        {"max_steps": None},
        {"max_steps": 10**400},
        {"num_train_epochs": []},
        {"epoch": "one"},
        {"epoch": float("nan")},
        {"train_batch_size": {}},
        {"log_history": {"a": 1}},
        {"log_history": [[]]},
        {"best_model_checkpoint": 5},
        {"stateful_callbacks": []},
        {"stateful_callbacks": {"TrainerControl": 5}},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_state_that_no_training_writes(run, change):
    path = run / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(run, "trainer_state.json")


SIZES = {"d_model": 16, "vocab_size": 40, "decoder_start_token_id": 0, "pad_token_id": 0}
TIED = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES, num_layers=1, num_heads=2, d_kv=8, d_ff=16)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **SIZES,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_not_reported_missing(name, tmp_path, caplog):
    rows = [{"input_ids": [4, 5, 6], "labels": [7, 8 + i]} for i in range(8)]
    make = lambda: DistillationTrainer(TIED[name](), arguments(tmp_path, **SETTINGS), train_dataset=rows)  # noqa: E731
    make().train()
    logging.getLogger("transformers").propagate = True
    trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "missing keys" not in caplog.text
    result = type("Result", (), {"missing_keys": ["shared.weight", "lm_head.bias"], "unexpected_keys": []})()
    names = dict(trainer.model.named_parameters(remove_duplicate=False))
    result.missing_keys = [next(iter(names))] * 0 + ["model.nothing"]
    trainer._issue_warnings_after_load(result)
    assert "model.nothing" in caplog.text
