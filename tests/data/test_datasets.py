"""Loading and splitting: what is kept, what is dropped and said, and every refusal."""

import json
import logging
import os

import datasets
import pytest

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.errors import ConfigError, DataError

from .tiny import ANIMALS, rows


def fingerprint_of(split):
    return [json.dumps(row, sort_keys=True) for row in split]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet", "folder"])
def test_each_format_gives_the_same_rows(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, source = tmp_path / f"rows{ending}", rows()
    if ending in (".csv", ".tsv"):
        source.to_csv(path, sep="\t" if ending == ".tsv" else ",")
    elif ending in (".json", ".jsonl"):
        source.to_json(path, lines=ending == ".jsonl")
    elif ending == ".parquet":
        source.to_parquet(path)
    else:
        path = tmp_path / "saved"
        source.save_to_disk(path)
    before = sorted(os.listdir(tmp_path))
    loaded = load_dataset_any(str(path))
    texts = [text for split in loaded.values() for text in split["text"]]
    assert sorted(texts) == sorted(source["text"])
    assert loaded["train"].features["label"].names == ANIMALS
    assert contents(loaded) == contents(load_dataset_any(source))
    assert sorted(os.listdir(tmp_path)) == before


def contents(loaded):
    return {name: sorted(zip(split["text"], split["label"], strict=True)) for name, split in loaded.items()}


def test_text_file_is_one_document_per_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\n   \nthree\n")
    loaded = load_dataset_any(path, test_fraction=0.34)
    assert sorted([*loaded["train"]["text"], *loaded["test"]["text"]]) == ["one", "three", "two"]


def test_split_is_stratified_seeded_and_complete():
    source = rows(100, label=["a"] * 70 + ["b"] * 30)
    loaded = load_dataset_any(source)
    assert [list(loaded["test"]["label"]).count(i) for i in (0, 1)] == [14, 6]
    assert sorted([*loaded["train"]["text"], *loaded["test"]["text"]]) == sorted(source["text"])
    same, other = load_dataset_any(source), load_dataset_any(source, seed=1)
    assert fingerprint_of(same["test"]) == fingerprint_of(loaded["test"])
    assert fingerprint_of(other["test"]) != fingerprint_of(loaded["test"])
    assert list(loaded["test"]["label"]) != sorted(loaded["test"]["label"])  # the first rows are not one class


def test_train_keeps_a_row_of_every_class():
    loaded = load_dataset_any(rows(10, label=["a"] * 9 + ["rare"]), test_fraction=0.9)
    assert set(loaded["train"]["label"]) == {0, 1}
    assert len(loaded["test"]) == 8


def test_duplicates_go_before_the_split_and_are_counted(caplog):
    source = datasets.concatenate_datasets([rows(), rows()])
    with caplog.at_level(logging.WARNING):
        loaded = load_dataset_any(source)
    assert "Removed 30 exact duplicates of 60 rows" in caplog.text
    assert not set(loaded["train"]["text"]) & set(loaded["test"]["text"])
    assert len(loaded["train"]) + len(loaded["test"]) == 30
    alike = rows(8, text=["w1"] * 8, label=["a", "b"] * 4).add_column("n", list(range(8)))
    assert {name: len(split) for name, split in load_dataset_any(alike).items()} == {"train": 6, "test": 2}


def test_given_splits_are_left_alone_and_leaks_reported(caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_dataset_any({"train": rows(20), "test": rows(4), "unsupervised": rows(3)})
    assert "4 of 4 test rows also occur in train" in caplog.text
    assert {name: len(split) for name, split in loaded.items()} == {"train": 20, "test": 4}


def test_hidden_test_labels_give_way_to_validation():
    hidden = rows(5, label=[-1] * 5)
    loaded = load_dataset_any({"train": rows(9), "validation": rows(6), "test": hidden})
    assert {name: len(split) for name, split in loaded.items()} == {"train": 9, "test": 6}
    kept = load_dataset_any({"train": rows(9), "validation": rows(6), "test": rows(5)})
    assert {name: len(split) for name, split in kept.items()} == {"train": 9, "test": 5, "validation": 6}


def test_test_split_without_labels_is_kept_where_there_is_no_label_column():
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    assert len(load_dataset_any({"train": texts, "test": texts.select([0])})["test"]) == 1


def test_limit_is_a_seeded_choice_that_keeps_the_classes():
    source = rows(90, label=["a"] * 88 + ["b", "c"])
    loaded = load_dataset_any(source, limit=10)
    assert len(loaded["train"]) + len(loaded["test"]) == 10
    assert loaded["train"].features["label"].names == ["a", "b", "c"]
    texts = [*loaded["train"]["text"], *loaded["test"]["text"]]
    assert sorted(texts) != sorted(source["text"][:10])
    other = load_dataset_any(source, limit=10, seed=1)
    assert sorted(texts) != sorted([*other["train"]["text"], *other["test"]["text"]])
    assert {k: len(v) for k, v in load_dataset_any({"train": rows(9), "test": rows(9)}, limit=4).items()} == {
        "train": 4,
        "test": 4,
    }


def test_label_column_by_name_is_stratified():
    source = rows(50).rename_column("label", "kind")
    counts = [list(load_dataset_any(source, label_column="kind")["test"]["kind"]).count(i) for i in range(3)]
    assert max(counts) - min(counts) <= 1
    with pytest.raises(DataError, match=r"no label column called 'knid'.*Did you mean 'kind'.*Columns: text, kind"):
        load_dataset_any(source, label_column="knid")


def test_missing_file_names_neighbours_and_endings(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"Did you mean 'reviews\.csv'.*\.parquet"):
        load_dataset_any(tmp_path / "review.csv")
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        load_dataset_any(tmp_path / "no" / "review.csv")
    with pytest.raises(DataError, match="No such data file"):
        load_dataset_any("./" + "x" * 5000)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xlsx", b"x", r"ending must be one of \.csv"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"text,label\n", "one row or more"),
        ("rows.json", b"{", r"Cannot read .* as \.json"),
        ("rows.csv", b"text,label\na\xff,b\n", "UTF-8"),
        ("rows.parquet", b"not parquet", r"Cannot read .* as \.parquet"),
        ("lines.txt", b"\n\n \n", "no rows"),
    ],
)
def test_bad_files(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_dataset_any(path)


def test_bad_sources(tmp_path):
    with pytest.raises(DataError, match="not written by save_to_disk"):
        load_dataset_any(tmp_path)
    with pytest.raises(DataError, match="Cannot load 'nobody/nothing' from the Hub"):
        load_dataset_any("nobody/nothing")
    with pytest.raises(DataError, match=r"must hold datasets\.Dataset values"):
        load_dataset_any({"train": ["a"]})
    with pytest.raises(DataError, match="got int"):
        load_dataset_any(3)
    with pytest.raises(DataError, match="splits a, b"):
        load_dataset_any({"a": rows(), "b": rows()})
    with pytest.raises(ConfigError, match="Known: bbc-news, digits"):
        load_dataset_any("bundled:bbc")


@pytest.mark.parametrize(
    "options", [{"test_fraction": 0}, {"test_fraction": 1}, {"test_fraction": "0.2"}, {"limit": 0}, {"limit": True}]
)
def test_bad_options(options):
    with pytest.raises(DataError, match=next(iter(options))):
        load_dataset_any(rows(), **options)


def test_too_few_rows_to_hold_out():
    with pytest.raises(DataError, match="3 rows in 3 classes are too few"):
        load_dataset_any(rows(3))
