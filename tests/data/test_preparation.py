"""Rows to model inputs: tokens, labels, padding, columns, caching, and every refusal."""

import datasets
import pyarrow as pa
import pytest
import torch
import transformers

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import check_labels, prepare
from hf_efficient.data.tasks import ROLES, TASKS
from hf_efficient.errors import ConfigError, DataError

from .tiny import ANIMALS, rows


@pytest.fixture
def splits():
    return load_dataset_any(rows())


def test_classification_inputs_labels_and_padding(tokenizer, splits):
    ready = prepare(splits, "text-classification", tokenizer, max_length=3)
    assert (ready.num_labels, ready.label_names, ready.task) == (3, tuple(ANIMALS), "text-classification")
    assert {"input_ids", "attention_mask", "labels"} <= set(ready.train.column_names)
    assert not {"text", "label"} & set(ready.train.column_names)
    assert {len(ids) for ids in ready.train["input_ids"]} == {3}
    for text, label, out in zip(splits["test"]["text"], splits["test"]["label"], ready.test, strict=True):
        assert out["labels"] == label
        assert out["input_ids"] == tokenizer(text)["input_ids"][:3]
    uneven = rows(6, text=["w1", "w1 w2 w3", "w2", "w3", "w4 w5", "w6"])
    batch = prepare({"train": uneven, "test": uneven}, "text-classification", tokenizer)
    batch = batch.collator([batch.train[0], batch.train[1]])
    assert batch["input_ids"].shape == (2, 4) and batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == torch.int64


def test_pairs_are_both_read(tokenizer):
    data = rows(6).add_column("second", [f"w{i + 5}" for i in range(6)])
    data = {"train": data, "test": data}
    one = prepare(data, "text-classification", tokenizer)
    two = prepare(data, "text-classification", tokenizer, text_pair_column="second")
    assert two.train[0]["input_ids"] == one.train[0]["input_ids"] + [1, 8]


@pytest.mark.parametrize(
    ("labels", "names", "first"),
    [
        (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
        ([10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
        ([1, -1, 1, -1], ("-1", "1"), [1, 0, 1, 0]),
        ([True, False, True, False], ("False", "True"), [1, 0, 1, 0]),
    ],
)
def test_labels_are_numbered_in_sorted_order(labels, names, first, tokenizer):
    data = {"train": rows(4, label=labels), "test": rows(4, label=labels)}
    ready = prepare(data, "text-classification", tokenizer)
    assert ready.label_names == names and list(ready.train["labels"]) == first
    loaded = prepare(load_dataset_any(rows(40, label=labels * 10)), "text-classification", tokenizer)
    assert loaded.label_names == names


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.5, 1.5, 2.5, 3.5], "regression"),
        ([["a"], ["b"], ["a"], ["b"]], "several labels per row"),
        (["a", "a", "a", "a"], "single class a"),
        (["a", "b", None, "b"], "rows without a label"),
    ],
)
def test_labels_refused(labels, words, tokenizer):
    data = rows(4, label=labels)
    with pytest.raises(DataError, match=words):
        prepare({"train": data, "test": data}, "text-classification", tokenizer)


def test_class_labels_in_another_order_are_refused(tokenizer):
    train, test = rows(6, label=[0, 1] * 3), rows(6, label=[0, 1] * 3)
    train = train.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    test = test.cast_column("label", datasets.ClassLabel(names=["b", "a"]))
    with pytest.raises(DataError, match="other class names or order"):
        prepare({"train": train, "test": test}, "text-classification", tokenizer)


def test_columns_guessed_named_or_listed(tokenizer, splits):
    renamed = splits.rename_columns({"text": "sentence", "label": "category"})
    ready = prepare(renamed, "text-classification", tokenizer)
    assert ready.train[:]["input_ids"] == prepare(splits, "text-classification", tokenizer).train[:]["input_ids"]
    odd = splits.rename_columns({"text": "body"})
    with pytest.raises(
        DataError, match=r"no text column with a usual name \(text, sentence.*Columns: body, label.*text_column"
    ):
        prepare(odd, "text-classification", tokenizer)
    with pytest.raises(DataError, match=r"no text column called 'bodi'.*Did you mean 'body'"):
        prepare(odd, "text-classification", tokenizer, text_column="bodi")
    assert len(prepare(odd, "text-classification", tokenizer, text_column="body").train) == len(splits["train"])
    with pytest.raises(DataError, match=r"label \(test split\)"):
        prepare(
            {"train": splits["train"], "test": splits["test"].remove_columns("label")},
            "text-classification",
            tokenizer,
        )


def test_prepare_refuses_bad_calls(tokenizer, splits):
    with pytest.raises(ConfigError, match="Did you mean 'text-classification'"):
        prepare(splits, "text-clasification", tokenizer)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        prepare(splits, "text-classification", None)
    for wrong in (1, 0, 2.5, True):
        with pytest.raises(ConfigError, match="max_length"):
            prepare(splits, "text-classification", tokenizer, max_length=wrong)
    with pytest.raises(DataError, match="splits train and test are needed, got train"):
        prepare({"train": rows()}, "text-classification", tokenizer)
    with pytest.raises(DataError, match="test split has no rows"):
        prepare({"train": rows(), "test": rows().select([])}, "text-classification", tokenizer)
    with pytest.raises(DataError, match=r"Row 1 has None in the text column 'text'"):
        prepare(
            {"train": rows(2, text=["a", None], label=["a", "b"]), "test": rows()}, "text-classification", tokenizer
        )
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a pad_token nor an eos_token"):
        prepare(splits, "text-classification", tokenizer)


def test_check_labels(tokenizer, splits):
    ready = prepare(splits, "text-classification", tokenizer)
    config = transformers.BertConfig(num_labels=2)
    with pytest.raises(DataError, match=r"model has 2 labels \(LABEL_0, LABEL_1\), the data has 3 \(cat, dog, eel\)"):
        check_labels(config, ready)
    swapped = transformers.BertConfig(id2label=dict(enumerate(["dog", "cat", "eel"])))
    with pytest.raises(DataError, match="another order"):
        check_labels(swapped, ready)
    assert check_labels(transformers.BertConfig(num_labels=3), ready) is None
    assert check_labels(config, prepare(splits, "causal-lm", tokenizer)) is None


def test_causal_packs_every_token_once(tokenizer):
    train = rows(7, text=["w1 w2 w3", "w4", "  ", "w5 w6", "w7", "w8", "w9"])
    ready = prepare({"train": train, "test": train}, "causal-lm", tokenizer, max_length=4)
    expected = [token for text in train["text"] if text.strip() for token in [*tokenizer(text)["input_ids"], 0]]
    assert [token for ids in ready.train["input_ids"] for token in ids] == expected[:-1]  # one token predicts nothing
    assert len(expected) == 21 and [len(ids) for ids in ready.train["input_ids"]] == [4] * 5
    assert ready.train["labels"] == ready.train["input_ids"]
    assert (ready.num_labels, ready.label_names) == (None, ())


def test_causal_labels_ignore_padding_but_not_the_end_of_sequence(tokenizer):
    train = rows(2, text=["w1 w2 w3", "w4 w5 w6"])
    ready = prepare({"train": train, "test": train}, "causal-lm", tokenizer, max_length=6)
    batch = ready.collator([ready.train[0], ready.train[1]])
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 0, 1], [7, 8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 4, 5, 6, 0, 1], [7, 8, 9, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_causal_without_a_token_is_refused(tokenizer):
    blank = rows(2, text=[" ", ""])
    with pytest.raises(DataError, match="No tokens are left of the train split"):
        prepare({"train": blank, "test": blank}, "causal-lm", tokenizer)


def test_seq2seq_targets_become_padded_labels(tokenizer):
    data = rows(2, text=["w1 w2", "w3"], label=["a", "b"]).add_column("summary", ["w4", "w5 w6"])
    ready = prepare({"train": data, "test": data}, "seq2seq", tokenizer)
    batch = ready.collator([ready.train[0], ready.train[1]])
    assert batch["input_ids"].tolist() == [[1, 4, 5], [1, 6, 0]]
    assert batch["labels"].tolist() == [[1, 7, -100], [1, 8, 9]]
    with pytest.raises(DataError, match="no target column"):
        prepare({"train": rows(), "test": rows()}, "seq2seq", tokenizer)


def test_preparing_is_deterministic_and_leaves_the_users_folder_alone(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows().save_to_disk(tmp_path / "saved")
    before = sorted(path for path in tmp_path.rglob("*"))
    ready = [prepare(load_dataset_any(tmp_path / "saved"), "text-classification", tokenizer) for _ in range(2)]
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert ready[0].train._fingerprint == ready[1].train._fingerprint
    assert ready[0].train[:] == ready[1].train[:]
    assert ready[0].train.cache_files == ready[1].train.cache_files != []
    other = prepare(load_dataset_any(tmp_path / "saved"), "text-classification", tokenizer, max_length=2)
    assert other.train.cache_files != ready[0].train.cache_files and other.train[:] != ready[0].train[:]


def test_every_task_names_a_class_of_transformers_and_roles_that_are_known():
    assert all(task.auto_class in dir(transformers) for task in TASKS.values())
    assert all(set(task.roles) <= ROLES.keys() for task in TASKS.values())


def test_a_column_of_no_role_is_not_an_argument(splits, tokenizer):
    with pytest.raises(TypeError, match=r"no argument 'txt_column'.*text_column, text_pair_column"):
        prepare(splits, "text-classification", tokenizer, txt_column="text")


def stored_labels(values, names):
    """Class labels as a file may hold them: nobody has compared them with the names."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    table = pa.table({"text": [f"w{n}" for n in range(len(values))], "label": pa.array(values, pa.int64())})
    return datasets.Dataset(table.cast(features.arrow_schema), info=datasets.DatasetInfo(features=features))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 1, 2, 1], r"labels beyond its 2 classes \(2\): they count from 0 to 1"),
        ([0, 1, -2, 1], r"labels beyond its 2 classes \(-2\)"),
        ([0, 1, -1, 1], r"rows without a label \(-1\)"),
        ([0, 1, None, 1], r"rows without a label \(None\)"),
        ([1, 1, 1, 1], "single class b"),
    ],
)
def test_class_labels_that_name_no_class(values, words, tokenizer):
    right = stored_labels([0, 1, 0, 1], ["a", "b"])
    assert prepare({"train": right, "test": right}, "text-classification", tokenizer).num_labels == 2
    wrong = stored_labels(values, ["a", "b"])
    for other in (wrong, right) if values != [1, 1, 1, 1] else (wrong,):
        for splits in ({"train": wrong, "test": other}, {"train": other, "test": wrong}):
            with pytest.raises(DataError, match=words):
                prepare(splits, "text-classification", tokenizer)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.0, 1.0, None, 1.0], r"rows without a label \(None\)"),
        ([0.0, float("nan"), 1.0, float("nan")], r"rows without a label \(nan\)"),
        ([0.0, 1.0, 0.0, 1.0], "regression"),
        ([0.5, 1.0, None, 1.0], "regression"),
        (["a", "", "b", "a"], r"rows without a label \(''\)"),
    ],
)
def test_a_missing_label_is_told_from_a_number(labels, words, tokenizer):
    data = rows(4, label=labels)
    with pytest.raises(DataError, match=words):
        prepare({"train": data, "test": data}, "text-classification", tokenizer)


def test_labels_that_are_as_many_as_rows_are_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("hf_efficient.data.preparation.MAX_LABELS", 5)
    for count, is_fine in ((5, True), (6, False)):
        data = rows(12, label=[f"c{n % count}" for n in range(12)])
        if is_fine:
            assert prepare({"train": data, "test": data}, "text-classification", tokenizer).num_labels == 5
        else:
            with pytest.raises(DataError, match="has 6 classes, at most 5"):
                prepare({"train": data, "test": data}, "text-classification", tokenizer)


@pytest.mark.parametrize("max_length", [1, 10**30, "9", True])
def test_a_length_out_of_range(max_length, tokenizer, splits):
    with pytest.raises(ConfigError, match="max_length must be an integer of 2 tokens or more"):
        prepare(splits, "text-classification", tokenizer, max_length=max_length)


@pytest.mark.parametrize("known", ["512", None, 1e30, 0, -5])
def test_a_length_that_a_tokenizer_makes_up_counts_for_nothing(known, tokenizer, splits):
    expected = prepare(splits, "text-classification", tokenizer).train[:]
    tokenizer.model_max_length = known
    assert prepare(splits, "text-classification", tokenizer).train[:] == expected


def test_a_text_that_is_far_too_long_has_the_tokens_of_the_whole(tokenizer):
    """Also where what begins it gives no tokens, or it is cut on its left."""
    texts = ["w1 w2 " * 5000, " " * 20_000 + "w3 w4 w5 w6", "w1" + " " * 20_000 + "w2 w3 w4", "w5 " * 9000 + "w6"]
    data = rows(4, text=texts, label=["a", "b"] * 2)
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        expected = [tokenizer(text, truncation=True, max_length=4)["input_ids"] for text in texts]
        ready = prepare({"train": data, "test": data}, "text-classification", tokenizer, max_length=4)
        assert list(ready.train["input_ids"]) == expected
    assert expected[3][-1] == tokenizer.convert_tokens_to_ids("w6")


def test_of_a_text_that_is_far_too_long_the_head_is_read(tokenizer, monkeypatch):
    longest = []
    call = transformers.PreTrainedTokenizerFast.__call__

    def counted(self, text=None, *others, **options):
        longest.append(max(map(len, text or options.get("text_target"))))
        return call(self, text, *others, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", counted)
    data = rows(2, text=["w1 " * 50_000, "w2"], label=["w3 " * 50_000, "w4"])
    prepare({"train": data, "test": data}, "text-classification", tokenizer, max_length=4)
    prepare({"train": data, "test": data}, "seq2seq", tokenizer, max_length=4, target_column="label")
    assert longest and max(longest) <= 4000
