"""Models that read images or sounds beside texts, from files through a recipe to a checkpoint that loads."""

import json

import pytest
import torch
import transformers

from hf_efficient import ConfigError, Recipe, compress
from hf_efficient.data.tasks import TASKS
from hf_efficient.models.loading import load_processor
from hf_efficient.reporting.card import model_card

from ..media import save_images, save_llava, save_sounds, save_wav2vec, save_whisper

TRAINING = {"max_steps": 2, "batch_size": 4}
PRUNE = {"prune": {"ratio": 0.3, "granularity": ["head", "neuron"], "round_to": 4, "calibration_samples": 8}}
DISTILL = {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 1.0}}}


def recipe(folder, task, save, save_rows, *stages, **changes):
    settings = {
        "name": "tiny",
        "task": task,
        "model": {"name_or_path": str(save(folder / "model"))},
        "data": {"name_or_path": str(save_rows(folder)), "max_length": 24},
        "stages": list(stages),
        "measure": {"repeats": 2, "sequence_length": 16},
    }
    return Recipe.from_dict(settings | changes)


@pytest.mark.parametrize(
    ("task", "save", "save_rows", "metric"),
    [
        ("image-text-to-text", save_llava, save_images, "perplexity"),
        ("automatic-speech-recognition", save_whisper, save_sounds, "wer"),
        ("speech-ctc", save_wav2vec, save_sounds, "wer"),
    ],
)
def test_pruned_distilled_and_measured(tmp_path, task, save, save_rows, metric):
    asked = recipe(tmp_path, task, save, save_rows, PRUNE, DISTILL, teacher=TRAINING)
    report = compress(asked, output_dir=tmp_path / "out")
    assert report.student.quality.task == task and report.student.quality.main.name == metric
    assert report.comparison.parameter_ratio < 0.95 and report.processor_class == "AutoProcessor"
    losses = next(stage.facts for stage in report.stages if stage.name.endswith("distill"))
    assert json.dumps(losses)
    [folder] = [path.parent for path in (tmp_path / "out").rglob("*distill*/config.json")]
    model = getattr(transformers, TASKS[task].auto_class).from_pretrained(folder)
    assert sum(each.numel() for each in model.parameters()) == report.student.size.parameters
    assert type(load_processor(folder, whole=True)).__name__ in (
        "LlavaProcessor",
        "WhisperProcessor",
        "Wav2Vec2Processor",
    )
    card = model_card(report)
    assert "AutoProcessor.from_pretrained" in card.text
    assert card.data.pipeline_tag == (TASKS[task].hub_name or task)


def test_a_teacher_teaches_words_that_are_heard(tmp_path):
    """Enough steps that Whisper learns which tone is low, so that the rate of its errors falls."""
    from hf_efficient.data import load_dataset_any, prepare
    from hf_efficient.measurement.quality import evaluate_quality

    processor = load_processor(save_whisper(tmp_path / "model"), whole=True)
    ready = prepare(load_dataset_any(save_sounds(tmp_path)), "automatic-speech-recognition", processor)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "model").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = ready.collator([ready.train[number] for number in range(len(ready.train))])
    before = evaluate_quality(model.eval(), ready.test, ready.collator).quality.main.value
    model.train()
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate_quality(model.eval(), ready.test, ready.collator).quality.main.value
    assert before == pytest.approx(1, abs=0.5) and after < before - 0.2


def test_what_such_a_recipe_cannot_ask_for(tmp_path):
    with pytest.raises(ConfigError, match="existing model with its processor"):
        recipe(tmp_path, "speech-ctc", save_wav2vec, save_sounds, PRUNE, model={"config": {"model_type": "wav2vec2"}})
    with pytest.raises(ConfigError, match="image_size has no meaning"):
        recipe(
            tmp_path / "other",
            "image-text-to-text",
            save_llava,
            save_images,
            PRUNE,
            data={"name_or_path": "rows.jsonl", "image_size": 8},
        )
