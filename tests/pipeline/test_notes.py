"""What a report tells its reader of the stages, and in which order."""

import dataclasses

import pytest

from hf_efficient import Recipe
from hf_efficient.pipeline.report import _notes
from hf_efficient.reporting.schema import StageRecord

from ..reporting.samples import sample_report

SMALLER = {"batch_size_used": 4, "gradient_accumulation_steps": 4}
FACTS = {
    "teacher": SMALLER,
    "distill": SMALLER,
    "vocabulary": {"tokens_before": 3000, "tokens_after": 2000},
    "quantize": {},
    "export": {"format": "torch", "quantize": None, "same_prediction": 0.5},
}
BEGINNINGS = {
    "vocabulary": "The tokenizer has 2,000 of 3,000 tokens",
    "quantize": "Weights of 8 or 4 bits",
    "teacher": "Memory did not hold the batches of stage teacher",
    "distill": "Memory did not hold the batches of stage distill",
    "export": "The export torch predicts the same as the model itself in only 50%",
}


@pytest.mark.parametrize("last", [{"quantize": {}}, {"export": {"format": "torch"}}])
def test_of_the_model_then_of_its_training_then_of_exports(last):
    stages = [{"distill": {}}, {"vocabulary": {}}, last]
    data = {"name_or_path": "bundled:bbc-news"}
    recipe = Recipe.from_dict(
        {"name": "notes", "task": "text-classification", "model": {"name_or_path": "me/bert"}, "data": data}
        | {"teacher": {}, "stages": stages}
    )
    names = ["teacher", *(step.name for step in recipe.stages)]
    dense = sample_report().student.size
    dense = dataclasses.replace(dense, nonzero_parameters=dense.parameters)
    sparse = dataclasses.replace(dense, nonzero_parameters=dense.parameters // 2)
    records = [StageRecord(name, 1.0, facts=FACTS[name]) for name in names]
    notes = _notes(recipe, records, dataclasses.replace(sample_report().student, size=dense))
    assert len(notes) == len(names)
    for note, beginning in zip(notes, [text for name, text in BEGINNINGS.items() if name in names], strict=True):
        assert note.startswith(beginning)
    assert _notes(recipe, records, dataclasses.replace(sample_report().student, size=sparse))[0].startswith(
        "50% of the parameters are zero"
    )
    assert _notes(recipe, records, dataclasses.replace(sample_report().student, size=sparse))[1:] == notes
