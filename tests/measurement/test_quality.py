import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.measurement.estimates import mean_and_error
from hf_efficient.measurement.quality import compare_quality, evaluate_quality, task_of

from ..families import make_config, make_model
from .models import bert_classifier, bert_layer, gpt2, t5, token_data, vit


class Scripted(torch.nn.Module):
    """Gives the logits that the sample itself carries, so every score is known beforehand."""

    main_input_name = "logits"
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, swap=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.swap, self.modes = set(swap), []

    def forward(self, logits, index):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        flip = torch.tensor([i.item() in self.swap for i in index])
        return SimpleNamespace(logits=torch.where(flip[:, None], -logits, logits))


def samples(labels):
    """Two classes, always predicting class 1 with log-odds 1."""
    return [{"logits": [0.0, 1.0], "index": i, "labels": label} for i, label in enumerate(labels)]


def test_accuracy_and_its_error_by_hand():
    model = Scripted()
    result = evaluate_quality(model, samples([1] * 15 + [0] * 5), task="text-classification", batch_size=7)
    main = result.quality.main
    assert (main.name, main.value, main.higher_is_better) == ("accuracy", 0.75, True)
    assert main.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 20))
    loss = result.quality.scores[1].value
    assert loss == pytest.approx(0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.e))
    assert result.quality.samples == result.quality.targets == 20
    assert set(model.modes) == {(False, True)} and model.training and model.weight.requires_grad


def test_mcnemar_by_hand():
    data = samples([1] * 20)
    first = evaluate_quality(Scripted(swap=[0, 1, 2]), data, task="text-classification")
    second = evaluate_quality(Scripted(swap=[2, 3, 4, 5, 6, 7]), data, task="text-classification")
    pair = compare_quality(first, second)
    b, c, n = 5, 2, 20  # only the first right, only the second right
    assert (pair.only_first, pair.only_second, pair.samples) == (b, c, n)
    assert pair.difference == pytest.approx((c - b) / n)
    assert pair.standard_error == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / n) / n)
    assert pair.agreement == pytest.approx(13 / 20)
    assert compare_quality(second, first).difference == -pair.difference


def test_equal_models_agree_and_have_no_error():
    data = samples([1, 0, 1, 1])
    first, again = (evaluate_quality(Scripted(), data, task="text-classification") for _ in range(2))
    pair = compare_quality(first, again)
    assert (pair.difference, pair.standard_error, pair.agreement) == (0, 0, 1)


def test_different_data_cannot_be_compared():
    first = evaluate_quality(Scripted(), samples([1, 0, 1]), task="text-classification")
    for labels in ([1, 1, 0], [1, 0]):
        other = evaluate_quality(Scripted(), samples(labels), task="text-classification")
        with pytest.raises(DataError, match="different samples"):
            compare_quality(first, other)


def test_mean_and_error_is_the_ratio_estimator():
    total, count = torch.tensor([2.0, 9.0, 4.0]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    mean, error = mean_and_error(total, count)
    residuals = [2 - 2.5 * 1, 9 - 2.5 * 3, 4 - 2.5 * 2]
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 6)
    assert math.isnan(mean_and_error(total[:1], count[:1])[1])


def test_causal_loss_is_the_models_own():
    model, data = gpt2().eval(), token_data([9, 4, 6])
    result = evaluate_quality(model, data, task=None, batch_size=2)
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    perplexity, loss, _ = result.quality.scores
    assert loss.name == "loss" and loss.value == pytest.approx(expected, rel=1e-5)
    assert perplexity.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert perplexity.standard_error == pytest.approx(perplexity.value * loss.standard_error)
    assert result.quality.targets == 9 + 4 + 6 - 3
    assert result.count.tolist() == [8, 3, 5]


def test_paired_perplexity_difference():
    first, second = gpt2(), gpt2(n_layer=2)
    data = token_data([9, 4, 6, 7])
    a, b = evaluate_quality(first, data), evaluate_quality(second, data)
    pair = compare_quality(a, b)
    assert pair.difference == pytest.approx(b.quality.main.value - a.quality.main.value)
    assert pair.name == "perplexity" and pair.samples == 4
    residuals = []
    for i in range(4):
        parts = [
            e.quality.main.value * (e.loss[i].item() - e.quality.scores[1].value * e.count[i].item()) for e in (a, b)
        ]
        residuals.append(parts[1] - parts[0])
    by_hand = math.sqrt(4 / 3 * sum(r * r for r in residuals)) / (9 + 4 + 6 + 7 - 4)
    assert pair.standard_error == pytest.approx(by_hand) and by_hand > 0


def test_the_error_of_the_difference_is_the_spread_over_resamples():
    """The formula against a bootstrap over texts: two ways that share no code."""
    first, second = gpt2(), gpt2(n_layer=2)
    with torch.no_grad():
        first.lm_head.weight.mul_(20)
    data = token_data([8, 3, 12, 5, 9, 7] * 20)
    a, b = evaluate_quality(first, data), evaluate_quality(second, data)
    drawn = torch.randint(0, len(data), (2000, len(data)))
    means = [(e.loss[drawn].sum(1) / e.count[drawn].sum(1)).exp() for e in (a, b)]
    bootstrap = (means[1] - means[0]).std().item()
    assert compare_quality(a, b).standard_error == pytest.approx(bootstrap, rel=0.1)


def test_a_diverged_model_has_infinite_perplexity_and_no_crash():
    model = gpt2()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    broken = evaluate_quality(model, token_data([9, 4, 6]))
    assert broken.quality.main.value == math.inf and broken.quality.scores[1].value > 700
    fine = evaluate_quality(gpt2(), token_data([9, 4, 6]))
    assert math.isfinite(fine.quality.main.value)


def test_teacher_forced_seq2seq_loss_is_the_models_own():
    model, data = t5().eval(), token_data([9, 4, 6])
    result = evaluate_quality(model, data, batch_size=2)
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    with torch.no_grad():
        output = model(**batch)
    assert result.quality.task == "seq2seq"
    assert result.quality.main.name == "perplexity"
    assert result.quality.scores[1].value == pytest.approx(output.loss.item(), rel=1e-5)
    kept = batch["labels"] != -100
    accuracy = (output.logits.argmax(-1) == batch["labels"])[kept].double().mean().item()
    assert result.quality.scores[2].name == "token_accuracy"
    assert result.quality.scores[2].value == pytest.approx(accuracy)


@pytest.mark.parametrize("make", [bert_classifier, vit])
def test_batch_size_does_not_matter_and_weights_do(make):
    model = make()
    if make is vit:
        data = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 3} for i in range(10)]
    else:
        data = [{"input_ids": torch.randint(1, 50, (8,)), "extra": torch.ones(1), "labels": i % 3} for i in range(10)]
    one, seven = (evaluate_quality(model, data, batch_size=size) for size in (1, 7))
    assert torch.equal(one.predictions, seven.predictions)
    assert one.quality.scores[1].value == pytest.approx(seven.quality.scores[1].value, rel=1e-5)
    assert abs(evaluate_quality(make(), data).quality.scores[1].value - one.quality.scores[1].value) > 1e-4


def test_tasks_are_known_from_the_head():
    assert task_of(gpt2()) == "causal-lm"
    assert task_of(vit()) == "image-classification"
    with pytest.raises(UnsupportedModelError, match="Pass task="):
        task_of(bert_layer())


@pytest.mark.parametrize(
    ("data", "settings", "error", "words"),
    [
        ([], {}, DataError, "empty"),
        ([{"logits": [0.0, 1.0], "index": 0}], {}, DataError, "no 'labels'"),
        ([{"logits": [0.0], "index": 0, "labels": 0}], {}, DataError, "regression"),
        ([{"logits": [0.0, 1.0], "index": 0, "labels": -100}], {}, DataError, "-100"),
        ([{"logits": [0.0, 1.0], "index": 0, "labels": 0}], {"batch_size": 0}, ConfigError, "batch_size"),
        (
            [{"logits": [0.0, 1.0], "index": 0, "labels": 0}],
            {"task": "text-clasification"},
            ConfigError,
            "Did you mean",
        ),
    ],
)
def test_errors(data, settings, error, words):
    with pytest.raises(error, match=words):
        evaluate_quality(Scripted(), data, **{"task": "text-classification", **settings})


@pytest.mark.parametrize(
    ("field", "value", "words"), [("labels", 2, "label"), ("labels", -7, "label"), ("input_ids", 50, "token 50")]
)
def test_labels_and_tokens_that_the_model_does_not_have_are_named(field, value, words):
    model = make_model("bert", head=transformers.BertForSequenceClassification)
    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": 1} for _ in range(3)]
    assert evaluate_quality(model, rows, task="text-classification").quality.samples == 3
    rows[1] = rows[1] | {field: [3, value, 5] if field == "input_ids" else value}
    with pytest.raises(DataError, match=words):
        evaluate_quality(model, rows, task="text-classification")


def test_heads_that_their_names_do_not_tell():
    assert task_of(transformers.MarianMTModel(make_config("marian"))) == "seq2seq"
    assert task_of(transformers.BertLMHeadModel(make_config("bert", is_decoder=True))) == "causal-lm"
