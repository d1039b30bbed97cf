"""On-policy steps and sequence-level targets: who writes what, and what of it counts."""

import datasets
import pytest
import torch

from hf_efficient.distillation.generation import teacher_texts, write
from hf_efficient.errors import ConfigError
from hf_efficient.training.batch import Batch, head_of

from .caching import collate_rows, make_cache, rows_of
from .tiny import bert, collate, examples, make_pair
from .training import make_trainer, weights


def stopping(case, model):
    """One of the tokens that it writes third becomes the one that ends a text."""
    free = write(model.eval(), Batch(collate(examples(case)), head_of(model)), max_new_tokens=6, sampling=None)
    labels = free["labels"][0]
    model.generation_config.eos_token_id = int(labels[labels != -100][2])
    return model


def greedy(model, ids, count):
    """Token by token, without a cache or a batch."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids


def prompt_of(row):
    """What comes before the first label, or half of the text."""
    size = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][: size or max(1, len(row["input_ids"]) // 2)]


def test_a_causal_student_goes_on_from_its_prompts():
    student = stopping("llama", make_pair("llama")[0])
    rows = examples("llama")
    inputs = write(student, Batch(collate(rows), head_of(student)), max_new_tokens=6, sampling=None)
    lengths = set()
    for index, row in enumerate(rows):
        prompt = prompt_of(row)
        expected = greedy(student, prompt, 6)
        real = inputs["attention_mask"][index].bool()
        assert inputs["input_ids"][index][real].tolist() == expected
        assert inputs["labels"][index][real].tolist() == [-100] * len(prompt) + expected[len(prompt) :]
        assert (inputs["labels"][index][~real] == -100).all()
        lengths.add(len(expected) - len(prompt))
    assert len(lengths) > 1  # some stopped


def test_a_seq2seq_student_answers_its_inputs():
    student = stopping("t5", make_pair("t5")[0])
    rows = examples("t5")
    inputs = write(student, Batch(collate(rows), head_of(student)), max_new_tokens=6, sampling=None)
    for index, row in enumerate(rows):
        answer = [student.config.decoder_start_token_id]
        for _ in range(6):
            given = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": torch.tensor([answer])}
            answer.append(int(student(**given).logits[0, -1].argmax()))
            if answer[-1] == student.generation_config.eos_token_id:
                break
        labels = inputs["labels"][index]
        assert labels[labels != -100].tolist() == answer[1:]


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_on_policy_steps_are_trained_on_what_the_student_wrote(case, tmp_path):
    """Equal to a step on the written batch; another step than that on the data; mode and seed put back."""
    settings = {"losses": {"kd": 1.0}, "max_new_tokens": 5, "learning_rate": 0.5}
    student, teacher = make_pair(case)
    stopping(case, student).train()
    trainer = make_trainer(case, tmp_path, pair=(student, teacher), on_policy=1.0, **settings)
    seen = []
    plain = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or plain(model, inputs, **kwargs)
    trainer.train()
    (inputs,) = seen
    assert student.training
    assert (inputs["labels"] != -100).sum(1).max() <= 5
    again = make_trainer(case, tmp_path, **settings)
    again.prepare_step = lambda batches, device: [inputs]
    again.train()
    off = make_trainer(case, tmp_path, **settings)
    off.train()
    assert torch.equal(weights(again.model), weights(trainer.model))
    assert not torch.allclose(weights(off.model), weights(trainer.model))


def test_a_fraction_of_the_steps_is_on_policy(tmp_path):
    """The same steps in every run, whatever was drawn before."""
    counts = {}
    for fraction in (0.0, 0.5, 1.0):
        trainer = make_trainer("llama", tmp_path, losses={"kd": 1.0}, max_new_tokens=2, on_policy=fraction)
        batch = collate(examples("llama", 2))
        changed = []
        for trainer.state.global_step in range(40):
            torch.manual_seed(trainer.state.global_step)
            changed.append(trainer.prepare_step([batch], trainer.args.device)[0] is not batch)
        counts[fraction] = changed
    assert sum(counts[0.0]) == 0 and sum(counts[1.0]) == 40
    assert 10 <= sum(counts[0.5]) <= 30


def test_resuming_on_policy_equals_not_having_stopped(tmp_path):
    settings = {
        "losses": {"kd": 1.0},
        "on_policy": 0.6,
        "max_new_tokens": 3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    straight = make_trainer("llama", tmp_path / "run", **settings)
    straight.train()
    again = make_trainer("llama", tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(straight.model))


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_sequence_level_labels_are_the_teachers_texts(case, tmp_path):
    teacher = stopping(case, make_pair(case)[1])
    rows = teacher_texts(
        teacher, rows_of(case), data_collator=collate_rows, max_new_tokens=5, num_beams=1, batch_size=3
    )
    assert isinstance(rows, datasets.Dataset) and len(rows) == 16
    if case == "llama":
        for row, source in zip(rows, examples(case), strict=True):
            prompt = prompt_of(source)
            expected = greedy(teacher, prompt, 5)
            assert row["input_ids"] == expected
            assert row["labels"] == [-100] * len(prompt) + expected[len(prompt) :]
    trainer = make_trainer(case, tmp_path, rows=list(rows), losses={"ce": 1.0}, max_steps=5, learning_rate=0.2)
    first = trainer.compute_loss(trainer.model, collate(list(rows))).item()
    trainer.train()
    assert trainer.compute_loss(trainer.model, collate(list(rows))).item() < first


def test_beams_find_likelier_texts():
    teacher = stopping("llama", make_pair("llama")[1])

    def likelihood(beams):
        rows = teacher_texts(teacher, rows_of("llama"), data_collator=collate_rows, max_new_tokens=4, num_beams=beams)
        batch = collate(list(rows))
        with torch.no_grad():
            return -teacher(**batch).loss.item()

    assert likelihood(4) > likelihood(1)


def test_what_cannot_write(tmp_path):
    for settings, message in (
        ({"losses": {"kd": 1.0, "ce": 1.0}}, "`ce`"),
        ({"losses": {"kd": 1.0}, "on_policy": 1.5}, "from 0 to 1"),
        ({"losses": {"kd": 1.0}, "max_new_tokens": 0}, "max_new_tokens"),
        ({"losses": {"kd": 1.0}, "sampling_temperature": 0.0}, "sampling_temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer("llama", tmp_path, **{"on_policy": 0.5} | settings)
    with pytest.raises(ConfigError, match="models that write"):
        make_trainer("bert", tmp_path, losses={"kd": 1.0}, on_policy=0.5)
    with pytest.raises(ConfigError, match="models that write"):
        teacher_texts(bert(), rows_of("bert"))
    student, teacher = make_pair("llama")
    cache = make_cache("llama", tmp_path / "cache", teacher)
    with pytest.raises(ConfigError, match="the teacher itself"):
        make_trainer("llama", tmp_path, pair=(student, cache), losses={"kd": 1.0}, on_policy=0.5)
