"""Rows of nearly one length stand together: less padding, the same answers, the same run after a stop."""

import copy

import datasets
import pytest
import torch
from transformers import BertForSequenceClassification

from hf_efficient import ConfigError, Recipe, cache_teacher
from hf_efficient.data.tasks import TASKS
from hf_efficient.measurement.quality import evaluate_quality
from hf_efficient.stages.fit import training_arguments
from hf_efficient.stages.settings import TrainingSettings
from hf_efficient.training import lengths
from hf_efficient.training.lengths import GroupedSampler, in_batches, longest_first, row_lengths

from ..distillation.tiny import collate, examples, make_pair
from ..distillation.training import make_trainer, weights
from ..measurement.models import bert_classifier
from ..pipeline.tiny import TINY

LENGTHS = [3, 9, 3, 7, 12, 3, 9, 5, 8, 4, 11, 6]


def rows(lengths=LENGTHS, classes=3):
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(5, 40, (length,), generator=generator).tolist(), "labels": place % classes}
        for place, length in enumerate(lengths)
    ]


def padding(batches, lengths):
    return 1 - sum(lengths) / sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


def test_lengths_are_seen_without_making_the_rows():
    data = datasets.Dataset.from_list(rows())
    assert row_lengths(rows()) == row_lengths(data) == LENGTHS
    chosen = data.shuffle(seed=1).select(range(5))
    assert row_lengths(chosen) == [len(row["input_ids"]) for row in chosen]
    assert row_lengths(datasets.Dataset.from_dict({"pixel_values": [[1.0], [2.0]]})) is None
    assert row_lengths(torch.utils.data.TensorDataset(torch.ones(3))) is None


def test_the_longest_come_first_and_equals_stay_in_order():
    assert longest_first(rows()) == [4, 10, 1, 6, 8, 3, 11, 7, 9, 0, 2, 5]
    assert longest_first(rows([5] * 4)) == [0, 1, 2, 3]
    assert in_batches(range(5), 2) == [[0, 1], [2, 3], [4]]


def test_a_fraction_of_the_padding():
    long = torch.randint(2, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    random = torch.randperm(400, generator=torch.Generator().manual_seed(0)).split(8)
    drawn = [*GroupedSampler(8, long, seed=0)]
    grouped = [drawn[start : start + 8] for start in range(0, 400, 8)]
    assert sorted(drawn) == [*range(400)] and long[drawn[0]] == max(long)
    assert padding([batch.tolist() for batch in random], long) > 0.3
    assert padding(grouped, long) < 0.1 and padding(in_batches(rows(long), 8), long) < 0.03


def test_the_order_follows_from_seed_and_epoch():
    first, again, other = (GroupedSampler(2, [*range(300)], seed) for seed in (1, 1, 2))
    torch.manual_seed(4)
    drawn = [*first]
    torch.manual_seed(5)
    assert drawn == [*again] != [*other]
    again.set_epoch(1)
    assert drawn != [*again]


@pytest.mark.parametrize("task", ["text-classification", "sentence-embeddings"])
def test_evaluation_gives_the_same_in_the_order_of_the_rows(monkeypatch, task):
    torch.manual_seed(0)
    model, data = bert_classifier().eval(), rows()
    if task == "sentence-embeddings":
        model, data = model.bert, [{**row, "pair": place // 2} for place, row in enumerate(data)]
        data = [{name: value for name, value in row.items() if name != "labels"} for row in data]
    seen = []

    def collated(samples):
        seen.append([len(row["input_ids"]) for row in samples])
        batch = collate(
            [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in samples]
        )
        return batch | {
            name: torch.tensor([row[name] for row in samples]) for name in ("labels", "pair") if name in samples[0]
        }

    grouped = evaluate_quality(model, data, collated, task, batch_size=4)
    assert seen == [[12, 11, 9, 9], [8, 7, 6, 5], [4, 3, 3, 3]]
    monkeypatch.setattr(lengths, "row_lengths", lambda rows: None)
    plain = evaluate_quality(model, data, collated, task, batch_size=4)
    assert [len(batch) for batch in seen[3:]] == [4, 4, 4] and seen[3] == LENGTHS[:4]
    assert torch.allclose(grouped.loss, plain.loss, atol=1e-6) and grouped.loss.unique().numel() > 3
    assert torch.equal(grouped.predictions, plain.predictions) and torch.equal(grouped.targets, plain.targets)


SETTINGS = {
    "losses": {"ce": 1.0},
    "max_steps": 16,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 3,
}


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    whole = make_trainer("bert", tmp_path / "run", **SETTINGS)
    whole.train()
    assert isinstance(whole.get_train_dataloader().batch_sampler.sampler, GroupedSampler)
    for checkpoint in ("checkpoint-3", "checkpoint-9"):  # within the first epoch of 8 steps, and the second
        torch.manual_seed(99)
        resumed = make_trainer("bert", tmp_path / "run", **SETTINGS)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        assert torch.equal(weights(resumed.model), weights(whole.model))
    random = make_trainer("bert", tmp_path / "random", **SETTINGS | {"train_sampling_strategy": "random"})
    random.train()
    assert not torch.equal(weights(random.model), weights(whole.model))


def test_predict_keeps_the_order_of_the_rows(tmp_path):
    grouped = make_trainer("bert", tmp_path / "grouped", **SETTINGS)
    data = examples("bert", 9)
    logits = grouped.predict(data).predictions
    with torch.no_grad():
        expected = torch.cat(
            [grouped.model(**{k: v for k, v in collate([row]).items() if k != "labels"}).logits for row in data]
        )
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)


def test_a_cache_has_its_rows_in_their_places(tmp_path, monkeypatch):
    _, teacher = make_pair("bert")
    assert isinstance(teacher, BertForSequenceClassification)
    data = datasets.Dataset.from_list(examples("bert", 12))
    grouped = cache_teacher(teacher, data, tmp_path / "grouped", data_collator=collate, batch_size=4, shard_size=5)
    monkeypatch.setattr(lengths, "row_lengths", lambda rows: None)
    plain = cache_teacher(teacher, data, tmp_path / "plain", data_collator=collate, batch_size=4, shard_size=5)
    cache_teacher(
        teacher, data, tmp_path / "grouped", data_collator=collate, batch_size=3, shard_size=5
    )  # known again
    assert len(grouped) == len(plain) == 12
    for name in sorted(path.name for path in (tmp_path / "grouped").iterdir() if path.is_dir()):
        ours, theirs = (datasets.load_from_disk(str(tmp_path / each / name)) for each in ("grouped", "plain"))
        assert list(ours["key"]) == list(theirs["key"]) and len(set(ours["key"])) == len(ours)
        assert torch.allclose(torch.tensor(ours["logits"]), torch.tensor(theirs["logits"]), atol=1e-6)


class FakeRun:
    def __init__(self, task):
        self.task, self.recipe = TASKS[task], Recipe.from_dict(copy.deepcopy(TINY))


@pytest.mark.parametrize(
    ("task", "settings", "strategy"),
    [
        ("text-classification", {}, "group_by_length"),
        ("seq2seq", {}, "group_by_length"),
        ("text-classification", {"group_by_length": False}, "random"),
        ("causal-lm", {}, "random"),
        ("masked-lm", {}, "random"),
        ("image-classification", {}, "random"),
    ],
)
def test_recipes_group_texts_and_leave_blocks_and_images(tmp_path, task, settings, strategy):
    from transformers import TrainingArguments

    made = training_arguments(TrainingArguments, FakeRun(task), TrainingSettings(**settings), tmp_path, 4)
    assert made.train_sampling_strategy == strategy


def test_it_is_written_only_where_rows_are_drawn_at_random():
    recipe = Recipe.from_dict(copy.deepcopy(TINY))
    assert "group_by_length" not in recipe.to_dict()["teacher"]
    asked = recipe.with_overrides({"distill.group_by_length": "false"})
    assert Recipe.from_dict(asked.to_dict()) == asked != recipe
    with pytest.raises(ConfigError, match="group_by_length must be true or false"):
        recipe.with_overrides({"teacher.group_by_length": "3"})
