"""Scores against their definition, and against units that were planted useless or tiny."""

import copy

import pytest
import torch
from torch import nn

from hf_efficient import ConfigError, DataError, PruningConfig, prune, register_importance
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import (
    Group,
    Member,
    Slice,
    output_module,
    output_weight,
    unit_parameters,
)
from hf_efficient.pruning.methods import IMPORTANCES
from hf_efficient.pruning.methods import UNIT_KINDS as KINDS
from hf_efficient.pruning.price.costs import unit_cost
from hf_efficient.pruning.score.calibration import answer_loss, model_loss
from hf_efficient.pruning.score.units import activation, fisher, magnitude, random, taylor, unit_effect

from ..tiny import CASES, batch, batches, bert, config, kept_parts, make


def gate_gradients(model, inputs, group, of_answer=False) -> torch.Tensor:
    """`[rows, units]` d loss / d gate for gates of one, one row at a time, on what the output linears read."""
    rows = []
    for row in range(len(next(iter(inputs.values())))):
        gates = torch.ones(group.units, dtype=model.dtype, requires_grad=True)
        handles = []
        for member in group.members:
            linear = output_module(model, member)

            def gate(_, args, row=row, width=member.output.width, gates=gates):
                chosen = torch.arange(len(args[0])).eq(row).view(-1, *[1] * (args[0].ndim - 1))
                return (torch.where(chosen, args[0] * gates.repeat_interleave(width), args[0]),)

            handles.append(linear.register_forward_pre_hook(gate))
        (gradient,) = torch.autograd.grad((answer_loss(3) if of_answer else model_loss)(model, inputs), gates)
        for handle in handles:
            handle.remove()
        rows.append(gradient)
    return torch.stack(rows)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_taylor_is_the_gradient_of_gates(case, with_labels):
    """Summed over rows after the absolute value; one gate for a T5 head in all layers."""
    model = make(case).double()
    inputs = [{k: v.double() if v.is_floating_point() else v for k, v in batch(case, seed).items()} for seed in (0, 1)]
    if not with_labels:
        start = {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)} if case.endswith("t5") else {}
        inputs = [{k: v for k, v in one.items() if k != "labels"} | start for one in inputs]
    groups = Anatomy.of(model).groups
    scores = taylor(model, groups, batches=inputs, length=9)
    for kind in {group.kind for group in groups}:
        own = [group for group in groups if group.kind == kind]
        expected = [torch.cat([gate_gradients(model, one, group) for one in inputs]).abs().sum(0) for group in own]
        assert all(values.max() > 0 for values in expected)
        paid = sum(unit_cost(Anatomy.of(model), group, "macs", 9) * group.units for group in own)
        scale = paid / sum(values.sum() for values in expected)
        for group, values in zip(own, expected, strict=True):
            assert torch.allclose(scores[group].double(), scale * values, rtol=1e-5, atol=1e-7 * float(scale))
    one_batch = taylor(model, groups, batches=inputs[:1], length=9)
    assert any(not torch.allclose(scores[group], one_batch[group]) for group in groups)


class _Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_formulas_by_hand():
    """A network of 3 neurons whose weights and gradients are written out."""
    model = _Ffn()
    member = Member("ffn", (Slice("up.weight", 0),), Slice("down.weight", 1), (Slice("up.bias", 0),))
    group = Group("encoder", "neurons", (0,), 3, (member,))
    holder = nn.ModuleDict({"ffn": model})
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        model.up.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
        model.down.weight.copy_(torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, 1.0]]))
    assert magnitude(holder, [group])[group].tolist() == [1 + 0.25 + 1, 4 + 1 + 9, 2 + 1 + 4 + 1]
    # x = (1, 1): neurons (1.5, 2, 1); loss = sum of both outputs, so dL/dw = neuron for every weight of `down`.
    model(torch.ones(1, 2)).sum().backward()
    assert unit_effect(holder, group).tolist() == [1.5 * 1, 2 * 2, 1 * 3]
    model.zero_grad()
    assert unit_effect(holder, group).tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", CASES)
def test_magnitude_is_the_sum_of_squares(case):
    model = make(case)
    for group, score in magnitude(model, Anatomy.of(model).groups).items():
        for unit in (0, group.units - 1):
            expected = 0.0
            for member in group.members:
                for parameter, part in unit_parameters(model, member):
                    rows = part.rows(torch.tensor([unit]), parameter)
                    expected += float(parameter.detach().index_select(part.dim, rows).square().sum())
            assert float(score[unit]) == pytest.approx(expected, rel=1e-5)


def test_random_depends_on_the_seed_only():
    model, other = make("bert", seed=0), make("bert", seed=1)
    options = {"length": 16}
    first, second, third = (
        random(m, Anatomy.of(m).groups, seed=seed, **options) for m, seed in ((model, 0), (other, 0), (model, 1))
    )
    for group, score in first.items():
        assert torch.equal(score, second[group])
        assert not torch.equal(score, third[group])
        assert score.min() >= 0 and score.max() < unit_cost(Anatomy.of(model), group, "macs", 16)


@torch.no_grad()
def plant(model, unimportant: str) -> dict[Group, tuple[int, ...]]:
    """Every second unit is useless ("silent": large weights, no effect) or tiny; returns the good ones."""
    good = {}
    for group in Anatomy.of(model).groups:
        bad = torch.arange(1, group.units, 2)
        good[group] = tuple(range(0, group.units, 2))
        for member in group.members:
            if unimportant == "tiny":
                for parameter, part in unit_parameters(model, member):
                    rows = part.rows(bad, parameter)
                    parameter.index_copy_(part.dim, rows, parameter.index_select(part.dim, rows) * 1e-3)
            else:
                weight = output_weight(model, member)
                weight.index_fill_(member.output.dim, member.output.rows(bad, weight), 0)
                part = member.inputs[0]
                up = model.get_parameter(f"{member.prefix}.{part.name}")
                rows = part.rows(bad, up)
                up.index_copy_(part.dim, rows, up.index_select(part.dim, rows) * 10)
    return good


@pytest.mark.cover
@pytest.mark.parametrize("granularity", ["head", "neuron"])
@pytest.mark.parametrize(
    ("importance", "unimportant", "finds"),
    [
        ("taylor", "silent", True),
        ("magnitude", "tiny", True),
        ("random", "tiny", False),
        ("magnitude", "silent", False),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_planted_units_leave_first(case, importance, unimportant, finds, granularity):
    model = make(case)
    good = {group: units for group, units in plant(model, unimportant).items() if group.kind in KINDS[granularity]}
    settings = PruningConfig(
        ratio=0.15, granularity=granularity, importance=importance, round_to=1, metric="parameters"
    )
    kept = kept_parts(model, prune(model, settings, batches(case)))
    removed_good = sum(unit not in kept[group] for group, units in good.items() for unit in units)
    assert sum(group.units - len(kept[group]) for group in good) > 0
    assert (removed_good == 0) == finds


def test_frozen_models_are_scored_like_others():
    """A teacher is often frozen; its weights must not look useless, and must stay frozen."""
    model = make("bert")
    groups = Anatomy.of(model).groups
    expected = taylor(model, groups, batches=batches("bert"), length=9)
    model.requires_grad_(False)
    with torch.no_grad():
        scores = taylor(model, groups, batches=batches("bert"), length=9)
    assert all(torch.equal(scores[group], expected[group]) for group in groups)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_padding_has_no_part_in_pseudo_labels():
    model = make("llama").double()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}
    seen = inputs | {"input_ids": inputs["input_ids"].masked_fill(torch.arange(9) == 8, 7)}
    loss = model_loss(model, inputs)
    assert torch.allclose(loss, model_loss(model, other), atol=1e-10)
    assert not torch.allclose(loss, model_loss(model, seen), atol=1e-10)


def test_a_single_output_is_a_regression():
    model = make("bert")
    regression = copy.deepcopy(model)
    regression.classifier, regression.num_labels, regression.config.num_labels = nn.Linear(32, 1), 1, 1
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    loss = model_loss(regression, inputs)
    assert loss.item() == pytest.approx(3 * regression(**inputs).logits.square().mean().item())
    scores = taylor(regression, Anatomy.of(regression).groups, batches=[inputs], length=9)
    assert all(score.sum() > 0 for score in scores.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_non_finite_weights(importance, value):
    model = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 3] = value
    with pytest.raises(DataError, match="of them finite"):
        prune(model, config(importance=importance), batches("bert"))


@pytest.mark.parametrize("calibration", [None, [], iter(())])
def test_missing_calibration(calibration):
    with pytest.raises(DataError, match="needs calibration batches"):
        prune(make("bert"), config(importance="taylor"), calibration)


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.zeros(2, 3)],
        [{"input_ids": [[1, 2], [3, 4]]}],
        [{"pixel_values": torch.zeros(1, 3, 8, 8)}],
        [{}],
        ["text"],
    ],
)
def test_wrong_batches(wrong):
    for importance in ("taylor", "magnitude"):
        with pytest.raises(DataError, match=r"dicts of tensors with 'input_ids', got .*DataLoader"):
            prune(make("bert"), config(importance=importance), wrong)


def test_one_batch_is_no_list_of_batches():
    with pytest.raises(DataError, match=r"\[batch\]"):
        prune(make("bert"), config(), {"input_ids": torch.zeros(1, 3)})


def test_no_loss_without_a_head():
    model = bert().bert
    with pytest.raises(DataError, match="BertModel returned neither loss nor logits"):
        prune(model, config(importance="taylor"), [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    small = prune(model, config(importance="magnitude"))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_squared_change_of_the_answer(case):
    """Against gates, row by row; labels are not looked at, and batches may be cut anywhere."""
    model = make(case).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(case).items()}
    for group, score in fisher(model, Anatomy.of(model).groups, batches=[inputs], seed=3).items():
        gradients = gate_gradients(model, inputs, group, of_answer=True)
        assert gradients.abs().max() > 0
        assert torch.allclose(score.double(), gradients.square().sum(0), rtol=1e-4, atol=1e-9)


def test_two_classes_have_one_direction():
    """Only the difference of two logits matters, so nothing is left to chance."""
    model = bert(num_labels=2).eval()
    groups, inputs = Anatomy.of(model).groups, [{k: v for k, v in batch("bert").items() if k != "labels"}]
    one, other = (fisher(model, groups, batches=inputs, seed=seed) for seed in (0, 1))
    assert all(torch.allclose(one[group], other[group], rtol=1e-4) for group in groups)
    three = make("bert")
    one, other = (fisher(three, Anatomy.of(three).groups, batches=inputs, seed=seed) for seed in (0, 1))
    assert not all(torch.allclose(one[group], other[group], rtol=1e-4) for group in Anatomy.of(three).groups)


def test_activation_is_weights_times_inputs_without_padding():
    model, (inputs, *_) = make("bert"), batches("bert")
    groups = [group for group in Anatomy.of(model).groups if group.kind == "neurons"]
    scores = activation(model, groups, batches=[inputs])
    caught = []
    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    real = caught[0][inputs["attention_mask"].bool()]
    weight = model.bert.encoder.layer[1].output.dense.weight
    expected = weight.square().sum(0) * real.square().sum(0)
    assert torch.allclose(scores[groups[1]], expected, rtol=1e-4)


@pytest.fixture
def names():
    """A clean table afterwards."""
    before = dict(IMPORTANCES)
    yield
    IMPORTANCES.clear()
    IMPORTANCES.update(before)


def test_a_score_of_your_own(names):
    seen = {}

    def last_units(model, groups, *, batches, **context):
        seen.update(context, batches=batches)
        return {group: torch.arange(group.units).float() for group in groups}

    register_importance("last_units", last_units, needs_data=False)
    dense = make("bert")
    small = prune(dense, config(importance="last_units", granularity="neuron", ratio=0.15, round_to=1))
    for group, kept in kept_parts(dense, small).items():
        assert kept == tuple(range(group.units - len(kept), group.units))
    assert seen["batches"] == [] and {"length", "seed"} <= seen.keys()
    for again in ("last_units", "fisher"):
        with pytest.raises(ConfigError, match="There is an importance"):
            register_importance(again, last_units)
    register_importance("last_units", last_units, overwrite=True)
    with pytest.raises(DataError, match="'last_units' needs calibration"):
        prune(dense, config(importance="last_units"))
    for bad in ("my score", 3):
        with pytest.raises(ConfigError, match="must be an identifier"):
            register_importance(bad, last_units)
    with pytest.raises(ConfigError, match="needs a function"):
        register_importance("no_function", 3)


def test_scores_of_a_wrong_shape(names):
    register_importance(
        "short", lambda model, groups, **_: {group: torch.ones(1) for group in groups}, needs_data=False
    )
    with pytest.raises(DataError, match=r"short scores of encoder.0.heads must be 4 finite numbers, got \(1,\)"):
        prune(make("bert"), config(importance="short"))
