"""Least squares against its formula, on what it must give back exactly, and on what it must leave alone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from hf_efficient import PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.rebuild import rebuild
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.fit.reconstruction import (
    HELD_OUT,
    LAMBDAS,
    _Fit,
    find_blocks,
    reconstruct_blocks,
    token_weights,
)
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.score.calibration import answer_loss, answer_of
from hf_efficient.pruning.score.stream import Stream
from tests.families import BUILDS, CASES, make_inputs, make_model
from tests.helpers import selected

from ..tiny import batches, make


def doubled(case: str):
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches(case)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_is_weighted_ridge_regression(bias):
    """Against the closed form, written out, with the lambda that is best on held-out rows."""
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, bias=bias).double().requires_grad_(False)
    x, c = torch.randn(40, 7, 5).double(), torch.rand(40, 7).double()
    y = x @ torch.randn(5, 3).double() + 0.3 * torch.randn(40, 7, 3).double() + 1
    before = copy.deepcopy(linear)
    fit = _Fit(linear)
    for start in (0, 16):  # in batches that are no multiples of five
        rows = slice(start, 16 if start == 0 else 40)
        fit.add(x[rows], y[rows], c[rows])
    fit.solve()
    held = torch.arange(40) % HELD_OUT == HELD_OUT - 1

    def solved(rows, size):
        own, weight = x[rows].flatten(0, 1), c[rows].flatten()
        error = (y - before(x))[rows].flatten(0, 1)
        own = torch.cat([own, torch.ones(len(own), 1).double()], 1) if bias else own
        gram = own.T @ (own * weight[:, None])
        pull = torch.eye(len(gram)).double() * size * gram.diagonal()[:5].mean()
        if bias:
            pull[5, 5] = 1e-6 * gram[5, 5]
        return torch.linalg.solve(gram + pull, own.T @ (error * weight[:, None]))

    def outputs(change):
        more = x @ change[:5] + (change[5] if bias else 0)
        return before(x) + more

    errors = {size: (c[held][..., None] * (y - outputs(solved(~held, size)))[held] ** 2).sum() for size in LAMBDAS}
    best = min(errors, key=errors.get)
    assert best != max(LAMBDAS)  # so that choosing matters
    expected = outputs(solved(torch.ones(40, dtype=torch.bool), best))
    assert (linear(x) - expected).abs().max() < 1e-9
    assert (before(x) - expected).abs().max() > 0.1


def test_weights_stay_where_nothing_can_be_learned():
    """Noise that held-out rows do not share: the best change is none."""
    torch.manual_seed(0)
    linear = nn.Linear(30, 3).double().requires_grad_(False)
    before = copy.deepcopy(linear)
    fit = _Fit(linear)
    x = torch.randn(20, 2, 30).double()
    fit.add(x, before(x) + 5 * torch.randn(20, 2, 3).double(), torch.ones(20, 2).double())
    fit.solve()
    assert torch.equal(linear.weight, before.weight) and torch.equal(linear.bias, before.bias)


@pytest.mark.parametrize("case", ["bert", "gpt2", "llama", "t5", "vit"])
def test_copies_of_units_can_leave_without_a_trace(case):
    """Every neuron has a twin: one of each pair can do the work of both, and least squares finds out how."""
    dense, inputs = make(case).double(), doubled(case) * 4
    plan = {}
    with torch.no_grad():
        for group in Anatomy.of(dense).groups:
            if group.kind != "neurons":
                continue
            half = group.units // 2
            plan[group.name] = tuple(range(half))
            for member in group.members:
                for part in (*member.inputs, *member.others):
                    parameter = dense.get_parameter(f"{member.prefix}.{part.name}")
                    first = parameter.index_select(part.dim, part.rows(torch.arange(half), parameter))
                    parameter.index_copy_(part.dim, part.rows(torch.arange(half, 2 * half), parameter), first)
    cut = apply_plan(Anatomy.of(dense), PruningPlan(units=plan))
    fitted = rebuild(cut, cut.config)
    whole = Anatomy.of(dense)
    reconstruct_blocks(Anatomy.of(fitted), whole, inputs, token_weights(whole, inputs, answer_loss()))
    expected = answer_of(dense, inputs[0]).detach()
    lost, left = ((answer_of(model, inputs[0]) - expected).abs().max() for model in (cut, fitted))
    assert left < 0.25 * lost  # lambda is not zero, and what follows a layer sees what is left of its error


@pytest.mark.parametrize(("name",), selected([(name,) for name in CASES], lambda name: name in BUILDS))
def test_every_family_comes_closer_to_the_dense_answer(name):
    """On what it was fitted to; and the dense model is as it was."""
    dense, inputs = make_model(name), [make_inputs(name) for _ in range(8)]
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    settings = PruningConfig(ratio=0.4, importance="magnitude", round_to=4)
    errors = []
    for fits in (False, True):
        small = prune(dense, PruningConfig(**settings.to_dict() | {"reconstruct": fits}), inputs)
        with torch.no_grad():
            errors.append(sum(float((answer_of(small, b) - answer_of(dense, b)).square().sum()) for b in inputs))
    assert errors[1] < errors[0]
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("case", ["bert", "llama", "t5"])
def test_token_weights(case):
    """Nothing for padding, something for all that is read."""
    model, inputs = make(case).double(), doubled(case)[:1]
    weights = token_weights(Anatomy.of(model), inputs, answer_loss())
    assert len(weights) == sum(len(stack.layers) * len(find_blocks(stack, 0)) for stack in Anatomy.of(model).stacks)
    mask = inputs[0]["attention_mask"].bool()
    for path, (own,) in weights.items():
        assert (own >= 0).all() and own.max() > 0
        if "decoder" not in path and own.shape == mask.shape:
            assert not own[~mask].any(), path
    if case == "bert":  # the head reads one token of the last layer, and all of them in the layers before
        last, first = (weights[f"bert.encoder.layer.{i}.output.dense"][0] for i in (2, 0))
        assert (last > 0).sum(1).tolist() == [1, 1, 1]
        assert (first > 0).equal(mask)


def test_a_stream_is_the_forward_of_the_model():
    model, inputs = make("bert"), batches("bert")
    with torch.no_grad():
        stream = Stream(Anatomy.of(model), "encoder", inputs)
        states = model(**inputs[0], output_hidden_states=True).hidden_states
        for index in range(3):
            assert torch.equal(stream.states[0], states[index])
            blocks = find_blocks(Anatomy.of(model).stacks[0], 0)
            read, residual = next(stream.inputs(index, blocks, "output.dense"))
            sums = stream.advance(index, blocks)
            linear = model.bert.encoder.layer[index].output.dense
            assert torch.equal(linear(read) + residual, sums["output.dense"][0])
        assert torch.equal(stream.states[0], states[3])


@pytest.mark.parametrize("name", CASES)
def test_what_a_block_is_added_to(name):
    """Each sum is what a norm of the layer reads next, or what the layer gives."""
    model, batch = make_model(name).eval(), make_inputs(name)
    anatomy = Anatomy.of(model)
    if anatomy.family.norm is None:
        assert name.startswith(("dinov2", "gemma3"))
        return
    with torch.no_grad():
        for stack in anatomy.stacks:
            stream, blocks = Stream(anatomy, stack.name, [batch]), find_blocks(stack, 0)
            for index, layer in enumerate(stack.layers):
                read: list[torch.Tensor] = []
                note = partial(lambda seen, module, args: seen.append(args[0]), read)
                norms = [module for module in layer.modules() if "Norm" in type(module).__name__]
                hooks = [norm.register_forward_pre_hook(note) for norm in norms]
                sums = stream.advance(index, blocks)
                for hook in hooks:
                    hook.remove()
                for (total,) in sums.values():
                    assert any(torch.equal(total, state) for state in [*read, *stream.states])


def test_labels_do_not_matter():
    dense = make("bert")
    settings = PruningConfig(ratio=0.4, round_to=4, steps=2)
    with_labels = prune(dense, settings, batches("bert") * 2)
    other = [{**b, "labels": 2 - b["labels"]} for b in batches("bert") * 2]
    assert all(
        torch.equal(a, b)
        for a, b in zip(with_labels.parameters(), prune(dense, settings, other).parameters(), strict=True)
    )


def test_without_batches_nothing_is_fitted():
    dense = make("bert")
    fitted, plain = (
        prune(dense, PruningConfig(ratio=0.4, importance="magnitude", reconstruct=on)) for on in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), plain.parameters(), strict=True))


def test_a_dropped_layer_is_skipped_in_the_dense_stream():
    """What is left of layer 2 is fitted to layer 2."""
    dense, inputs = make("bert"), batches("bert") * 3
    small = prune(dense, PruningConfig(ratio=0.3, granularity="layer", importance="loss"), inputs)
    kept = small.config.efficient["kept_layers"]["encoder"]
    assert len(kept) == 2
    plain = prune(dense, PruningConfig(ratio=0.3, granularity="layer", importance="loss", reconstruct=False), inputs)
    with torch.no_grad():
        lost, left = (
            sum(float((answer_of(model, b) - answer_of(dense, b)).square().sum()) for b in inputs)
            for model in (plain, small)
        )
    assert left != lost
