"""Scores of embeddings, words, masked texts and answers: against definitions written out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification, BertModel

from hf_efficient.errors import ConfigError, DataError
from hf_efficient.measurement import retrieval
from hf_efficient.measurement.estimates import macro_f1
from hf_efficient.measurement.quality import compare_quality, evaluate_quality, task_of
from hf_efficient.measurement.retrieval import find_pairs
from hf_efficient.models.pooling import POOLINGS, pool

from .models import bert_config, token_data

LENGTHS = [9, 4, 6, 7]


def padded(batch):
    """Samples of one length into tensors."""
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in batch]) for name in batch[0]}


# ---- embeddings -----------------------------------------------------------------------------------------------------


class Vectors(torch.nn.Module):
    """The sample carries its own states: [positions, width]."""

    main_input_name = "states"
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states, attention_mask=None):
        return SimpleNamespace(last_hidden_state=states)


def pairs(*angles):
    """Two samples for each (degrees of the text, degrees of its pair), on the unit circle."""
    vectors = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for pair in angles for a in pair]
    return [{"states": [vector], "pair": index // 2} for index, vector in enumerate(vectors)]


def test_a_text_has_to_find_its_own_pair():
    """Of three texts the first two find theirs, the third finds that of the second, and its own comes last."""
    data = pairs((0, 10), (90, 60), (70, 300))
    result = evaluate_quality(Vectors(), data, padded, "sentence-embeddings", batch_size=4)
    assert result.predictions.tolist() == [0, 1, 1] and result.targets.tolist() == [0, 1, 2]
    at_one, rank = result.quality.scores
    assert (at_one.name, at_one.higher_is_better, rank.name) == ("retrieval@1", True, "reciprocal_rank")
    assert at_one.value == pytest.approx(2 / 3) and rank.value == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert at_one.standard_error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert result.quality.samples == result.quality.targets == 3


def test_vectors_that_are_all_the_same_find_nothing():
    result = evaluate_quality(Vectors(), pairs(*[(5, 5)] * 8), padded, "sentence-embeddings")
    assert result.quality.main.value == 1 / 8 and result.quality.scores[1].value == 1 / 8


def test_queries_in_chunks_are_those_at_once(monkeypatch):
    vectors, numbers = torch.nn.functional.normalize(torch.randn(20, 3), dim=-1), torch.arange(20) // 2
    whole = find_pairs(vectors, numbers)
    monkeypatch.setattr(retrieval, "CHUNK", 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, find_pairs(vectors, numbers), strict=True))
    assert len(whole[0].unique()) > 2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_left_out_and_pooling_matters(pooling):
    model = BertModel(bert_config(), add_pooling_layer=False).eval()
    data = [{**row, "pair": i // 2} for i, row in enumerate(token_data([9, 4, 6, 7, 3, 8]))]
    for row in data:
        del row["labels"]
    result = evaluate_quality(model, data, padded, "sentence-embeddings", batch_size=4, pooling=pooling)
    with torch.no_grad():  # each text alone, without padding
        alone = [model(input_ids=row["input_ids"][: row["attention_mask"].sum()][None]) for row in data]
    states = [output.last_hidden_state for output in alone]
    vectors = torch.cat([pool(each, torch.ones(each.shape[:2]).bool(), pooling) for each in states])
    likeness = torch.cosine_similarity(vectors[::2, None], vectors[None, 1::2], dim=-1)
    assert result.predictions.tolist() == likeness.argmax(1).tolist()
    ranks = [(row >= row[i] - 1e-6).sum().item() for i, row in enumerate(likeness)]
    assert (1 / (1 - result.loss)).tolist() == pytest.approx(ranks)


def test_rows_that_are_not_pairs():
    model = Vectors()
    for numbers in ([0, 1], [0, 0, 1], [0, 0, 0, 0]):
        data = [{"states": [[1.0, 0.0]], "pair": number} for number in numbers]
        with pytest.raises(DataError, match="not pairs"):
            evaluate_quality(model, data, padded, "sentence-embeddings")
    with pytest.raises(DataError, match="no 'pair'"):
        evaluate_quality(model, [{"states": [[1.0]]}], padded, "sentence-embeddings")
    with pytest.raises(ConfigError, match="pooling"):
        evaluate_quality(model, pairs((0, 1)), padded, "sentence-embeddings", pooling="max")


# ---- words ----------------------------------------------------------------------------------------------------------


def words(classes=4):
    data = token_data(LENGTHS)
    for row in data:
        row["labels"] = torch.where(row["labels"] < 0, row["labels"], row["labels"] % classes)
        row["labels"][0] = -100
    return data


def test_accuracy_over_words_is_the_share_of_labels_that_count():
    model, data = BertForTokenClassification(bert_config(num_labels=4)).eval(), words()
    result = evaluate_quality(model, data, batch_size=3)
    batch = padded(data)
    with torch.no_grad():
        output = model(**batch)
    kept = batch["labels"] != -100
    right = (output.logits.argmax(-1) == batch["labels"]) & kept
    accuracy, f1, loss = result.quality.scores
    assert result.quality.task == "token-classification" and result.quality.targets == sum(LENGTHS) - 4
    assert accuracy.name == "accuracy" and accuracy.value == pytest.approx((right.sum() / kept.sum()).item())
    assert loss.value == pytest.approx(output.loss.item(), rel=1e-5)
    residuals = right.sum(1) - accuracy.value * kept.sum(1)
    by_hand = math.sqrt(4 / 3 * (residuals**2).sum()) / kept.sum()
    assert accuracy.standard_error == pytest.approx(by_hand.item()) and by_hand > 0
    assert f1.name == "macro_f1" and 0 <= f1.value < 1


def naive_f1(rows):
    known = {target for _, targets in rows for target in targets}
    values = []
    for label in known:
        found = [(p, t) for predictions, targets in rows for p, t in zip(predictions, targets, strict=True)]
        right = sum(p == t == label for p, t in found)
        values.append(2 * right / max(1, sum((p == label) + (t == label) for p, t in found)))
    return sum(values) / len(values)


def test_macro_f1_and_its_jackknife_written_out():
    generator = torch.Generator().manual_seed(0)
    counts = [5, 1, 0, 7, 4]
    rows = [tuple(torch.randint(0, 3, (n,), generator=generator).tolist() for _ in range(2)) for n in counts]
    predictions, targets = (torch.tensor([label for row in rows for label in row[side]]) for side in (0, 1))
    value, error = macro_f1(torch.tensor(counts), predictions, targets)
    assert value == pytest.approx(naive_f1(rows))
    without = [naive_f1([row for other, row in enumerate(rows) if other != left]) for left in range(5)]
    mean = sum(without) / 5
    assert error == pytest.approx(math.sqrt(4 / 5 * sum((each - mean) ** 2 for each in without))) and error > 0
    assert macro_f1(torch.tensor(counts), targets, targets) == (1.0, 0.0)
    assert math.isnan(macro_f1(torch.tensor([3]), predictions[:3], targets[:3])[1])


def test_the_paired_difference_over_words():
    data = words() * 3
    first, second = (evaluate_quality(BertForTokenClassification(bert_config(num_labels=4)), data) for _ in range(2))
    pair = compare_quality(first, second)
    assert pair.name == "accuracy"
    assert pair.difference == pytest.approx(second.quality.main.value - first.quality.main.value)
    parts = second.correct - first.correct - pair.difference * first.count
    by_hand = math.sqrt(12 / 11 * (parts**2).sum()) / first.count.sum()
    assert pair.standard_error == pytest.approx(by_hand.item()) and by_hand > 0
    assert compare_quality(first, first).standard_error == 0


# ---- masked texts ---------------------------------------------------------------------------------------------------


def test_masked_perplexity_is_that_of_the_models_own_loss():
    model, data = BertForMaskedLM(bert_config()).eval(), token_data(LENGTHS)
    for row in data:
        row["labels"][::2] = -100
    result = evaluate_quality(model, data, batch_size=2)
    with torch.no_grad():
        expected = model(**padded(data)).loss.item()
    perplexity = result.quality.main
    assert (result.quality.task, perplexity.name) == ("masked-lm", "perplexity")
    assert perplexity.value == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.quality.targets == sum(length // 2 for length in LENGTHS)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_right_if_both_of_its_ends_are():
    model = BertForQuestionAnswering(bert_config(num_labels=2)).eval()
    data = token_data(LENGTHS)
    with torch.no_grad():
        alone = [model(input_ids=row["input_ids"][: row["attention_mask"].sum()][None]) for row in data]
    ends = [(output.start_logits.argmax().item(), output.end_logits.argmax().item()) for output in alone]
    moved = [(0, 0), (0, 1), (1, 0), (1, 1)]  # what the first row is told is right, and so on
    for row, own, shift in zip(data, ends, moved, strict=True):
        length = row.pop("labels").ne(-100).sum().item()
        row["start_positions"], row["end_positions"] = ((at + by) % length for at, by in zip(own, shift, strict=True))
    result = evaluate_quality(model, data, padded, batch_size=2)
    assert result.correct.tolist() == [1, 0, 0, 0] and result.quality.main.value == 0.25
    assert (result.quality.task, result.quality.main.name) == ("question-answering", "span_accuracy")
    losses = [
        torch.nn.functional.cross_entropy(output[f"{name}_logits"], torch.tensor([row[f"{name}_positions"]])).item()
        for row, output in zip(data, alone, strict=True)
        for name in ("start", "end")
    ]
    assert result.quality.scores[1].value == pytest.approx(sum(losses) / 8, rel=1e-5)
    pair = compare_quality(result, result)
    assert (pair.only_first, pair.only_second, pair.agreement) == (0, 0, 1)
    with pytest.raises(DataError, match="no 'start_positions'"):
        evaluate_quality(model, token_data(LENGTHS), padded)


def test_heads_tell_their_tasks():
    heads = {
        BertForTokenClassification: "token-classification",
        BertForMaskedLM: "masked-lm",
        BertForQuestionAnswering: "question-answering",
    }
    assert {task_of(head(bert_config(num_labels=2))) for head in heads} == set(heads.values())
