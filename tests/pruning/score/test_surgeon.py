"""Optimal Brain Surgeon of whole units: its prices against the least squares that they speak of."""

import pytest
import torch

from hf_efficient import PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import output_module, output_weight
from hf_efficient.pruning.score import surgeon
from hf_efficient.pruning.score.calibration import answer_loss
from hf_efficient.pruning.score.surgeon import DAMPING, obs, prices
from hf_efficient.pruning.score.units import fisher
from tests.helpers import assert_close

from ..tiny import CASES, batch, batches, make


def left_over(weight: torch.Tensor, gram: torch.Tensor, kept: list[int]) -> float:
    """min over V of || x W' - x_kept V' ||^2, by solving for V."""
    best = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.T)  # [kept, out]
    change = weight.T.clone()
    change[kept] -= best
    return float((change * (gram @ change)).sum())


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("readers", [1, 2])
def test_a_price_is_what_least_squares_leaves_over(width, readers):
    """Unit by unit the cheapest is found by trying all, and what it adds to the error is its price."""
    torch.manual_seed(2)
    units = 6
    given = []
    for _ in range(readers):
        rows = torch.randn(40, 4, dtype=torch.float64) @ torch.randn(4, units * width, dtype=torch.float64)
        rows += 0.3 * torch.randn_like(rows)
        given.append((torch.randn(5, units * width, dtype=torch.float64), rows.T @ rows))
    found = prices([(weight.clone(), torch.linalg.inv(gram)) for weight, gram in given], units)

    def error(kept: list[int]) -> float:
        columns = [unit * width + number for unit in kept for number in range(width)]
        return sum(left_over(weight, gram, columns) for weight, gram in given)

    left, before, highest, expected = list(range(units)), 0.0, 0.0, torch.zeros(units, dtype=torch.float64)
    while left:
        tried = {unit: error([other for other in left if other != unit]) for unit in left}
        leaves = min(tried, key=tried.__getitem__)
        highest = max(highest, tried[leaves] - before)
        expected[leaves], before = highest, tried[leaves]
        left.remove(leaves)
    assert_close(found, expected, 1e-8)
    assert len(set(found.tolist())) > units // 2


def test_of_many_units_several_leave_at_once(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(60, 12, dtype=torch.float64)
    gram, weight = rows.T @ rows, torch.randn(3, 12, dtype=torch.float64)
    monkeypatch.setattr(surgeon, "PORTIONS", 4)
    found = prices([(weight.clone(), torch.linalg.inv(gram))], 12)
    values, counts = found.unique(return_counts=True)
    assert counts.tolist() == [3, 3, 3, 3]
    first = (found > values[0]).nonzero().flatten().tolist()
    assert float(values[0]) == pytest.approx(left_over(weight, gram, first) / 3)


@pytest.mark.parametrize("case", CASES)
def test_the_matrices_are_those_of_what_the_linears_read(case):
    """Made anew from hooks on one linear after another, and each unit priced for leaving first."""
    model, data = make(case).double(), [batch(case)]
    data = [{key: value.double() if value.is_floating_point() else value for key, value in data[0].items()}]
    groups = Anatomy.of(model).groups
    scores = obs(model, groups, batches=data, seed=3)
    for group in groups:
        errors = torch.zeros(group.units, dtype=torch.float64)
        for member in group.members:
            seen = {}
            module = output_module(model, member)

            def note(module, args, output, seen=seen):
                output.retain_grad()
                seen["x"], seen["y"] = args[0].detach().flatten(0, -2), output

            handle = module.register_forward_hook(note)
            answer_loss(3)(model, data[0]).backward()
            handle.remove()
            x, g = seen["x"], seen["y"].grad.flatten(0, -2)
            c = g.square().sum(-1)
            if module.bias is not None:
                x = x - (c[:, None] * x).sum(0) / c.sum()
            gram = x.T @ (c[:, None] * x)
            gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
            spread = g.T @ g / c.sum()
            weight = output_weight(model, member).detach().movedim(member.output.dim, -1)
            blocks = torch.linalg.inv(gram).unflatten(0, (group.units, -1)).unflatten(2, (group.units, -1))
            for unit in range(group.units):
                own = weight.unflatten(1, (group.units, -1))[:, unit]
                errors[unit] += (own.T @ spread @ own @ torch.linalg.inv(blocks[unit, :, unit])).trace()
        cheapest = int(errors.argmin())
        assert int(scores[group].argmin()) == cheapest
        assert float(scores[group][cheapest]) == pytest.approx(float(errors[cheapest]), rel=1e-6)


def test_a_unit_that_another_can_stand_in_for_costs_nothing():
    """Of two neurons that do the same, one is free, and the other is not; fisher takes both for needed."""
    model, data = make("bert"), batches("bert", 4)
    ffn = model.bert.encoder.layer[1]
    with torch.no_grad():
        ffn.intermediate.dense.weight[5] = ffn.intermediate.dense.weight[2]
        ffn.intermediate.dense.bias[5] = ffn.intermediate.dense.bias[2]
        ffn.output.dense.weight[:, [2, 5]] *= 8
    group = next(one for one in Anatomy.of(model).groups if one.kind == "neurons" and one.layers == (1,))
    by_surgeon, by_fisher = (score(model, [group], batches=data, seed=0)[group] for score in (obs, fisher))
    pair = by_surgeon[[2, 5]]
    assert pair.min() < 0.1 * pair.max() and pair.max() >= by_surgeon.median()
    assert by_fisher[[2, 5]].min() > by_fisher.median()


def test_what_does_not_fit_at_once_is_collected_in_turns(monkeypatch):
    model, data = make("bert"), batches("bert")
    groups = Anatomy.of(model).groups
    at_once = obs(model, groups, batches=data, seed=0)
    monkeypatch.setattr(surgeon, "NUMBERS", 1)
    in_turns = obs(model, groups, batches=data, seed=0)
    for group in groups:
        assert_close(in_turns[group], at_once[group], 1e-5)
    other = obs(model, groups, batches=data, seed=1)
    assert any(not torch.allclose(other[group], at_once[group]) for group in groups)


@pytest.mark.parametrize("granularity", ["head", "neuron", "layer", ("neuron", "weight")])
def test_it_prunes(granularity):
    model, data = make("bert"), batches("bert", 4)
    settings = PruningConfig(
        ratio=0.4, importance="obs", granularity=granularity, allocation="uniform", round_to=1, metric="parameters"
    )
    small = prune(model, settings, data)
    assert small.num_parameters() < model.num_parameters()
