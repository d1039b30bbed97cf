"""Rows of embeddings, words, masked texts and questions to model inputs, and what is refused of them."""

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from hf_efficient.data.preparation import check_labels, prepare
from hf_efficient.errors import ConfigError, DataError
from hf_efficient.training.batch import Batch, head_of

from .tiny import rows as animals

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = {letter: index for index, letter in enumerate("abcdefghij", len(SPECIAL))}


@pytest.fixture
def tokenizer():
    """A token for each letter; a word is not split by spaces alone: `abc` are three tokens."""
    vocabulary = {name: index for index, name in enumerate(SPECIAL)} | LETTERS
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **{f"{name}_token": token for name, token in names.items()}
    )


def both(**columns):
    rows = datasets.Dataset.from_dict(columns)
    return {"train": rows, "test": rows}


def letters(ids):
    return "".join({index: letter for letter, index in LETTERS.items()}.get(index, "_") for index in ids)


# ---- sentence-embeddings --------------------------------------------------------------------------------------------


def test_both_texts_of_a_pair_are_rows_and_the_test_rows_say_which_belong_together(tokenizer):
    data = both(text=["ab", "cd", "ef"], twin=["a", "  ", "f"])
    ready = prepare(data, "sentence-embeddings", tokenizer, text_pair_column="twin")
    assert [letters(ids) for ids in ready.train["input_ids"]] == ["_ab_", "_a_", "_cd_", "_ef_", "_f_"]
    assert "labels" not in ready.train.column_names and "pair" not in ready.train.column_names
    assert [letters(ids) for ids in ready.test["input_ids"]] == ["_ab_", "_a_", "_ef_", "_f_"]  # no half pairs
    assert list(ready.test["pair"]) == [0, 0, 2, 2]
    batch = ready.collator([ready.test[0], ready.test[1]])
    assert batch["pair"].tolist() == [0, 0] and batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert (ready.num_labels, ready.label_names) == (None, ())
    assert check_labels(transformers.BertConfig(num_labels=7), ready) is None


def test_without_pairs_the_halves_of_a_text_belong_together(tokenizer):
    ready = prepare(both(text=["ab cd ef", "abcd", "a"]), "sentence-embeddings", tokenizer)
    assert [letters(ids) for ids in ready.train["input_ids"]] == ["_abcdef_", "_abcd_", "_a_"]
    assert [letters(ids) for ids in ready.test["input_ids"]] == ["_abcd_", "_ef_", "_ab_", "_cd_"]
    assert list(ready.test["pair"]) == [0, 0, 1, 1]


# ---- token-classification -------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_carries_its_label(tokenizer):
    data = both(tokens=[["ab", "c"], ["def"], []], ner_tags=[["X", "O"], ["Y"], []])
    ready = prepare(data, "token-classification", tokenizer)
    assert ready.label_names == ("O", "X", "Y") and ready.num_labels == 3
    assert [letters(ids) for ids in ready.train["input_ids"]] == ["_abc_", "_def_"]
    assert list(ready.train["labels"]) == [[-100, 1, -100, 0, -100], [-100, 2, -100, -100, -100]]
    short = prepare(data, "token-classification", tokenizer, max_length=4)
    assert short.train["labels"][0] == [-100, 1, -100, -100]  # the second word is cut away
    batch = ready.collator([ready.train[0], prepare(data, "token-classification", tokenizer, max_length=3).train[1]])
    assert batch["labels"].tolist() == [[-100, 1, -100, 0, -100], [-100, 2, -100, -100, -100]]


def test_words_of_a_byte_level_tokenizer_are_tokenised_as_text():
    """Words are separated by the space that the model saw while it was trained, as they would be in running text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.GPT2Tokenizer(vocab=alphabet | {"<|endoftext|>": len(alphabet)}, merges=[])
    data = both(tokens=[["ab", "é", "c"]] * 2, tags=[[3, 4, 3], [4, -100, 3]])
    ready = prepare(data, "token-classification", tokenizer)
    assert ready.train["input_ids"][0] == tokenizer("ab é c")["input_ids"]
    marked = [[label for label in labels if label != -100] for labels in ready.train["labels"]]
    assert marked == [[0, 1, 0], [1, 0]]
    assert [label == -100 for label in ready.train["labels"][0]] == [False, True, True, False, True, True, False]


def test_names_of_class_labels_are_kept(tokenizer):
    feature = datasets.List(datasets.ClassLabel(names=["O", "B", "I"]))
    features = datasets.Features(words=datasets.List(datasets.Value("string")), tags=feature)
    rows = datasets.Dataset.from_dict({"words": [["a", "b"]], "tags": [[2, 0]]}, features=features)
    ready = prepare({"train": rows, "test": rows}, "token-classification", tokenizer)
    assert ready.label_names == ("O", "B", "I") and ready.train["labels"][0] == [-100, 2, 0, -100]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tokens": [["a", "b"], ["a"]], "tags": [["X"], ["Y"]]}, "Row 0 has 2 words in column 'tokens' and 1 labels"),
        ({"tokens": [["a", "b"]], "tags": [[0.5, 1.5]]}, "regression"),
        ({"tokens": [["a", "b"]], "tags": [["X", "X"]]}, "single class X"),
        ({"tokens": [["a", "b"]], "tags": [["X", None]]}, "without a label"),
        ({"tokens": [["a", "b"]], "tags": ["X"]}, "a list with a label for each word"),
        ({"tokens": ["a b"], "tags": [["X", "Y"]]}, "a list of words is needed"),
        ({"tokens": [["a", "b"]], "marks": [["X", "Y"]]}, "usual name .ner_tags, tags, labels.*Name it with label_"),
    ],
)
def test_words_that_cannot_be_used(columns, words, tokenizer):
    with pytest.raises(DataError, match=words):
        prepare(both(**columns), "token-classification", tokenizer)


# ---- masked-lm ------------------------------------------------------------------------------------------------------


def test_test_masks_are_drawn_once_and_train_masks_anew(tokenizer):
    data = both(text=["abcdefghij" * 20] * 4)
    ready, again = (prepare(data, "masked-lm", tokenizer, max_length=50) for _ in range(2))
    assert "labels" not in ready.train.column_names
    assert list(ready.test["input_ids"]) == list(again.test["input_ids"])
    for ids, labels, plain in zip(
        ready.test["input_ids"], ready.test["labels"], ready.train["input_ids"], strict=True
    ):
        restored = [old if label == -100 else label for old, label in zip(ids, labels, strict=True)]
        assert restored == plain  # a label is the token that stood there
    labels = [label for row in ready.test["labels"] for label in row]
    assert 0.1 < sum(label != -100 for label in labels) / len(labels) < 0.2
    assert not {2, 3} & set(labels)  # [CLS] and [SEP] are not masked
    rows = [ready.test[0], ready.test[1]]
    assert torch.equal(ready.collator(rows)["labels"], ready.collator(rows)["labels"])
    rows = [ready.train[0], ready.train[1]]
    first, same, other = (ready.collator(batch) for batch in (rows, rows, rows[::-1]))
    assert torch.equal(first["labels"], same["labels"]) and (first["labels"] != -100).any()  # as if resumed
    assert not torch.equal(first["labels"], other["labels"].flip(0))  # shuffled: other masks of the same texts


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match=r"mask token.*causal-lm"):
        prepare(both(text=["abc"]), "masked-lm", tokenizer)


# ---- question-answering ---------------------------------------------------------------------------------------------


def questions(**changes):
    columns = {
        "question": ["ab", "c"],
        "context": ["de fgh ij", "abc"],
        "answers": [{"text": ["fg", "d"], "answer_start": [3, 0]}, {"text": [], "answer_start": []}],
    }
    return both(**columns | changes)


def test_answers_become_the_tokens_that_hold_them(tokenizer):
    ready = prepare(questions(), "question-answering", tokenizer)
    assert [letters(ids) for ids in ready.train["input_ids"]] == ["_ab_defghij_", "_c_abc_"]
    starts, ends = (list(ready.train[f"{name}_positions"]) for name in ("start", "end"))
    assert (starts, ends) == ([6, 0], [7, 0])  # f and g; no answer: the first token
    cut = prepare(questions(), "question-answering", tokenizer, max_length=9)
    assert letters(cut.train["input_ids"][0]) == "_ab_defg_" and cut.train["end_positions"][0] == 7
    lost = prepare(questions(), "question-answering", tokenizer, max_length=8)
    assert (lost.train["start_positions"][0], lost.train["end_positions"][0]) == (0, 0)
    batch = ready.collator([ready.train[0], ready.train[1]])
    task = head_of(transformers.BertForQuestionAnswering(transformers.BertConfig(num_hidden_layers=1, vocab_size=20)))
    assert Batch(batch, task).label_targets()[0].tolist() == [[6, 7], [0, 0]]


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({}, {"max_length": 4}, DataError, "no room for a context"),
        ({"answers": ["fg", "a"]}, {}, DataError, "layout of SQuAD"),
        ({"answers": [{"text": ["fg"], "answer_start": [90]}] * 2}, {}, DataError, "outside of its context"),
        ({"context": [None, "a"]}, {}, DataError, "Row 0 has None in the text column 'context'"),
        ({}, {"context_column": "contxt"}, DataError, "Did you mean 'context'"),
    ],
)
def test_questions_that_cannot_be_used(changes, options, error, words, tokenizer):
    with pytest.raises(error, match=words):
        prepare(questions(**changes), "question-answering", tokenizer, **options)


def test_tokenizers_that_cannot_be_used(tokenizer):
    tokenizer.padding_side = "left"
    with pytest.raises(ConfigError, match="padding_side='right'"):
        prepare(questions(), "question-answering", tokenizer)
    assert len(prepare({"train": animals(), "test": animals()}, "sentence-embeddings", tokenizer).train) == 30
