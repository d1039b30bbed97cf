"""A teacher that takes fewer tokens than its student reads the beginning of each text."""

import pytest
import torch

from hf_efficient.distillation.arguments import DistillationArguments
from hf_efficient.distillation.losses.divergences import log_probabilities
from hf_efficient.distillation.losses.tables import DIVERGENCES
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.errors import ConfigError
from hf_efficient.training.batch import first_tokens

from .tiny import arguments, bert, collate, examples, make_pair

LONG = examples("bert", 12, seed=4)


def padded(side):
    """Rows of 7, 4 and 2 tokens, numbered from 1; 0 is padding."""
    ids = torch.zeros(3, 7, dtype=torch.long)
    for row, count in enumerate((7, 4, 2)):
        place = slice(0, count) if side == "right" else slice(7 - count, 7)
        ids[row, place] = torch.arange(1, count + 1)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_real_tokens_of_each_row_stay(side):
    cut = first_tokens(padded(side), 3)
    short = [0, 1, 2] if side == "left" else [1, 2, 0]
    assert cut["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3], short]
    assert torch.equal(cut["attention_mask"], (cut["input_ids"] > 0).long())
    assert cut["labels"].tolist() == [0, 1, 2]


def test_what_fits_is_left_as_it_is():
    inputs = padded("right")
    assert first_tokens(inputs, 7) is inputs and first_tokens(inputs, 100) is inputs
    del inputs["attention_mask"]
    assert first_tokens(inputs, 2)["input_ids"].tolist() == [[1, 2]] * 3


def make_trainer(folder, **settings):
    student, teacher = make_pair("bert")
    args = arguments(folder, losses={"kd": 1.0}, temperature=1.0, **settings)
    return DistillationTrainer(student, args, teacher=teacher, eval_dataset=LONG, data_collator=collate)


def test_the_loss_compares_the_whole_text_with_its_beginning(tmp_path):
    trainer = make_trainer(tmp_path, teacher_max_length=4)
    batch = collate(LONG)
    assert batch["input_ids"].shape[1] > 4
    beginning = {key: value[:, :4] for key, value in batch.items() if value.dim() == 2}
    with torch.no_grad():
        student = trainer.model.eval()(**{key: value for key, value in batch.items() if value.dim() == 2}).logits
        teacher = trainer.teacher(**beginning).logits
    target, given = (log_probabilities(logits, 1.0, binary=False) for logits in (teacher, student))
    expected = DIVERGENCES["forward"](target, given, 0.5).sum() / len(LONG)
    assert trainer.evaluate()["eval_loss_kd"] == pytest.approx(expected.item(), rel=1e-9)
    whole = make_trainer(tmp_path).evaluate()["eval_loss_kd"]
    assert whole != pytest.approx(expected.item(), rel=1e-3)


def test_a_teacher_with_fewer_positions_can_teach(tmp_path):
    student = make_pair("bert")[0]
    torch.manual_seed(5)
    teacher = bert().double()
    teacher.bert.embeddings.position_embeddings = torch.nn.Embedding(4, 16).double()
    rows = [row for row in LONG if len(row["input_ids"]) > 4]

    def train(**settings):
        args = arguments(tmp_path, losses={"kd": 1.0, "ce": 1.0}, **settings)
        trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, data_collator=collate)
        return trainer.train()

    assert train(teacher_max_length=4).training_loss > 0
    with pytest.raises((IndexError, RuntimeError)):
        train()


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "4"])
def test_a_length_that_is_none_is_refused(length, tmp_path):
    with pytest.raises(ConfigError, match="teacher_max_length must be 1 token or more"):
        DistillationArguments(str(tmp_path), teacher_max_length=length)


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_an_answer_for_each_token_needs_all_tokens(case, tmp_path):
    student, teacher = make_pair(case)
    with pytest.raises(ConfigError, match=r"teacher_max_length=4 is for tasks with one answer for a whole text"):
        DistillationTrainer(student, arguments(tmp_path, teacher_max_length=4), teacher=teacher)


def test_hidden_states_need_all_tokens(tmp_path):
    student, teacher = make_pair("bert")
    args = arguments(tmp_path, losses={"kd": 1.0, "hidden": 1.0}, teacher_max_length=4)
    with pytest.raises(ConfigError, match="Leave `hidden` out of losses"):
        DistillationTrainer(student, args, teacher=teacher)
