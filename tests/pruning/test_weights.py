"""Zeros in the linears: exactly as many as asked, in the pattern asked, and chosen and made good as the papers say."""

import copy

import pytest
import torch
import transformers

from hf_efficient import ConfigError, DataError, PruningConfig, UnsupportedModelError, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.choose.reach import check_reachable
from hf_efficient.pruning.choose.sparsity import choose_masks, lowest, lowest_in_rows, shares
from hf_efficient.pruning.cut.linears import count_zeros, find_linears, matrix
from hf_efficient.pruning.fit.sparsegpt import choose_count, prune_matrix
from hf_efficient.pruning.gradual.zeros import KeepZeros, was_sparsified
from hf_efficient.pruning.methods import OF_ONE_MATRIX, WEIGHT_IMPORTANCES
from hf_efficient.pruning.price.costs import total_cost
from hf_efficient.pruning.score.calibration import model_loss
from hf_efficient.pruning.score.linear_inputs import collect
from hf_efficient.pruning.weights import prune_weights
from tests.families import CASES as FAMILIES
from tests.families import make_inputs, make_labels, make_model
from tests.helpers import assert_close

from .tiny import batch, batches, bert, llama, logits, make, t5

# `obs` chooses and updates together.
WAYS = [(name, way) for name in WEIGHT_IMPORTANCES for way in (True, False) if name != "obs" or way]


def weights(**values) -> PruningConfig:
    """Uniform unless said otherwise, since all importances can be that."""
    return PruningConfig(**{"granularity": "weight", "allocation": "uniform", "importance": "magnitude"} | values)


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {linear.name: matrix(model, linear) == 0 for linear in find_linears(Anatomy.of(model))}


@pytest.mark.parametrize(("importance", "reconstruct"), WAYS)
def test_the_fraction_is_exact(importance, reconstruct):
    dense = make("bert")
    for ratio in (0.3, 0.777):
        sparse = prune(dense, weights(ratio=ratio, importance=importance, reconstruct=reconstruct), batches("bert"))
        zeros, total = count_zeros(sparse)
        assert zeros == round(ratio * total) and count_zeros(dense)[0] == 0
        for zero in zeros_of(sparse).values():
            assert abs(int(zero.sum()) - ratio * zero.numel()) <= 1
            rows = zero.sum(1) - ratio * zero.shape[1]
            assert (rows.abs().max() <= 1.001) == (importance == "activation"), "Wanda compares within a row"


@pytest.mark.parametrize("importance", [name for name in WEIGHT_IMPORTANCES if name not in OF_ONE_MATRIX])
def test_global_allocation_compares_the_whole_network(importance):
    dense, settings = make("llama"), weights(ratio=0.6, importance=importance, allocation="global", reconstruct=False)
    sparse = prune(dense, settings, batches("llama"))
    assert count_zeros(sparse)[0] == round(0.6 * count_zeros(sparse)[1])
    scores = WEIGHT_IMPORTANCES[importance](dense, find_linears(Anatomy.of(dense)), batches=batches("llama"), seed=0)
    gone = torch.cat([score[zero] for score, zero in zip(scores.values(), zeros_of(sparse).values(), strict=True)])
    kept = torch.cat([score[~zero] for score, zero in zip(scores.values(), zeros_of(sparse).values(), strict=True)])
    assert gone.max() <= kept.min()
    shares_of_layers = [float(zero.float().mean()) for zero in zeros_of(sparse).values()]
    assert max(shares_of_layers) - min(shares_of_layers) > 1e-3


@pytest.mark.cover
@pytest.mark.parametrize("structure", ["2:4", "1:4", "5:8"])
@pytest.mark.parametrize(("importance", "reconstruct"), WAYS)
def test_every_group_of_every_row_keeps_n_of_m(structure, importance, reconstruct):
    n, m = (int(number) for number in structure.split(":"))
    settings = weights(mask_structure=structure, importance=importance, reconstruct=reconstruct)
    sparse = prune(make("bert"), settings, batches("bert"))
    for zero in zeros_of(sparse).values():
        assert ((~zero).reshape(len(zero), -1, m).sum(-1) == n).all()


def test_a_pattern_that_does_not_fit_is_refused_before_any_work():
    settings = weights(mask_structure="1:5")
    for attempt in (
        lambda: prune(make("bert"), settings),
        lambda: check_reachable(Anatomy.of(make("bert").to("meta")), settings, 128),
    ):
        with pytest.raises(ConfigError, match=r"'1:5'.*multiple of 5, but bert.encoder.layer.0.* has 32"):
            attempt()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    """Only the linears of the layers change; the stock class loads the result; the given model stays as it is."""
    dense, inputs = make_model(name), make_inputs(name, FAMILIES[name].paddings[0])
    before = copy.deepcopy(dense.state_dict())
    sparse = prune(dense, weights(mask_structure="2:4", importance="obs"), [inputs | make_labels(name)])
    zeros, total = count_zeros(sparse)
    assert 2 * zeros == total and type(sparse) is type(dense) and sparse.num_parameters() == dense.num_parameters()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    touched = {f"{linear.name}.weight" for linear in find_linears(Anatomy.of(dense))}
    for key, value in sparse.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in touched), key
    sparse.save_pretrained(tmp_path)
    loaded = getattr(transformers, FAMILIES[name].auto).from_pretrained(tmp_path)
    assert type(loaded) is type(dense) and loaded.config.model_type == name
    assert count_zeros(loaded) == (zeros, total)
    assert torch.equal(loaded(**inputs)[0], sparse(**inputs)[0])
    assert not torch.allclose(loaded(**inputs)[0], dense(**inputs)[0])


def test_linears_are_found_once_and_all_of_them():
    assert (
        len(find_linears(Anatomy.of(make_model("bert")))) == 3 * 6
        and len(find_linears(Anatomy.of(make_model("gpt2")))) == 3 * 4
    )
    assert (
        len(find_linears(Anatomy.of(make_model("llama")))) == 3 * 7
        and len(find_linears(Anatomy.of(make_model("t5")))) == 3 * 6 + 3 * 10
    )
    model = make_model("gpt2")
    shapes = {linear.name.split(".", 3)[-1]: matrix(model, linear).shape for linear in find_linears(Anatomy.of(model))}
    assert shapes["mlp.c_fc"] == (64, 16) and shapes["mlp.c_proj"] == (16, 64), "[out, in], of a Conv1D too"


def naive_inputs(model, name: str, data) -> torch.Tensor:
    """`[tokens, in]` of one linear, real tokens only, by a loop over rows."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    rows = []
    for one in data:
        model(**one)
        for inputs, mask in zip(seen.pop(), one["attention_mask"], strict=True):
            rows += [x for x, real in zip(inputs, mask, strict=True) if real]
    handle.remove()
    return torch.stack(rows)


def test_activation_is_the_formula_of_wanda():
    model, data = make("bert").double(), batches("bert")
    linears = find_linears(Anatomy.of(model))
    scores = WEIGHT_IMPORTANCES["activation"](model, linears, batches=data)
    for linear in linears[::4]:
        weight, inputs = matrix(model, linear), naive_inputs(model, linear.name, data)
        expected = torch.stack([row.abs() * torch.linalg.vector_norm(inputs, dim=0) for row in weight])
        assert_close(scores[linear], expected, 1e-10, linear.name)


def test_gradient_scores_are_the_formulas():
    model, data = make("llama"), batches("llama", 3)
    linears, gradients = find_linears(Anatomy.of(model)), []
    for one in data:
        model.zero_grad()
        model_loss(model, one).backward()
        gradients.append({linear: model.get_parameter(f"{linear.name}.weight").grad.clone() for linear in linears})
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    taylor, fisher = (WEIGHT_IMPORTANCES[name](model, linears, batches=data) for name in ("taylor", "fisher"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for linear in linears:
        weight = matrix(model, linear)
        assert_close(taylor[linear], sum((weight * g[linear]).abs() for g in gradients), 1e-6)
        assert_close(fisher[linear], weight**2 * sum(g[linear] ** 2 for g in gradients) / 3, 1e-6)


def test_random_is_seeded():
    model = make("bert")
    one, same, other = (
        zeros_of(prune(model, weights(importance="random", seed=seed, allocation="global"))) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.cover
@pytest.mark.parametrize("case", ["bert", "llama", "t5"])
@pytest.mark.parametrize("importance", ["activation", "obs"])
def test_padded_tokens_do_not_count(case, importance):
    """Junk under the padding, more padding: the same zeros and the same weights."""
    model, data = make(case).double(), batch(case)
    if case == "t5":
        data["labels"][0, -2:] = -100
    longer = {key: _with_padding(key, value, "left" if case == "llama" else "right") for key, value in data.items()}
    settings = weights(importance=importance)
    plain, padded = (prune(model, settings, [inputs]) for inputs in (data, longer))
    unmasked = prune(model, settings, [longer | {"attention_mask": torch.ones_like(longer["attention_mask"])}])
    tolerance = 1e-4 if case == "llama" else 1e-9  # its rotary angles are float32, and the padding moves them
    differs = []
    for linear in find_linears(Anatomy.of(model)):
        assert_close(matrix(padded, linear), matrix(plain, linear), tolerance, linear.name)
        differs.append(not torch.allclose(matrix(unmasked, linear), matrix(plain, linear)))
    assert any(differs)


def _with_padding(key: str, value: torch.Tensor, side: str) -> torch.Tensor:
    if value.ndim < 2:
        return value
    junk = torch.full((len(value), 4), {"attention_mask": 0, "labels": -100}.get(key, 7))
    return torch.cat([junk, value] if side == "left" else [value, junk], dim=1)


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_reconstruction_brings_the_outputs_back(importance):
    dense, data = make("bert").double(), batches("bert", 12)
    plain, mended = (
        prune(dense, weights(ratio=0.4, importance=importance, reconstruct=value), data) for value in (False, True)
    )
    away = [
        sum(float((logits(model, one) - logits(dense, one)).square().sum()) for one in data)
        for model in (plain, mended)
    ]
    assert away[1] < 0.7 * away[0]


def test_each_layer_reads_the_outputs_of_pruned_ones():
    """The last layer is what SparseGPT makes of its matrix and the inputs that the finished model gives it."""
    dense, data = make("bert").double(), batches("bert")
    sparse = prune(dense, weights(importance="obs"), data)
    linears = [
        linear for linear in find_linears(Anatomy.of(sparse)) if linear.name.endswith("layer.2.attention.self.query")
    ]
    for reads, same in ((sparse, True), (dense, False)):
        gram = collect(reads, linears, data, lambda rows: rows.T @ rows)[linears[0]]
        expected = prune_matrix(matrix(dense, linears[0]), gram, choose_count(512, (32, 32)))
        assert torch.allclose(matrix(sparse, linears[0]), expected, atol=1e-9) == same


@pytest.mark.parametrize("importance", ["taylor", "random", "obs"])
def test_steps_go_on_from_the_zeros_that_are_there(importance):
    dense, data = make("bert"), batches("bert")
    sparse = prune(dense, weights(ratio=0.75, steps=3, importance=importance, reconstruct=importance == "obs"), data)
    once = prune(dense, weights(ratio=0.75, importance=importance, reconstruct=importance == "obs"), data)
    assert count_zeros(sparse) == count_zeros(once) and 4 * count_zeros(once)[0] == 3 * count_zeros(once)[1]
    same = all(
        torch.equal(one, other) for one, other in zip(zeros_of(sparse).values(), zeros_of(once).values(), strict=True)
    )
    assert same == (importance == "random")


def test_without_data_magnitude_zeroes_and_changes_nothing_else():
    dense = make("bert")
    sparse = prune(dense, weights(ratio=0.5))
    for linear in find_linears(Anatomy.of(dense)):
        kept = matrix(sparse, linear) != 0
        assert (
            torch.equal(matrix(sparse, linear)[kept], matrix(dense, linear)[kept]) and 2 * kept.sum() == kept.numel()
        )
        assert matrix(dense, linear)[~kept].abs().max() <= matrix(dense, linear)[kept].abs().min()


@pytest.mark.parametrize("importance", ["activation", "taylor", "fisher", "obs"])
def test_what_needs_data_says_so(importance):
    for data in (None, []):
        with pytest.raises(DataError, match=f"{importance}.*needs calibration batches"):
            prune(make("bert"), weights(importance=importance), data)


@pytest.mark.parametrize("importance", ["activation", "taylor", "obs"])
def test_nan_is_an_error(importance):
    model = make("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        prune(model, weights(importance=importance), batches("bert"))


def test_heads_and_neurons_first_and_then_zeros():
    dense, data = make("bert"), batches("bert")
    both = PruningConfig(ratio=0.75, granularity=("neuron", "head", "weight"), importance="taylor", round_to=4)
    small = prune(dense, both, data)
    assert total_cost(small, "macs", 7) / total_cost(dense, "macs", 7) == pytest.approx(0.5, abs=0.1)
    zeros, total = count_zeros(small)
    assert zeros == round(0.5 * total) and total < count_zeros(dense)[1]
    refused = [PruningConfig(ratio=0.9999, granularity=("neuron", "weight")), batches("bert")]
    with pytest.raises(ConfigError, match="At most"):
        prune(dense, *refused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_mode_and_frozen_parameters_stay(dtype):
    model = make("bert").to(dtype).train()
    model.bert.encoder.layer[0].requires_grad_(False)
    sparse = prune(model, weights(importance="obs"), batches("bert"))
    assert sparse.dtype == dtype and sparse.training and model.training
    for (name, one), other in zip(model.named_parameters(), sparse.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad and one.dtype == other.dtype, name
    assert 2 * count_zeros(sparse)[0] == count_zeros(sparse)[1]


def test_counting():
    assert shares(0.5, [3, 3, 3]) == [2, 1, 1] and sum(shares(1 / 3, [7] * 9)) == 21
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, True, True, False]
    assert lowest(torch.tensor([2.0, 1.0]), 0).sum() == 0 and lowest(torch.tensor([2.0, 1.0]), 2).all()
    assert lowest_in_rows(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 1).tolist() == [[False, True], [True, False]]
    assert choose_masks({}, 0.5) == {}


def test_the_given_batches_are_not_changed_and_hooks_are_gone():
    model, data = bert().eval(), batches("bert")
    before = copy.deepcopy(data)
    sparse = prune_weights(Anatomy.of(model), weights(importance="obs"), data)
    assert all(torch.equal(one[key], other[key]) for one, other in zip(data, before, strict=True) for key in one)
    for one in (model, sparse):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in one.modules())


def test_a_decoder_without_labels_reads_all_its_inputs():
    for model in (llama().eval(), t5().eval()):
        inputs = {"input_ids": torch.randint(3, 40, (2, 8))}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, 40, (2, 5))
        sparse = prune(model, weights(importance="obs"), [inputs])
        assert 2 * count_zeros(sparse)[0] == count_zeros(sparse)[1]


@pytest.mark.parametrize("keeps", [True, False])
def test_training_keeps_zeros_where_it_is_told_to(keeps, tmp_path):
    sparse = prune(make("bert"), weights(mask_structure="2:4", importance="obs"), batches("bert"))
    before = copy.deepcopy(sparse.state_dict())
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.1, report_to="none", save_strategy="no"
    )
    rows = [{key: value[0] for key, value in batch("bert", seed).items()} for seed in range(8)]
    callbacks = [KeepZeros()] if keeps else []
    transformers.Trainer(model=sparse, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    zeros, total = count_zeros(sparse)
    assert (2 * zeros == total) == was_sparsified(sparse) == keeps
    assert not any(parameter._backward_hooks for parameter in sparse.parameters())
    for linear in find_linears(Anatomy.of(sparse)):
        kept = before[f"{linear.name}.weight"] != 0
        assert not torch.equal(matrix(sparse, linear)[kept], before[f"{linear.name}.weight"][kept]), "the rest learns"


def test_sharded_training_is_refused():
    arguments = transformers.TrainingArguments("unused", report_to="none")
    arguments.deepspeed = "config.json"
    with pytest.raises(UnsupportedModelError, match="Use DDP"):
        KeepZeros().on_train_begin(arguments, None, None, model=make("bert"))
