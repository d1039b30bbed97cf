"""Scores of rankings: against scikit-learn, against definitions written out by hand, and of models as a whole."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from hf_efficient.errors import DataError
from hf_efficient.measurement.quality import compare_quality, evaluate_quality
from hf_efficient.measurement.ranking import ndcg, reciprocal_rank, same_order

from .test_quality_tasks import padded

GRADES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@given(st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.1, 2.0, 7.0]), GRADES), min_size=2, max_size=14))
def test_ndcg_is_that_of_scikit_learn(pairs):
    """With ties, grades, and more candidates than count."""
    scores, labels = (torch.tensor(each) for each in zip(*pairs, strict=True))
    if labels.max() > 0:
        expected = ndcg_score([labels.tolist()], [scores.tolist()], k=10)
        assert ndcg(scores, labels) == pytest.approx(expected)


def test_the_first_relevant_one_counts_and_ties_are_not_lucky():
    labels = torch.tensor([0.0, 1.0, 0.4, 3.0])
    assert reciprocal_rank(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 1 / 2
    assert reciprocal_rank(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 1
    assert reciprocal_rank(torch.zeros(4), labels) == 1 / 3  # behind both irrelevant ones
    assert reciprocal_rank(torch.arange(4.0), torch.zeros(4)) == 0
    late = torch.tensor([0.0] * 9 + [1.0, 0.0])
    assert reciprocal_rank(-torch.arange(11.0), late) == 1 / 10
    assert reciprocal_rank(-torch.arange(11.0), late.roll(1)) == 0  # the eleventh


def test_two_models_agree_on_the_order_of_two():
    first, second = torch.tensor([3.0, 2.0, 1.0, 5.0, 4.0]), torch.tensor([9.0, 7.0, 8.0, 1.0, 2.0])
    counts = torch.tensor([3, 2])
    assert same_order(first, second, counts) == pytest.approx((2 / 3 + 0) / 2)
    assert same_order(first, 10 * first - 3, counts) == 1 and same_order(first, -first, counts) == 0
    assert same_order(first, torch.zeros(5), counts) == 0  # no order at all


class Scores(torch.nn.Module):
    """The sample carries its own score."""

    main_input_name = "score"
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, sign=1.0, width=1):
        super().__init__()
        self.weight, self.width = torch.nn.Parameter(torch.tensor(sign)), width

    def forward(self, score):
        return SimpleNamespace(logits=self.weight * score[:, None].expand(-1, self.width))


def samples(*queries):
    """A row for each (score, label); those of a query need not stand together."""
    rows = [
        [{"score": score, "labels": [label], "query": number} for score, label in query]
        for number, query in enumerate(queries)
    ]
    return [row for turn in itertools.zip_longest(*rows) for row in turn if row is not None]


QUERIES = [
    [(3.0, 1.0), (2.0, 0.0), (1.0, 0.0)],
    [(3.0, 0.0), (2.0, 1.0)],
    [(1.0, 1.0)],  # nothing to rank
    [(1.0, 0.0), (5.0, 0.0)],
]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_mean_over_queries_that_can_be_ranked(batch_size):
    result = evaluate_quality(Scores(), samples(*QUERIES), padded, "reranking", batch_size=batch_size)
    gain, rank = result.quality.scores
    second = 1 / math.log2(3)
    assert (gain.name, rank.name, result.quality.samples, result.quality.targets) == ("ndcg@10", "mrr@10", 2, 5)
    assert gain.value == pytest.approx((1 + second) / 2) and rank.value == pytest.approx((1 + 1 / 2) / 2)
    assert gain.standard_error == pytest.approx((1 - second) / 2) and result.quality.largest_class is None
    assert gain.higher_is_better and rank.higher_is_better


def test_two_models_on_the_same_queries():
    teacher, student = (evaluate_quality(Scores(sign), samples(*QUERIES), padded, "reranking") for sign in (1.0, -1.0))
    change = compare_quality(teacher, student)
    expected = student.quality.main.value - teacher.quality.main.value
    assert (change.name, change.difference) == ("ndcg@10", pytest.approx(expected))
    assert (change.agreement, change.only_first, change.samples) == (0, None, 2)
    changes = student.correct - teacher.correct
    assert change.standard_error == pytest.approx(float(changes.std(correction=0)) / math.sqrt(2))
    same = compare_quality(teacher, teacher)
    assert (same.agreement, same.difference, same.standard_error) == (1, 0, 0)
    with pytest.raises(DataError, match="different samples"):
        compare_quality(teacher, evaluate_quality(Scores(), samples(*QUERIES[:1]), padded, "reranking"))


def test_what_cannot_be_ranked_is_told():
    with pytest.raises(DataError, match="No query has documents of different labels"):
        evaluate_quality(Scores(), samples(*QUERIES[2:]), padded, "reranking")
    with pytest.raises(DataError, match=r"gives \[7, 2\] numbers for 7 pairs"):
        evaluate_quality(Scores(width=2), samples(*QUERIES[:2], QUERIES[3]), padded, "reranking")
    rows = [{"score": 1.0, "labels": [1.0]}]
    with pytest.raises(DataError, match="no 'query'"):
        evaluate_quality(Scores(), rows, padded, "reranking")
