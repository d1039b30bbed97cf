"""Word errors and the loss of speech against definitions written out by hand; zero-shot agreement."""

import math

import pytest
import torch
import transformers

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import prepare
from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.measurement.quality import compare_quality, evaluate_quality, task_of
from hf_efficient.measurement.speech import word_errors
from hf_efficient.measurement.zero_shot import zero_shot_agreement
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.models.loading import load_model, load_processor

from ..media import save_llava, save_sounds, save_wav2vec, save_whisper


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def sounds(folder):
    return load_dataset_any(save_sounds(folder))


@pytest.mark.parametrize(
    ("heard", "said", "errors", "words"),
    [
        ("a b c", "a b c", 0, 3),
        ("a x c", "a b c", 1, 3),
        ("a c", "a b c", 1, 3),
        ("a b b c", "a b c", 1, 3),
        ("", "a b c", 3, 3),
        ("a b", "", 2, 0),
        ("b c d a", "a b c d", 2, 4),
        ("  A\tb ", "a b", 1, 2),
    ],
)
def test_word_errors(heard, said, errors, words):
    assert word_errors(heard, said) == (errors, words)


def test_ctc_is_scored_by_hand(folder, sounds):
    processor = load_processor(save_wav2vec(folder / "wav2vec"), whole=True)
    ready = prepare(sounds, "speech-ctc", processor)
    model = load_model("AutoModelForCTC", folder / "wav2vec").eval()
    assert task_of(model) == "speech-ctc"
    result = evaluate_quality(model, ready.test, ready.collator, batch_size=3)
    losses, errors, words, tokens = [], 0, 0, 0
    for row, said in zip(ready.test, sounds["test"]["text"], strict=True):
        labels = torch.as_tensor(row["labels"])[None]
        with torch.no_grad():
            output = model(torch.as_tensor(row["input_values"])[None], labels=labels)
        losses.append(output.loss.item())  # summed over the tokens
        heard = processor.batch_decode(output.logits.argmax(-1))[0]
        errors, words = errors + word_errors(heard, said)[0], words + len(said.split())
        tokens += labels.shape[1]
    wer, loss = result.quality.scores
    assert (wer.name, wer.higher_is_better, loss.name) == ("wer", False, "loss")
    assert wer.value == pytest.approx(errors / words)
    assert result.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert loss.value == pytest.approx(sum(losses) / tokens, rel=1e-4)
    assert result.quality.targets == words and result.quality.samples == len(ready.test)
    same = compare_quality(result, result)
    assert (same.name, same.difference, same.standard_error, same.agreement) == (
        "wer",
        0,
        0,
        1,
    )


def test_what_whisper_says_is_compared_with_what_was_said(folder, sounds, monkeypatch):
    processor = load_processor(save_whisper(folder / "whisper"), whole=True)
    ready = prepare(sounds, "automatic-speech-recognition", processor)
    model = load_model("AutoModelForSpeechSeq2Seq", folder / "whisper").eval()
    assert task_of(model) == "automatic-speech-recognition"
    silent = evaluate_quality(model, ready.test, ready.collator)
    said = sounds["test"]["text"]
    answers = iter(["low", *said[1:]])
    expected = word_errors("low", said[0])[0] / sum(len(text.split()) for text in said)

    def generate(**inputs):
        assert set(inputs) >= {"input_features", "max_new_tokens"}
        texts = [next(answers) for _ in inputs["input_features"]]
        ids = [torch.tensor(processor.tokenizer(text)["input_ids"]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(ids, True, processor.tokenizer.pad_token_id)

    monkeypatch.setattr(model, "generate", generate)
    result = evaluate_quality(model, ready.test, ready.collator, batch_size=2)
    assert result.quality.main.value == pytest.approx(expected)
    assert torch.equal(result.loss, silent.loss)  # of the right tokens, whatever it says
    difference = compare_quality(silent, result)
    assert difference.difference == pytest.approx(expected - silent.quality.main.value)
    assert difference.samples == len(said)
    change = (result.correct - expected * result.count) - (silent.correct - silent.quality.main.value * silent.count)
    error = math.sqrt(len(said) / (len(said) - 1) * (change**2).sum()) / result.count.sum()
    assert difference.standard_error == pytest.approx(error)
    with pytest.raises(ConfigError, match="prepare"):
        evaluate_quality(model, ready.test, lambda rows: ready.collator(rows), "automatic-speech-recognition")


def test_dummy_inputs_of_sounds_and_of_images_in_texts(folder):
    model = load_model("AutoModelForCTC", save_wav2vec(folder / "wav2vec")).eval()
    inputs = dummy_inputs(model, 2)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"input_values": (2, 16_000)}
    model(**inputs)
    model = load_model("AutoModelForImageTextToText", save_llava(folder / "llava")).eval()
    inputs = dummy_inputs(model, 2, 7)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 4 + 7)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [4, 4]
    assert model(**inputs).logits.shape[:2] == (2, 11)


# ---- zero-shot agreement --------------------------------------------------------------------------------------------


def make_clip(seed: int) -> transformers.CLIPModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 20, "eos_token_id": 1, "max_position_embeddings": 8},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


def read(text, images, **options):
    ids = torch.tensor([[3 + len(one) % 17, 3 + ord(one[0]) % 17, 1] for one in text])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(images)}


def test_agreement_is_how_often_the_best_text_is_the_same():
    teacher, student = make_clip(0), make_clip(1)
    images = list(torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    texts = ["cat", "a dog", "eels", "the bird"]
    assert zero_shot_agreement(teacher, teacher, read, images, texts).value == 1
    score = zero_shot_agreement(student, teacher, read, images, texts, batch_size=5)
    with torch.no_grad():
        best = [model(**read(texts, images)).logits_per_image.argmax(-1) for model in (student, teacher)]
    expected = (best[0] == best[1]).double().mean().item()
    assert score.value == pytest.approx(expected) and score.name == "zero_shot_agreement" and score.higher_is_better
    assert score.standard_error == pytest.approx(math.sqrt(expected * (1 - expected) / 24))
    for pictures, words in (([], texts), (images, ["cat"]), (images, ["cat", "cat"])):
        with pytest.raises(DataError, match="two or more texts that differ"):
            zero_shot_agreement(student, teacher, read, pictures, words)
    with pytest.raises(UnsupportedModelError, match="does not compare texts with images"):
        zero_shot_agreement(
            transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1)), teacher, read, images, texts
        )
