"""PruningCallback in a standard `transformers.Trainer`: the schedule, the zeros, the small model at the end."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hf_efficient import CheckpointError, ConfigError, PruningCallback, PruningConfig, UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.callback import STATE_FILE
from hf_efficient.pruning.gradual.schedule import ratio_at
from hf_efficient.pruning.price.costs import total_cost, unit_cost
from tests.helpers import assert_close
from tests.processes import launch

from . import callback_driver
from .tiny import batch, logits, make, sizes
from .training import STEPS, Before, Watch, count, make_trainer, pruning

ROOT = Path(__file__).parents[2]
AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}
LENGTH = 128


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2"])
def run(request, tmp_path_factory):
    """One run that several tests look at."""
    torch.manual_seed(0)
    case, callback = request.param, pruning()
    watch, before = Watch(callback), Before(batch(request.param))
    trainer = make_trainer(case, tmp_path_factory.mktemp(case), [before, callback, watch])
    trainer.train()
    return case, trainer, callback, watch, before


def removed_share(model, removed) -> float:
    anatomy = Anatomy.of(model)
    gone = sum(int(mask.sum()) * unit_cost(anatomy, group, "macs", LENGTH) for group, mask in removed.items())
    return gone / total_cost(model, "macs", LENGTH)


def test_the_ratio_follows_the_schedule(run):
    case, _, _, watch, _ = run
    dense = make(case)
    step_size = max(
        unit_cost(Anatomy.of(dense), group, "macs", LENGTH) * (8 if group.kind == "neurons" else 1)
        for group in Anatomy.of(dense).groups
    ) / total_cost(dense, "macs", LENGTH)
    for step, removed in enumerate(watch.removed, start=1):
        wanted = ratio_at("cubic", step // 2 * 2, 2, 12, 0.5)
        assert wanted <= removed_share(dense, removed) + 1e-9 < wanted + step_size
    shares = [removed_share(dense, removed) for removed in watch.removed]
    assert shares[1] == 0 < shares[5] < shares[-1]
    assert len(set(shares)) > 3


def test_what_is_removed_stays_removed_and_zero(run):
    """Weights, both moments of AdamW, under weight decay and with momentum."""
    *_, watch, _ = run
    assert len(watch.leftover) == STEPS
    assert watch.leftover == [0.0] * STEPS
    assert min(watch.alive) > 0
    for earlier, later in pairwise(watch.removed):
        assert all(not (mask & ~later[group]).any() for group, mask in earlier.items())


def test_the_final_model_is_small_and_computes_what_the_masked_one_did(run):
    case, trainer, callback, _, before = run
    model = trainer.model
    assert count(model) < before.parameters == count(make(case))
    assert removed_share(make(case), callback.removal.removed) >= 0.5
    assert [g.units for g in Anatomy.of(model).groups] == [
        int((~mask).sum()) for mask in callback.removal.removed.values()
    ]
    assert all(units % 8 == 0 for (_, kind, _), units in sizes(model).items() if kind == "neurons")
    assert_close(logits(model.eval(), batch(case)), before.logits, 1e-5)
    assert (logits(make(case), batch(case)) - before.logits).abs().max() > 0.01


def test_saving_loading_and_evaluating_after_training(run, tmp_path):
    case, trainer, *_ = run
    trainer.save_model(str(tmp_path))
    loaded, info = AUTO[case].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), batch(case)), logits(trainer.model.eval(), batch(case)))
    again = make_trainer(case, tmp_path, [], model=loaded)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(again.evaluate()["eval_loss"], rel=1e-6)


def test_a_trainer_cannot_go_on_with_the_optimizer_of_the_larger_model(run):
    _, trainer, *_ = run
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "magnitude", "allocation": "uniform"},
        {"importance": "taylor", "allocation": "uniform"},
        {"importance": "random", "granularity": "neuron", "ratio": 0.1},
        {"importance": "taylor", "granularity": "head", "ratio": 0.2, "schedule": "linear"},
        {"importance": "magnitude", "schedule": "one-shot", "metric": "parameters"},
    ],
    ids=str,
)
def test_every_setting_reaches_its_ratio(settings, tmp_path):
    callback = pruning(every=1, **settings)
    watch, before = Watch(callback), Before(batch("bert"))
    trainer = make_trainer("bert", tmp_path, [before, callback, watch])
    trainer.train()
    metric = settings.get("metric", "macs")
    reached = 1 - total_cost(trainer.model, metric, LENGTH) / total_cost(make("bert"), metric, LENGTH)
    assert callback.config.ratio <= reached + 1e-9
    assert watch.leftover == [0.0] * STEPS
    assert_close(logits(trainer.model.eval(), batch("bert")), before.logits, 1e-5)
    if callback.config.allocation == "uniform":
        assert len({units for (_, kind, _), units in sizes(trainer.model).items() if kind == "neurons"}) == 1
        assert len({units for (_, kind, _), units in sizes(trainer.model).items() if kind == "heads"}) == 1


@pytest.mark.parametrize(
    ("case", "dropout"), [pytest.param("bert", 0.0, marks=pytest.mark.thorough), ("bert", 0.3), ("vit", 0.0)]
)
def test_a_resumed_run_ends_with_the_same_bits(case, dropout, tmp_path):
    def model():
        one = make(case)
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return one

    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(case, tmp_path, [pruning()], model=model(), **settings)
    whole.train()
    assert (tmp_path / "checkpoint-5" / STATE_FILE).exists()
    expected = whole.model.state_dict()
    for step in (5, 15):  # while the ratio rises, and after
        resumed = make_trainer(case, tmp_path, [pruning()], model=model(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = resumed.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = make_trainer(case, tmp_path, [pruning()], model=model(), seed=4)
    other.train()
    assert any(
        value.shape != expected[key].shape or not value.equal(expected[key])
        for key, value in other.model.state_dict().items()
    )


def test_a_checkpoint_of_another_run(tmp_path):
    make_trainer("bert", tmp_path, [], save_strategy="steps", save_steps=10).train()
    resumed = make_trainer("bert", tmp_path, [pruning()])
    with pytest.raises(CheckpointError, match=r"pruning_state.safetensors is missing.*output_dir"):
        resumed.train(resume_from_checkpoint=True)


class _Worsen(TrainerCallback):
    """Makes the checkpoint of one step the best."""

    def __init__(self, best: int):
        self.best = best

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - self.best)


@pytest.mark.parametrize(("best", "share"), [(15, 0.5), (4, 0.1)])
def test_the_best_checkpoint_becomes_small(best, share, tmp_path, caplog):
    """It has the function of that checkpoint; a warning says so if it was written before the schedule had ended."""
    callback, before = pruning(), Before(batch("bert"))
    trainer = make_trainer(
        "bert",
        tmp_path,
        [_Worsen(best), before, callback],
        save_strategy="steps",
        save_steps=best if best == 4 else 5,
        eval_strategy="steps",
        eval_steps=best if best == 4 else 5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_global_step == best
    dense = make("bert")
    dense.load_state_dict(load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert torch.equal(before.logits, logits(dense, batch("bert")))
    assert_close(logits(trainer.model.eval(), batch("bert")), before.logits, 1e-5)
    reached = 1 - total_cost(trainer.model, "macs", LENGTH) / total_cost(dense, "macs", LENGTH)
    assert share <= reached and (reached >= 0.5) == (share == 0.5)


def test_accumulated_steps_are_optimizer_steps(tmp_path):
    callback = pruning()
    watch, before = Watch(callback), Before(batch("bert"))
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer("bert", tmp_path, [before, callback, watch], **settings)
    trainer.train()
    assert len(watch.removed) == STEPS
    shares = [removed_share(make("bert"), removed) for removed in watch.removed]
    assert shares[1] == 0 < shares[3] and shares[11] >= 0.5
    assert watch.leftover == [0.0] * STEPS
    assert_close(logits(trainer.model.eval(), batch("bert")), before.logits, 1e-5)


class _Overflow(TrainerCallback):
    """One step with the gradients of an fp16 overflow, which the scaler would skip."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            for parameter in model.parameters():
                parameter.grad.fill_(float("inf"))


class _Skip(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            model.zero_grad()


def test_overflown_gradients_leave_no_trace_in_the_scores(tmp_path):
    callback = pruning()
    trainer = make_trainer("bert", tmp_path, [_Overflow(), callback, _Skip()])
    trainer.train()
    assert all(score.isfinite().all() for score in callback.removal.scores.values())
    assert all(score.max() > 0 for score in callback.removal.scores.values())
    assert count(trainer.model) < count(make("bert"))


def test_zero_weights_of_the_original_are_not_taken_for_removed(tmp_path):
    """Output weights that start at zero are trained like others."""
    model = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    callback = pruning(ratio=0.1, granularity="head", importance="magnitude")
    trainer = make_trainer("bert", tmp_path, [callback], model=model)
    trainer.train()
    assert sizes(trainer.model)["encoder", "neurons", 0] == 48
    assert trainer.model.bert.encoder.layer[0].output.dense.weight.abs().max() > 0


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="Drop layers before"):
        PruningCallback(PruningConfig(granularity=("layer", "head")))
    for bad in (
        {"start": 0.5, "end": 0.5},
        {"start": -0.1},
        {"end": 1.1},
        {"every": 0},
        {"every": 2.5},
        {"momentum": 1.0},
    ):
        with pytest.raises(ConfigError, match=str(next(reversed(bad.values())))):
            PruningCallback(PruningConfig(), **bad)
    with pytest.raises(ConfigError, match="cannot be reached"):  # when training begins, not in the middle of it
        make_trainer("bert", tmp_path, [pruning(ratio=0.999)]).train()
    with pytest.raises(UnsupportedModelError, match="transformers model is needed"):
        pruning().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "two"
    launch("tests.pruning.callback_driver", out)
    return json.loads(Path(f"{out}.json").read_text()), load_file(f"{out}.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("case", callback_driver.CASES)
def test_two_processes_remove_the_same_parts_as_one(two_processes, case):
    report = two_processes[0][case]
    assert report["processes"] == 2
    assert report["same_masks"] and report["same_weights"]
    assert report["removed"][0] == report["removed"][1] > 0
    assert len(set(report["sizes"])) == 1
    assert (
        report["sizes"][0] == report["dense"]
        if "weight" in case or "2:4" in case
        else (report["sizes"][0] < report["dense"])
    )
    assert report["loss"] > 0
    alone, tensors = callback_driver.run(case, batch_size=4)
    assert alone["processes"] == 1
    removed, weights = (two_processes[1][f"{case}.{name}"] for name in ("removed", "weights"))
    assert torch.equal(tensors["removed"], removed)
    assert_close(tensors["weights"], weights, 1e-3)
