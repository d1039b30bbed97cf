"""Rows that a model cannot read are told where their batch is made, by what is wrong with them."""

import copy
import pickle

import pytest
import torch
from transformers import DataCollatorWithPadding, default_data_collator

from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.distillation.collating import CheckedCollator
from hf_efficient.distillation.generation import teacher_texts
from hf_efficient.errors import DataError

from ..pruning.tiny_tokenizers import tokenizer_of
from .caching import make_cache, rows_of
from .tiny import LABELS, VOCABULARY, bert, collate, examples, llama, make_pair, t5
from .training import make_trainer

CASES = ("bert", "llama", "t5")


@pytest.mark.parametrize("case", CASES)
def test_good_rows_are_collated_as_before(case):
    rows = examples(case)
    batch, checked = collate(rows), CheckedCollator(collate, *make_pair(case))(rows)
    assert batch.keys() == checked.keys() and all(torch.equal(batch[name], checked[name]) for name in batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("token", [VOCABULARY, -1, 2**31])
def test_ids_that_no_embedding_has(case, token):
    rows = copy.deepcopy(examples(case))
    rows[1]["input_ids"][0] = token
    with pytest.raises(
        DataError, match=f"input_ids of a batch hold numbers from .*{token}.*; allowed are 0 to {VOCABULARY - 1}"
    ):
        CheckedCollator(collate, *make_pair(case))(rows)


@pytest.mark.parametrize(("case", "count"), [("bert", LABELS), ("llama", VOCABULARY), ("t5", VOCABULARY)])
@pytest.mark.parametrize("below", [True, False])
def test_labels_that_are_none(case, count, below):
    rows, label = copy.deepcopy(examples(case)), -1 if below else count
    if case == "bert":
        rows[0]["labels"] = label
    else:
        rows[0]["labels"][-1] = label
    with pytest.raises(
        DataError, match=f"labels of a batch hold numbers from .*{label}.*; allowed are 0 to {count - 1}"
    ):
        CheckedCollator(collate, *make_pair(case))(rows)


def test_training_is_told_before_a_step(tmp_path):
    rows = copy.deepcopy(examples("bert"))
    rows[0]["labels"] = LABELS
    trainer = make_trainer("bert", tmp_path, losses={"ce": 1.0}, max_steps=1, per_device_train_batch_size=len(rows))
    trainer.train_dataset = rows
    with pytest.raises(DataError, match="labels of a batch"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("make", [lambda rows, folder: cache_teacher(bert(), rows, folder, batch_size=4)])
def test_rows_that_nothing_pads_for_a_cache(make, tmp_path):
    with pytest.raises(DataError, match="data_collator does not make one batch of them"):
        make(rows_of("bert"), tmp_path / "cache")


@pytest.mark.parametrize(("case", "make"), [("llama", llama), ("t5", t5)])
def test_rows_that_nothing_pads_for_a_writing_teacher(case, make):
    with pytest.raises(DataError, match=r"input_ids of \d+ to \d+ tokens.*DataCollatorForSeq2Seq"):
        teacher_texts(make(), rows_of(case), max_new_tokens=2)


def test_another_fault_of_a_collator_is_its_own():
    def broken(rows):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        CheckedCollator(broken, bert())(examples("bert")[:1])


def test_the_tokenizer_of_the_collator_is_still_there_and_saved(tmp_path):
    tokenizer = tokenizer_of("bert")
    padding = DataCollatorWithPadding(tokenizer)
    checked = CheckedCollator(padding, bert())
    assert checked.tokenizer is tokenizer and not hasattr(CheckedCollator(default_data_collator, bert()), "tokenizer")
    assert pickle.loads(pickle.dumps(checked)).ids == checked.ids == VOCABULARY
    student, teacher = make_pair("bert")
    cache = make_cache("bert", tmp_path / "cache", teacher)
    for source in (teacher, cache):
        trainer = make_trainer("bert", tmp_path / "run", pair=(student, source), losses={"kd": 1.0})
        assert trainer.data_collator.collate is not None
        trainer.data_collator = type(checked)(padding, student) if source is teacher else cache.collator(padding)
        trainer.save_model(str(tmp_path / type(source).__name__))
        assert (tmp_path / type(source).__name__ / "tokenizer.json").is_file()
