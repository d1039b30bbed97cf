"""Rows of query, document and label: labels are numbers, and the rows of a query stay together."""

import datasets
import pytest

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import check_labels, prepare
from hf_efficient.data.queries import with_numbers
from hf_efficient.data.tasks import TASKS
from hf_efficient.errors import DataError

QUERY = TASKS["reranking"].reading(None, None)["group_names"]


def pairs(count=40, each=4, **columns):
    data = {
        "query": [f"w{n // each}" for n in range(count)],
        "passage": [f"w{n} w1" for n in range(count)],
        "score": [float(n % each == 0) for n in range(count)],
    }
    return datasets.Dataset.from_dict(data | columns)


def test_a_query_is_in_train_or_in_test_with_all_of_its_documents():
    splits = load_dataset_any(pairs(), test_fraction=0.3, seed=1, group_names=QUERY)
    train, test = (set(splits[name]["query"]) for name in ("train", "test"))
    assert (len(train), len(test)) == (7, 3) and not train & test
    assert len(splits["train"]) == 28 and len(splits["test"]) == 12
    again = load_dataset_any(pairs(), test_fraction=0.3, seed=1, group_names=QUERY)
    other = load_dataset_any(pairs(), test_fraction=0.3, seed=2, group_names=QUERY)
    assert splits["test"][:] == again["test"][:] and test != set(other["test"]["query"])
    rows = load_dataset_any(pairs(), test_fraction=0.3, seed=1)
    assert set(rows["train"]["query"]) & set(rows["test"]["query"])  # what it is without


def test_a_limit_leaves_whole_queries():
    splits = load_dataset_any(pairs(), limit=15, test_fraction=0.4, group_names=QUERY)
    rows = [*splits["train"]["query"], *splits["test"]["query"]]
    assert len(rows) == 12 and all(rows.count(query) == 4 for query in rows)
    one = load_dataset_any({"train": pairs(), "test": pairs()}, limit=2, group_names=QUERY)
    assert len(one["train"]) == len(one["test"]) == 4  # one is the least


def test_queries_of_test_that_are_trained_on_are_told(caplog):
    other = {"passage": [f"w{n} w2" for n in range(40)]}
    load_dataset_any({"train": pairs(), "test": pairs(**other)}, group_names=QUERY)
    assert "10 of 10 values of 'query' in test also occur in train" in caplog.text


def test_too_few_queries():
    with pytest.raises(DataError, match="1 different values of 'query' are too few"):
        load_dataset_any(pairs(8, each=8), group_names=QUERY)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([1, 0, 3], [1, 0, 3]),
        ([True, False, True], [1, 0, 1]),
        (["0.5", " 2", "1e-1"], [0.5, 2, 0.1]),
        ([0.25, 1.5, -3.0], [0.25, 1.5, -3]),
    ],
)
def test_labels_are_numbers(values, numbers):
    rows = with_numbers(datasets.Dataset.from_dict({"label": values, "query": ["a", "b", "c"]}), "label")
    assert rows["label"][:] == numbers and rows.features["label"].dtype == "float64"
    assert rows["query"][:] == ["a", "b", "c"]


def test_the_names_of_classes_count(tmp_path):
    """A file that is read makes classes of whole numbers: 3 is the second of them, and worth 3."""
    lines = [f"w{n},w1,{3 * (n % 2)}" for n in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["query,document,label", *lines]))
    rows = load_dataset_any(tmp_path / "rows.csv")["train"]
    assert isinstance(rows.features["label"], datasets.ClassLabel)
    assert set(with_numbers(rows, "label")["label"]) == {0, 3}


@pytest.mark.parametrize("value", ["good", None, "nan", "inf", ""])
def test_what_is_no_number(value):
    rows = datasets.Dataset.from_dict({"label": ["1", value]})
    with pytest.raises(DataError, match=r"Row 1 has .* in the label column 'label', where a number says how relevant"):
        with_numbers(rows, "label")


def test_pairs_are_one_input_and_test_rows_know_their_query(tokenizer):
    splits = {"train": pairs(), "test": pairs(8)}
    ready = prepare(splits, "reranking", tokenizer, max_length=8)
    assert ready.train.column_names == ["input_ids", "attention_mask", "labels"]
    row = ready.test[5]
    assert row["input_ids"] == tokenizer("w1", "w5 w1")["input_ids"] and row["query"] == 1 and row["labels"] == [0.0]
    batch = ready.collator([ready.test[0], ready.test[4]])
    assert batch["labels"].tolist() == [[1.0], [1.0]] and batch["query"].tolist() == [0, 1]
    assert (ready.num_labels, ready.problem) == (1, "multi_label_classification")
    teacher = {"score": [-7.5 + n for n in range(40)]}
    assert prepare(splits | {"train": pairs(**teacher)}, "reranking", tokenizer, max_length=8).problem is None


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"score": [-1.0, 1.0] * 4}, "has -1 in the test rows. NDCG and MRR take labels from 0"),
        ({"score": [1.0] * 8}, "None of the 2 queries in the test rows .* documents of different labels"),
        ({"query": [f"w{n}" for n in range(8)]}, "None of the 8 queries .* Each needs several rows"),
        ({"query": [None] * 8}, "Row 0 has None in the text column 'query'"),
    ],
)
def test_test_rows_that_rank_nothing(columns, words, tokenizer):
    with pytest.raises(DataError, match=words):
        prepare({"train": pairs(), "test": pairs(8, **columns)}, "reranking", tokenizer, max_length=8)


def test_a_model_of_classes_is_refused(tokenizer):
    from ..measurement.models import bert_config

    ready = prepare({"train": pairs(), "test": pairs(8)}, "reranking", tokenizer, max_length=8)
    check_labels(bert_config(num_labels=1), ready)
    with pytest.raises(DataError, match="The model has 3 labels"):
        check_labels(bert_config(), ready)
