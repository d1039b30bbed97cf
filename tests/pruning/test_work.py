"""What is computed, and what is not computed twice: forwards, scores and cuts are counted."""

import pytest
import torch

from hf_efficient import PruningConfig, plan, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning import prune as pruning
from hf_efficient.pruning import search
from hf_efficient.pruning.choose.allocation import choose_layers, drop_layers
from hf_efficient.pruning.score.layers import loss, loss_order
from tests.families import CASES, make_inputs, make_model

from .tiny import batches, make


class Counts:
    """How often a model was run, and the functions of the search were called."""

    def __init__(self, model, monkeypatch):
        self.forwards = 0
        model.register_forward_pre_hook(self._run)
        self.calls = {}
        for name in ("score_units", "mask_gradients", "apply_plan", "reconstruct_blocks", "token_weights"):
            self.calls[name] = 0
            monkeypatch.setattr(search, name, self._counted(name, getattr(search, name)))

    def _run(self, *unused):
        self.forwards += 1

    def _counted(self, name, function):
        def counted(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted

    def take(self) -> dict[str, int]:
        """Since the last time, without what was never called."""
        found = {name: count for name, count in ({"forwards": self.forwards} | self.calls).items() if count}
        self.forwards, self.calls = 0, dict.fromkeys(self.calls, 0)
        return found


@pytest.fixture
def counted(monkeypatch):
    dense = make("bert")
    return dense, batches("bert", 3), Counts(dense, monkeypatch)


def test_a_plan_scores_and_cuts_nothing(counted):
    dense, data, counts = counted
    asked = PruningConfig(ratio=0.4, round_to=4)
    made = plan(dense, asked, data)
    assert counts.take() == {"forwards": 3, "score_units": 1}  # once through each batch
    carried = prune(dense, plan=made, calibration=data)
    cut = counts.take()
    assert cut.pop("forwards") > 3 and cut == {"apply_plan": 1, "reconstruct_blocks": 1, "token_weights": 1}
    whole = prune(dense, asked, data)
    del cut["token_weights"]  # the pass that scores gives them too
    # The second stream runs the layers for its first batch alone; that nothing is missed by it takes one forward more.
    assert counts.take() == {"forwards": 3 + 4, "score_units": 1} | cut
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), carried.parameters(), strict=True))
    prune(dense, plan=plan(dense, PruningConfig(ratio=0.4, round_to=4, reconstruct=False), data), calibration=data)
    assert counts.take() == {"forwards": 3, "score_units": 1, "apply_plan": 1}


@pytest.mark.parametrize(
    ("changes", "cuts"),
    [({"steps": 3}, 2), ({"granularity": ("layer", "head", "neuron")}, 1), ({"granularity": "layer"}, 0)],
    ids=str,
)
def test_what_later_scores_are_taken_on_is_cut_and_the_last_is_not(counted, changes, cuts):
    dense, data, counts = counted
    asked = PruningConfig(ratio=0.4, round_to=4, **changes)
    made = plan(dense, asked, data)
    assert counts.take().get("apply_plan", 0) == cuts
    prune(dense, asked, data)
    assert counts.take()["apply_plan"] == cuts + 1
    prune(dense, plan=made, calibration=data)
    assert counts.take()["apply_plan"] == 1


@pytest.mark.parametrize("changes", [{}, {"rearrange": True}, {"granularity": "layer"}], ids=str)
def test_ratios_share_what_is_known_of_the_dense_model(counted, changes):
    dense, data, counts = counted
    asked = PruningConfig(ratio=0.2, round_to=4, **changes)
    first = pruning.search(dense, asked, data)
    plans = [first.at(ratio).plan() for ratio in (0.6, 0.3)]
    together = counts.take()["forwards"]
    assert plans == [first.at(ratio).plan() for ratio in (0.6, 0.3)] and not counts.take()
    alone = pruning.search(dense, PruningConfig(ratio=0.6, round_to=4, **changes), data).plan()
    assert alone == plans[0] != plans[1]
    assert counts.take()["forwards"] == together
    for ratio in (0.6, 0.3):
        small = first.cutter.cut(first.at(ratio).plan())
        again = prune(dense, PruningConfig(ratio=ratio, round_to=4, **changes), data)
        assert all(torch.equal(a, b) for a, b in zip(small.model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("case", ["bert", "llama", "t5"])
def test_the_order_is_found_as_far_as_layers_leave(case):
    """Of 6 layers: 6 forwards for the first that leaves, 5 for the second."""
    dense, data = make(case, 6), batches(case, 1)
    keys = [(stack.name, index) for stack in Anatomy.of(dense).stacks for index in range(len(stack.layers))]
    costs, forwards = dict.fromkeys(keys, 1.0), []
    dense.register_forward_pre_hook(lambda *_: forwards.append(1))
    whole = loss(Anatomy.of(dense), data)
    assert len(forwards) == 1 + sum(range(2, len(keys) + 1))
    for leave in (1, 2, 3):
        forwards.clear()
        kept = drop_layers(
            loss_order(Anatomy.of(dense), data), costs, leave, True, "encoder" if case == "t5" else None
        )
        if case != "t5":  # whose encoder waits until the decoder is no deeper
            assert len(forwards) == 1 + sum(len(keys) - gone for gone in range(leave))
        assert kept == choose_layers(whole, costs, leave, True, "encoder" if case == "t5" else None)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_layers_leave_as_from_the_whole_order(seed, exact):
    """Uneven prices, two stacks, one of which must stay the deepest: asked for one by one, the same choice."""
    generator = torch.Generator().manual_seed(seed)
    keys = [(stack, layer) for stack, depth in (("encoder", 5), ("decoder", 4)) for layer in range(depth)]
    order = [keys[i] for i in torch.randperm(len(keys), generator=generator).tolist()]
    costs = {key: float(cost) for key, cost in zip(keys, torch.randint(1, 9, (9,), generator=generator), strict=True)}
    for remove in (0.0, 5.0, 11.0, 17.0):
        asked: list = []

        def one_by_one(asked=asked):
            for key in order:
                asked.append(key)
                yield key

        kept = drop_layers(one_by_one(), costs, remove, exact, "encoder", first_stays=True)
        assert kept == naive_choice(order, costs, remove, exact)
        assert remove or not asked


def naive_choice(order, costs, remove, exact):
    """The whole list of candidates, gone through again for every layer."""
    kept = {"encoder": set(range(5)), "decoder": set(range(4))}
    left = [key for key in order if key[1] > 0]
    while left:
        for key in left:
            stack = key[0]
            if len(kept[stack]) > 1 and (stack == "decoder" or len(kept["encoder"]) > len(kept["decoder"])):
                break
        else:
            break
        left.remove(key)
        if (exact and remove >= 0.5) or (not exact and costs[key] < remove + 0.5):
            kept[stack].remove(key[1])
            remove -= costs[key]
    return {stack: tuple(sorted(layers)) for stack, layers in kept.items()}


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_skipped_are_not_computed(name):
    """In the dense model and in all those without another layer; and the model is as it was before."""
    model, inputs, ran = make_model(name), make_inputs(name), []
    layers = Anatomy.of(model).stacks[0].layers
    part = next(one for one in layers[1].modules() if not [*one.children()] and [*one.parameters()])
    part.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        model(**inputs)
    once, count = len(ran), sum(len(stack.layers) for stack in Anatomy.of(model).stacks)
    next(loss_order(Anatomy.of(model), [inputs]))
    assert once > 0 and len(ran) == once * (1 + 1 + count - 1)
    assert not any("forward" in vars(module) for module in model.modules())
