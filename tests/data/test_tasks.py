"""A task is one entry of one table: one that is added from outside is prepared, scored and described."""

from dataclasses import replace

import torch

from hf_efficient.data.preparation import prepare
from hf_efficient.data.tasks import TASKS
from hf_efficient.measurement.quality import evaluate_quality, task_of
from hf_efficient.reporting.card import model_card

from ..measurement.models import bert_classifier
from ..reporting.samples import STUDENT, sample_report
from .tiny import rows


def test_a_task_added_from_outside_is_prepared_scored_and_described(monkeypatch, tokenizer):
    entailment = replace(
        TASKS["text-classification"],
        columns=("text", "text_pair", "label"),
        optional=(),
        usual={"text": ("premise",), "text_pair": ("hypothesis",)},
        hub_name="zero-shot-classification",
        sample='"A premise.", "A hypothesis."',
    )
    monkeypatch.setitem(TASKS, "entailment", entailment)

    pairs = rows(12).rename_column("text", "premise").add_column("hypothesis", [f"w{n}" for n in range(12)])
    ready = prepare({"train": pairs, "test": pairs}, "entailment", tokenizer)
    assert ready.train[0]["input_ids"] == tokenizer("w0 w1 w2", "w0")["input_ids"]
    model = bert_classifier()
    quality = evaluate_quality(model, ready.test, ready.collator, "entailment").quality
    with torch.no_grad():
        right = model(**ready.collator(ready.test.to_list())).logits.argmax(-1) == torch.tensor(ready.test["labels"])
    assert (quality.task, quality.main.name, quality.main.value) == ("entailment", "accuracy", right.double().mean())
    card = model_card(sample_report(student=replace(STUDENT, quality=quality)))
    assert card.data.pipeline_tag == "zero-shot-classification"
    assert 'processor("A premise.", "A hypothesis.", return_tensors="pt")' in card.text
    assert task_of(model) == "text-classification"  # what the class alone says stays the first that fits
