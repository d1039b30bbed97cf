"""Further scores by name: values counted by hand, what may be loaded, and that they reach the report."""

import math

import pytest
import torch

from hf_efficient.errors import ConfigError, DataError
from hf_efficient.measurement.measure import measure
from hf_efficient.measurement.quality import evaluate_quality
from hf_efficient.measurement.scores import METRICS, check_metrics, compute_scores, further_scores, load_metrics

from .models import bert_classifier

# 3 of 4 ones are found, and 1 of 2 zeros; of three classes each has one right.
TRUE, SAID = torch.tensor([1, 1, 1, 1, 0, 0]), torch.tensor([1, 1, 1, 0, 1, 0])
TRUE3, SAID3 = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
BY_HAND = {
    "accuracy": (4 / 6, 3 / 4),
    "precision": (3 / 4, (1 + 1 / 2 + 1) / 3),
    "recall": (3 / 4, (1 / 2 + 1 + 1) / 3),
    "f1": (3 / 4, (2 / 3 + 2 / 3 + 1) / 3),
    "matthews_correlation": ((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2), (3 * 4 - 5) / math.sqrt(10 * 10)),
    "pearsonr": (1 / 4, 2 / math.sqrt(2.75 * 2)),
    "spearmanr": (1 / 4, 0.8333333333333334),
    "mse": (2 / 6, 1 / 4),
    "mae": (2 / 6, 1 / 4),
}


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_by_hand(name):
    metrics = load_metrics([name])
    two, three = BY_HAND[name]
    assert compute_scores(metrics, SAID.numpy(), TRUE.numpy(), 2) == {name: pytest.approx(two)}
    assert compute_scores(metrics, SAID3.numpy(), TRUE3.numpy(), 3) == {name: pytest.approx(three)}


def test_the_error_is_that_of_the_samples_and_tokens_of_a_text_stay_together():
    draws = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=draws) < 0.8).long()
    metrics = load_metrics(["mae"])
    [alone] = further_scores(metrics, right, torch.ones(400, dtype=torch.long), torch.ones(400), 2)
    share = right.double().mean().item()
    assert alone.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 400), rel=0.25)
    assert not alone.higher_is_better
    alike = right.repeat_interleave(4)  # four tokens that are right or wrong as one tell no more than one
    [together] = further_scores(metrics, alike, torch.ones(1600, dtype=torch.long), torch.full((400,), 4), 2)
    assert together.standard_error == pytest.approx(alone.standard_error)
    [single] = further_scores(metrics, right[:1], torch.ones(1, dtype=torch.long), torch.ones(1), 2)
    assert math.isnan(single.standard_error)


def test_what_is_not_ours_needs_a_word_of_trust(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown metric 'recal'. Did you mean 'recall'\? .*trust_remote_code"):
        check_metrics(["accuracy", "recal"], "text-classification", trusted=False)
    check_metrics(["recal"], "text-classification", trusted=True)
    with pytest.raises(ConfigError, match=r"which causal-lm has not.*text-classification, image-classification"):
        check_metrics(["f1"], "causal-lm", trusted=False)

    script = tmp_path / "half" / "half.py"
    script.parent.mkdir()
    marker = tmp_path / "was-run"
    script.write_text(
        f"import datasets\nimport evaluate\nopen({str(marker)!r}, 'w').close()\n\n\nclass Half(evaluate.Metric):\n"
        "    def _info(self):\n        kinds = {n: datasets.Value('int64') for n in ('predictions', 'references')}\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features(kinds))\n\n"
        "    def _compute(self, predictions, references):\n        return {'half': 0.5, 'n': len(references)}\n"
    )
    with pytest.raises(ConfigError, match="Unknown metric"):
        load_metrics([str(script.parent)])
    assert not marker.exists()
    metrics = load_metrics([str(script.parent)], trusted=True)
    assert compute_scores(metrics, SAID.numpy(), TRUE.numpy(), 2) == {"half_half": 0.5, "half_n": 6}
    with pytest.raises(ConfigError, match="Cannot load the metric 'no-such/metric'"):
        load_metrics(["no-such/metric"], trusted=True)


def test_they_are_scores_of_model_and_baseline():
    models = [bert_classifier(), bert_classifier()]
    rows = [{"input_ids": torch.tensor([n % 7 + 1, 2, 3]), "labels": n % 3} for n in range(30)]
    scored = evaluate_quality(models[0], rows, task="text-classification", metrics=["accuracy", "f1"])
    assert [score.name for score in scored.quality.scores] == ["accuracy", "loss", "f1"]
    expected = compute_scores(load_metrics(["f1"]), scored.predictions.numpy(), scored.targets.numpy(), 3)
    assert scored.quality.scores[-1].value == expected["f1"]
    found = measure(models[0], baseline=models[1], dataset=rows, sequence_length=4, repeats=2, metrics=["mae"])
    for each in (found, found.baseline):
        assert [score.name for score in each.quality.scores] == ["accuracy", "loss", "mae"]


def test_a_metric_that_gives_no_number_is_an_error():
    class Words:
        def _compute(self): ...

        def compute(self, predictions, references):
            return {"verdict": "good"}

    with pytest.raises(DataError, match="gives no number, only verdict"):
        compute_scores({"words": Words()}, SAID.numpy(), TRUE.numpy(), 2)
