"""Correlations against SciPy, their errors against simulation, and labelled pairs of texts as a whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from hf_efficient.errors import DataError
from hf_efficient.measurement import correlation
from hf_efficient.measurement.correlation import jackknife, pearson, spearman
from hf_efficient.measurement.quality import compare_quality, evaluate_quality
from hf_efficient.measurement.retrieval import first_numbers

from .test_quality_tasks import Vectors, padded, pairs

NUMBERS = st.sampled_from([-2.0, 0.0, 0.25, 1.0, 3.5])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=20))
def test_they_are_those_of_scipy(rows):
    first, second = (torch.tensor(each).double() for each in zip(*rows, strict=True))
    if len(first.unique()) > 1 and len(second.unique()) > 1:
        assert float(pearson(first, second)) == pytest.approx(pearsonr(first, second).statistic, abs=1e-9)
        assert float(spearman(first, second)) == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)
    else:
        assert math.isnan(pearson(first, second))


def test_the_error_is_that_of_a_repeated_draw(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        first = torch.randn(n, generator=generator)
        return first, 0.6 * first + 0.8 * torch.randn(n, generator=generator)

    spread = torch.stack([spearman(*draw(80)) for _ in range(400)]).std()
    parts = torch.stack([jackknife(spearman, *draw(80)) for _ in range(20)])
    errors = parts.std(dim=1) / math.sqrt(80)
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.15)
    one = draw(80)
    monkeypatch.setattr(correlation, "MOST", 20)  # groups of four
    assert len(jackknife(spearman, *one)) == 20
    assert float(jackknife(spearman, *one).mean()) == pytest.approx(float(spearman(*one)), abs=0.05)


def labelled(*rows):
    """(degrees between two texts, how alike they are said to be)."""
    data = pairs(*((10.0 * n, 10.0 * n + angle) for n, (angle, _) in enumerate(rows)))
    return [row | {"similarity": rows[number // 2][1]} for number, row in enumerate(data)]


ROWS = [(5, 4.5), (80, 0.5), (40, 2.0), (60, 2.5), (20, 5.0)]


@pytest.mark.parametrize("batch_size", [3, 32])
def test_labelled_pairs_are_scored_by_correlation(batch_size):
    result = evaluate_quality(Vectors(), labelled(*ROWS), padded, "sentence-embeddings", batch_size=batch_size)
    cosines, labels = zip(*((math.cos(math.radians(angle)), label) for angle, label in ROWS), strict=True)
    rank, straight = result.quality.scores
    assert (rank.name, straight.name, result.quality.samples) == ("spearman", "pearson", 5)
    assert rank.value == pytest.approx(spearmanr(cosines, labels).statistic)
    assert straight.value == pytest.approx(pearsonr(cosines, labels).statistic, abs=1e-6)
    assert rank.standard_error > 0 and rank.higher_is_better
    same = compare_quality(result, result)
    assert (same.name, same.difference, same.standard_error, same.agreement, same.similarity) == (
        *("spearman", 0, 0, None),
        pytest.approx(1),
    )
    other = evaluate_quality(Vectors(), labelled(*((90 - a, b) for a, b in ROWS)), padded, "sentence-embeddings")
    change = compare_quality(result, other)
    assert change.similarity == pytest.approx(-1) and change.difference == pytest.approx(-2 * rank.value)


def test_two_models_are_alike_as_far_as_their_cosines_rise_together():
    angles = [(0, 10), (90, 60), (70, 300), (20, 200)]
    first = evaluate_quality(Vectors(), pairs(*angles), padded, "sentence-embeddings")
    turned = evaluate_quality(Vectors(), pairs(*((a + 30, b + 30) for a, b in angles)), padded, "sentence-embeddings")
    other = evaluate_quality(Vectors(), pairs(*((a, 2 * b) for a, b in angles)), padded, "sentence-embeddings")
    assert len(first.similarities) == 16 and first.similarities[:2].tolist() == pytest.approx(
        [math.cos(math.radians(angle)) for angle in (10, 60)], abs=1e-6
    )
    assert compare_quality(first, turned).similarity == pytest.approx(1, abs=0.02)
    assert compare_quality(first, other).similarity < 0.9


def test_labels_that_are_all_one():
    with pytest.raises(DataError, match="The 3 test pairs have 1 different labels"):
        evaluate_quality(Vectors(), labelled((1, 2.0), (2, 2.0), (3, 2.0)), padded, "sentence-embeddings")


def test_the_first_numbers_alone():
    model, data = Vectors(), pairs((0, 10), (80, 60))
    with first_numbers(model, 1):
        cut = evaluate_quality(model, data, padded, "sentence-embeddings")
    assert cut.similarities.tolist() == pytest.approx([1] * 4)
    whole = evaluate_quality(model, data, padded, "sentence-embeddings")
    assert whole.similarities[0] == pytest.approx(math.cos(math.radians(10)))
