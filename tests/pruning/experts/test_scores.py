"""What REAP says of an expert: the mean over its real tokens of gate times norm, for every shape of mixture."""

import pytest
import torch
from torch.nn import functional as F

from hf_efficient import ConfigError, DataError, PruningConfig, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.mixtures import expert_parameters
from hf_efficient.pruning.choose.experts import choose_experts
from hf_efficient.pruning.methods import EXPERT_IMPORTANCES
from hf_efficient.pruning.score import experts as scoring
from tests.helpers import selected

from .tiny import ALL, EXPERTS, LIST, SOME, batches, logits, make, make_double

PLANTED = (1, 6)  # useless experts: one of each group


def scores_of(model, data, importance="reap"):
    anatomy = Anatomy.of(model)
    return EXPERT_IMPORTANCES[importance](anatomy, anatomy.mixtures, batches=data, seed=0)


def plant(model) -> None:
    """These experts give nothing, though the router goes on choosing them."""
    for mixture in Anatomy.of(model).mixtures:
        layer = model.get_submodule(mixture.prefix)
        with torch.no_grad():
            for expert in PLANTED:
                if mixture.names:
                    for weight in layer.get_submodule(f"{mixture.entry.module}.{mixture.names[expert]}").parameters():
                        weight.mul_(1e-3)
                for name in mixture.entry.own if not mixture.names else ():
                    layer.get_parameter(name)[expert].mul_(1e-3)


def test_reap_is_what_the_formula_says():
    """By hand, of the first layer of Mixtral."""
    model = make("mixtral")
    [batch] = batches(model, 1)
    block, given = model.model.layers[0].mlp, []
    handle = block.register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, 1)))
    logits(model, batch)
    handle.remove()
    weight, experts = block.gate.weight, block.experts
    sums, counts = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    for x in given[0].detach():
        gates, chosen = torch.topk((weight @ x).softmax(-1), 2)
        for gate, expert in zip(gates / gates.sum(), chosen, strict=True):
            narrow, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            output = experts.down_proj[expert] @ (F.silu(narrow) * up)
            sums[expert] += (gate * output.norm()).detach()
            counts[expert] += 1
    mixture = Anatomy.of(model).mixtures[0]
    found = scores_of(model, [batch])[mixture]
    assert torch.allclose(found.float(), sums / counts.clamp(min=1), rtol=1e-4)
    assert torch.equal(scores_of(model, [batch], "frequency")[mixture].float(), counts)


@pytest.mark.parametrize("shape", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_where_the_choice_is_hidden_the_scores_are_the_same(shape, monkeypatch):
    """One expert's weights after another zero: slower, and what lists of modules are scored by."""
    model = make_double(shape)
    data = batches(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = [scores_of(model, data, name) for name in ("reap", "frequency")]
    monkeypatch.setattr(scoring, "_call", lambda args, kwargs: None)
    hidden = [scores_of(model, data, name) for name in ("reap", "frequency")]
    for one, other in zip(seen, hidden, strict=True):
        assert all(torch.allclose(values, other[mixture], rtol=1e-4) for mixture, values in one.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "importance"),
    selected(
        [(shape, importance) for shape in SOME for importance in ("reap", "frequency")],
        lambda shape, importance: shape in ("gpt_oss", LIST) and importance == "reap",
    ),
)
def test_padding_has_no_part(shape, importance):
    """On neither side, however long, whatever the batch. Absolute places are none: rotary positions are relative."""
    model = make_double(shape)
    [batch] = batches(model, 1, rows=2)
    whole = scores_of(model, [batch], importance)
    for side in ("right", "left"):
        padded = dict(batch)
        for name in ("input_ids", "attention_mask"):
            before, after = (0, 3) if side == "right" else (3, 0)
            padded[name] = F.pad(batch[name], (before, after))
        again = scores_of(model, [padded], importance)
        assert all(torch.allclose(values, again[one], rtol=1e-6) for one, values in whole.items()), side
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
    apart = scores_of(model, rows, importance)
    assert all(torch.allclose(values, apart[one], rtol=1e-6) for one, values in whole.items())
    unmasked = {name: value for name, value in padded.items() if name != "attention_mask"}
    unmasked["attention_mask"] = torch.ones_like(padded["attention_mask"])
    other = scores_of(model, [unmasked], importance)
    assert not all(torch.allclose(values, other[one], rtol=1e-3) for one, values in whole.items())


@pytest.mark.parametrize(("shape",), selected([(shape,) for shape in ALL], SOME.__contains__))
def test_planted_useless_experts_leave_first(shape):
    model = make(shape)
    plant(model)
    data = batches(model, 4)
    anatomy, gone = Anatomy.of(model), {}
    remove = 2 * sum(costs := [float(expert_parameters(model, one)) for one in anatomy.mixtures])
    for importance in ("reap", "random"):
        scores = scores_of(model, data, importance)
        kept = choose_experts(scores, dict(zip(anatomy.mixtures, costs, strict=True)), remove)
        gone[importance] = {tuple(sorted({*range(EXPERTS)} - {*left})) for left in kept.values()}
    assert gone["reap"] == {PLANTED} != gone["random"]


def test_names_of_importances():
    alone, both = PruningConfig(granularity="expert"), PruningConfig(granularity=("expert", "head"))
    assert (alone.importance, alone.expert_importance) == ("reap", "reap")
    assert (both.importance, both.expert_importance) == ("fisher", "reap")
    assert PruningConfig(granularity="expert", expert_importance="frequency").importance == "frequency"
    assert PruningConfig(granularity="expert", importance="random").expert_importance == "random"
    assert PruningConfig(**both.to_dict()) == both and PruningConfig(**alone.to_dict()) == alone
    with pytest.raises(ConfigError, match="expert_importance='reap'"):
        PruningConfig(importance="reap")
    with pytest.raises(ConfigError, match="Did you mean 'reap'"):
        PruningConfig(granularity="expert", importance="reep")
    with pytest.raises(DataError, match="'reap' needs calibration"):
        prune(make("mixtral"), alone)


def test_as_few_leave_as_must():
    """Of equal scores the first stay; one of each group leaves at once; and too much is an error."""
    mixtures = Anatomy.of(make("deepseek_v3, groups")).mixtures
    scores = {one: torch.zeros(one.experts) for one in mixtures}
    costs = dict.fromkeys(mixtures, 10.0)
    kept = choose_experts(scores, costs, remove=30.0)
    assert list(kept.values()) == [(0, 1, 2, 4, 5, 6)] * 2
    assert list(choose_experts(scores, costs, remove=41.0).values()) == [(0, 1, 4, 5)] * 2
    with pytest.raises(ConfigError, match="cannot be reached"):
        choose_experts(scores, costs, remove=81.0)
