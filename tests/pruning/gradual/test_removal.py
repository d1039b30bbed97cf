"""What training gradients give PruningCallback: scores, zeros that nothing sees, and patterns of single zeros."""

import copy
import gc
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_efficient import CheckpointError, ConfigError, PruningCallback, PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import output_weight
from hf_efficient.pruning.callback import STATE_FILE
from hf_efficient.pruning.cut.linears import as_matrix, count_zeros, find_linears, matrix, parameter_of
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.gradual.zeros import KeepZeros
from hf_efficient.pruning.plan import PruningPlan
from tests.helpers import assert_close

from ..tiny import batch, batches, logits, make, sizes
from ..training import STEPS, Before, Watch, make_trainer, pruning

LEARNED = ("taylor", "fisher", "movement")


def weights(**changes) -> PruningCallback:
    return pruning(**{"granularity": "weight"} | changes)


class Naive(TrainerCallback):
    """The scores of the docstring, written out; `effects` of every step, by the names of parts."""

    def __init__(self, callback: PruningCallback):
        self.callback, self.effects = callback, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {}
        if "weight" in self.callback.config.granularity:
            for linear in find_linears(Anatomy.of(model)):
                weight = parameter_of(model, linear)
                found[linear.name] = as_matrix(model, linear, weight.detach() * weight.grad)
        else:
            for group in Anatomy.of(model).groups:
                weight = output_weight(model, group.members[0])
                columns = (weight.detach() * weight.grad).sum(1 - group.members[0].output.dim)
                found[group.name] = columns.view(group.units, -1).sum(1)
        self.effects.append(found)

    def score(self, name: str) -> torch.Tensor:
        effects = [step[name] for step in self.effects]
        if self.callback.config.importance == "movement":
            return -sum(effects)
        power, momentum = {"taylor": 1, "fisher": 2}[self.callback.config.importance], self.callback.settings.momentum
        steps = len(effects)
        return sum((1 - momentum) * momentum ** (steps - 1 - i) * e.abs() ** power for i, e in enumerate(effects))


@pytest.mark.parametrize("importance", LEARNED)
@pytest.mark.parametrize(
    ("case", "granularity"), [("bert", ("head", "neuron")), ("bert", "weight"), ("gpt2", "weight")]
)
def test_scores_are_the_formulas_over_all_steps(case, granularity, importance, tmp_path):
    callback = pruning(granularity=granularity, importance=importance)
    naive = Naive(callback)
    make_trainer(case, tmp_path, [naive, callback], max_steps=6).train()
    assert len(naive.effects) == 6
    for part, score in callback.removal.scores.items():
        expected = naive.score(part.name)
        assert_close(score, expected, 1e-5 * float(expected.abs().max()))
        assert expected.abs().max() > 0


@pytest.mark.parametrize("granularity", [("head", "neuron"), "weight"])
def test_movement_keeps_what_moves_away_from_zero(granularity):
    """A step of plain gradient descent, learning rate 1: S is w (w' - w), above zero where |w| grows."""
    model, callback = make("bert"), pruning(granularity=granularity, importance="movement")
    callback.on_train_begin(_Arguments, _State, None, model=model, optimizer=torch.optim.SGD(model.parameters()))
    before = copy.deepcopy(model)
    model(**batch("bert")).loss.backward()
    callback.removal.learn(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for part, score in callback.removal.scores.items():
        if granularity == "weight":
            expected = matrix(before, part) * (matrix(model, part) - matrix(before, part))
        else:
            old, new = (output_weight(m, part.members[0]).detach() for m in (before, model))
            expected = (old * (new - old)).sum(0).view(part.units, -1).sum(1)
        assert_close(score, expected, 1e-5)
        assert (score > 0).any() and (score < 0).any()


class _Arguments:
    fsdp = deepspeed = None


class _State:
    global_step = 0


@pytest.mark.cover
@pytest.mark.parametrize("granularity", [("head", "neuron"), "weight"])
@pytest.mark.parametrize("importance", LEARNED)
def test_16_examples_score_alike_as_one_batch_and_as_four_times_four(importance, granularity, tmp_path):
    found = []
    for accumulated in (1, 4):
        callback = pruning(granularity=granularity, importance=importance)
        steps = {"per_device_train_batch_size": 12 // accumulated, "gradient_accumulation_steps": accumulated}
        other = {"max_steps": 2, "learning_rate": 1e-3}
        # Rows keep their order of sampling, so an optimizer step has the same examples.
        make_trainer("vit", tmp_path, [callback], **steps, **other, model=make("vit")).train()
        found.append(torch.cat([score.flatten() for score in callback.removal.scores.values()]))
    assert_close(found[1], found[0], 1e-4 * float(found[0].abs().max()))
    assert found[0].abs().max() > 0


class Norms(TrainerCallback):
    """Notes the norm of the gradients as clipping sees it, and lets `twin` say what it should be."""

    def __init__(self, callback: PruningCallback, twin):
        self.callback, self.twin, self.found = callback, twin, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        self.found.append((float(norm), self.twin(model, self.callback.removal.removed)))


def _norm(model) -> float:
    model.zero_grad()
    model(**batch("bert")).loss.backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def _compact_norm(model, removed) -> float:
    if not any(mask.any() for mask in removed.values()):
        return _norm(copy.deepcopy(model))
    kept = {group.name: tuple((~mask).nonzero().flatten().tolist()) for group, mask in removed.items()}
    return _norm(apply_plan(Anatomy.of(model), PruningPlan(units=kept)).train())


def _masked_norm(model, removed) -> float:
    twin = copy.deepcopy(model)  # without hooks
    total = _norm(twin) ** 2
    for linear, mask in removed.items():
        total -= float(as_matrix(twin, linear, parameter_of(twin, linear).grad)[mask].square().sum())
    return math.sqrt(total)


@pytest.mark.parametrize(
    ("granularity", "twin"), [("neuron", _compact_norm), ("head", _compact_norm), ("weight", _masked_norm)]
)
def test_clipping_sees_only_what_is_left(granularity, twin, tmp_path):
    """An activation that is not zero at zero gives removed neurons a gradient; a zero weight always has one."""
    model = make("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.Sigmoid()
    model.config.hidden_act = "sigmoid"
    one = batch("bert")
    rows = [{key: value[row] for key, value in one.items()} for row in range(3)]
    callback = pruning(ratio=0.15, granularity=granularity)
    norms = Norms(callback, twin)
    settings = {"per_device_train_batch_size": 3, "max_grad_norm": 0.0, "max_steps": 12, "learning_rate": 1e-3}
    trainer = make_trainer("bert", tmp_path, [callback, norms], model=model, **settings)
    trainer.train_dataset = rows
    trainer.train()
    for found, expected in norms.found:
        assert found == pytest.approx(expected, rel=1e-4)
    assert any(mask.any() for mask in callback.removal.removed.values())


def test_without_hooks_clipping_would_see_more():
    """The other half of the test above: what is cleared is not zero by itself."""
    model = make("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.Sigmoid()
    model.config.hidden_act = "sigmoid"
    callback = pruning(ratio=0.15, granularity="neuron", importance="magnitude")
    callback.on_train_begin(_Arguments, _State, None, model=model, optimizer=torch.optim.SGD(model.parameters()))
    callback.removal.raise_to(model, 0.15)
    callback._held.hold(callback.removal.zeros(model))
    callback._held.apply(torch.optim.SGD(model.parameters()))
    plain = copy.deepcopy(model)
    compact = _compact_norm(model, callback.removal.removed)
    assert _norm(model) == pytest.approx(compact, rel=1e-5)
    assert _norm(plain) > 1.001 * compact


class Zeros(TrainerCallback):
    """Stands after the callback: are what it removed, and its moments, zero after each step?"""

    def __init__(self, callback: PruningCallback):
        self.callback, self.leftover, self.shares = callback, [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        leftover = gone = total = 0.0
        for linear, mask in self.callback.removal.removed.items():
            weight = parameter_of(model, linear)
            for tensor in (weight.detach(), optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
                leftover += float(as_matrix(model, linear, tensor)[mask].abs().sum())
            gone, total = gone + int(mask.sum()), total + mask.numel()
        self.leftover.append(leftover)
        self.shares.append(gone / total)


@pytest.mark.cover
@pytest.mark.parametrize("case", ["bert", pytest.param("gpt2", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("importance", [*LEARNED, "magnitude", "random"])
@pytest.mark.parametrize(
    "structure", [{}, {"allocation": "uniform", "ratio": 0.6}, {"mask_structure": "2:4"}], ids=str
)
def test_weights_become_zero_on_schedule_and_stay(case, importance, structure, tmp_path, caplog):
    callback = weights(importance=importance, **structure)
    zeros, before = Zeros(callback), Before(batch(case))
    trainer = make_trainer(case, tmp_path, [before, callback, zeros], model=make(case))
    kind = type(trainer.model)
    trainer.train()
    ratio = callback.config.ratio
    assert zeros.leftover == [0.0] * STEPS
    assert zeros.shares == sorted(zeros.shares) and zeros.shares[1] == 0 < zeros.shares[3] < ratio
    found, total = count_zeros(trainer.model)
    assert abs(found - ratio * total) <= 1
    assert "instead of" not in caplog.text
    assert type(trainer.model) is kind and before.parameters == trainer.model.num_parameters()
    assert torch.equal(logits(trainer.model.eval(), batch(case)), before.logits)
    if "mask_structure" in structure:
        for linear in find_linears(Anatomy.of(trainer.model)):
            by_four = (matrix(trainer.model, linear) == 0).reshape(-1, 4).sum(1)
            assert (by_four == 2).all()
    if structure.get("allocation") == "uniform":
        shares = [(matrix(trainer.model, one) == 0).float().mean() for one in find_linears(Anatomy.of(trainer.model))]
        assert max(shares) - min(shares) < 0.01
    assert not any(parameter._backward_hooks for parameter in trainer.model.parameters())


def test_the_zeros_are_those_with_the_lowest_scores(tmp_path):
    """All at once, by magnitude: the smallest half of each matrix."""
    callback = weights(importance="magnitude", allocation="uniform", schedule="one-shot")
    trainer = make_trainer("bert", tmp_path, [callback], learning_rate=1e-6, weight_decay=0.0)
    dense = make("bert")
    trainer.train()
    for linear in find_linears(Anatomy.of(dense)):
        size, zero = matrix(dense, linear).abs(), matrix(trainer.model, linear) == 0
        assert size[zero].max() <= size[~zero].min() + 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "movement"},
        pytest.param({"importance": "fisher"}, marks=pytest.mark.thorough),
        pytest.param({"importance": "movement", "granularity": "weight"}, marks=pytest.mark.thorough),
        {"importance": "taylor", "granularity": "weight", "mask_structure": "2:4"},
        {"importance": "magnitude", "granularity": "weight"},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(settings, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer("bert", tmp_path, [pruning(**settings)], **saving)
    whole.train()
    expected = whole.model.state_dict()
    for step in (5, 15):
        resumed = make_trainer("bert", tmp_path, [pruning(**settings)], **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = resumed.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_scores_that_were_saved_matter(tmp_path):
    """Must differ: the state with other scores leads elsewhere."""
    saving = {"save_strategy": "steps", "save_steps": 5}
    settings = {"importance": "movement", "granularity": "weight"}
    whole = make_trainer("bert", tmp_path, [pruning(**settings)], **saving)
    whole.train()
    path = tmp_path / "checkpoint-5" / STATE_FILE
    state = load_file(path)
    save_file({name: -t if name.endswith("scores") else t for name, t in state.items()}, path)
    resumed = make_trainer("bert", tmp_path, [pruning(**settings)], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert any(not torch.equal(t, whole.model.state_dict()[name]) for name, t in resumed.model.state_dict().items())


def test_a_checkpoint_of_another_granularity(tmp_path):
    make_trainer("bert", tmp_path, [pruning()], save_strategy="steps", save_steps=5, max_steps=5).train()
    for callback in (weights(), pruning(importance="magnitude")):
        resumed = make_trainer("bert", tmp_path, [callback])
        with pytest.raises(CheckpointError, match=r"another granularity.*PruningConfig"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("granularity", [("head", "neuron"), "weight"])
def test_bfloat16_autocast(granularity, tmp_path):
    callback, before = pruning(granularity=granularity, importance="movement"), Before(batch("bert"))
    watch = Zeros(callback) if granularity == "weight" else Watch(callback)
    trainer = make_trainer("bert", tmp_path, [before, callback, watch], bf16=True)
    trainer.train()
    assert watch.leftover == [0.0] * STEPS
    assert trainer.model.dtype == torch.float32
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (6, 3)
    if granularity == "weight":
        zeros, total = count_zeros(trainer.model)
        assert 2 * zeros == total
    else:
        assert trainer.model.num_parameters() < before.parameters


def test_the_large_weights_and_the_moments_are_let_go(tmp_path):
    model = make("bert")
    large = [weakref.ref(parameter) for parameter in model.bert.encoder.layer.parameters()]
    trainer = make_trainer("bert", tmp_path, [pruning()], model=model)
    trainer.train()
    assert not trainer.optimizer.state and trainer.model is model
    gc.collect()
    assert not any(one() is not None for one in large)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] > 0
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.train()


def test_zeros_of_an_earlier_stage_count_and_stay(tmp_path):
    sparse = prune(make("bert"), PruningConfig(ratio=0.3, granularity="weight", importance="magnitude"))
    first = {one: matrix(sparse, one) == 0 for one in find_linears(Anatomy.of(sparse))}
    trainer = make_trainer("bert", tmp_path, [KeepZeros(), weights(importance="movement")], model=sparse)
    trainer.train()
    zeros, total = count_zeros(trainer.model)
    assert abs(zeros - 0.5 * total) <= 1
    assert all((matrix(trainer.model, one)[mask] == 0).all() for one, mask in first.items())


def test_frozen_layers(tmp_path):
    """They have no gradient, so they have no effect, and leave first."""
    model = make("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    callback = pruning(ratio=0.05, granularity="neuron")
    trainer = make_trainer("bert", tmp_path, [callback], model=model)
    trainer.train()
    left = [sizes(trainer.model)["encoder", "neurons", layer] for layer in range(3)]
    assert left[0] < 48 and left[1:] == [48, 48]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"importance": "activation"}, r"'activation' needs calibration.*taylor, fisher, movement.*magnitude"),
        (
            {"importance": "obs", "granularity": "weight", "allocation": "uniform"},
            r"'obs' needs calibration.*or use prune",
        ),
        ({"granularity": ("neuron", "weight")}, r"\['neuron', 'weight'\].*Prune heads and neurons first"),
        ({"granularity": "layer"}, r"\['layer'\].*Drop layers before"),
        ({"metric": "latency"}, r"counts MACs or parameters"),
        ({"steps": 3}, r"steps=3 are those of prune"),
    ],
    ids=str,
)
def test_what_cannot_be_done_while_training(settings, words):
    with pytest.raises(ConfigError, match=words):
        PruningCallback(PruningConfig(**settings))


@pytest.mark.parametrize("granularity", [("head", "neuron"), "weight"])
def test_movement_needs_training(granularity):
    with pytest.raises(ConfigError, match=r"'movement' is learned while training.*PruningCallback\(config\)"):
        prune(make("bert"), PruningConfig(granularity=granularity, importance="movement"), batches("bert"))


def test_a_pattern_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="multiple of 5"):
        make_trainer("bert", tmp_path, [weights(ratio=0.6, mask_structure="2:5")]).train()
