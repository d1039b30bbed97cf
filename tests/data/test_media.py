"""Rows with images or sounds and texts: read from files, labelled, padded; and every refusal."""

import json
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.media import Padding
from hf_efficient.data.preparation import prepare
from hf_efficient.data.sounds import read_sound, resampled, samples_of
from hf_efficient.errors import ConfigError, DataError
from hf_efficient.models.loading import load_processor

from ..media import RATE, save_images, save_llava, save_sounds, save_wav2vec, save_whisper, write_wav


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def llava(folder):
    return load_processor(save_llava(folder / "llava"), whole=True)


@pytest.fixture(scope="module")
def wav2vec(folder):
    return load_processor(save_wav2vec(folder / "wav2vec"), whole=True)


@pytest.fixture(scope="module")
def pictures(folder):
    return save_images(folder)


@pytest.fixture(scope="module")
def sounds(folder):
    return save_sounds(folder)


def test_the_answer_alone_is_learned(llava, pictures):
    rows = load_dataset_any(pictures)
    ready = prepare(rows, "image-text-to-text", llava)
    tokenizer, row = llava.tokenizer, ready.train[0]
    said = rows["train"][0]["target"]
    answer = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert row["input_ids"][:4].tolist() == [image] * 4
    assert row["input_ids"][-2:].tolist() == row["labels"][-2:].tolist() == answer
    assert set(row["labels"][:-2].tolist()) == {-100} and row["attention_mask"].all()
    assert row["pixel_values"].shape == (3, 16, 16)
    assert ready.num_labels is None


def test_rows_are_padded_on_the_side_of_the_tokenizer(llava):
    samples = [
        {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6], "pixel_values": np.zeros((3, 2, 2))},
        {"input_ids": [7], "attention_mask": [1], "labels": [7], "pixel_values": np.ones((3, 2, 2))},
    ]
    pad = Padding(llava)
    for side, ids, labels in (("right", [7, 0], [7, -100]), ("left", [0, 7], [-100, 7])):
        llava.tokenizer.padding_side = side
        batch = pad(samples)
        assert batch["input_ids"][1].tolist() == ids and batch["labels"][1].tolist() == labels
        assert batch["attention_mask"][1].tolist() == [int(token > 0) for token in ids]
        assert batch["pixel_values"].shape == (2, 3, 2, 2)
    llava.tokenizer.padding_side = "right"


def test_sounds_of_any_length_get_a_mask(wav2vec, sounds):
    ready = prepare(load_dataset_any(sounds), "speech-ctc", wav2vec)
    long, short = sorted(range(len(ready.train)), key=lambda n: -len(ready.train[n]["input_values"]))[
        :: len(ready.train) - 1
    ]
    batch = ready.collator([ready.train[long], ready.train[short]])
    lengths = [len(ready.train[number]["input_values"]) for number in (long, short)]
    assert lengths[0] > lengths[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_values"][1, lengths[1] :].abs().sum() == 0
    assert batch["labels"].min() == -100
    assert ready.collator.decode(batch["labels"], group_tokens=False)[0] in ("low low", "high low")


def test_what_whisper_hears(folder, sounds):
    processor = load_processor(save_whisper(folder / "whisper"), whole=True)
    rows = load_dataset_any(sounds)
    ready = prepare(rows, "automatic-speech-recognition", processor)
    assert ready.train[0]["input_features"].shape == (8, 100)
    batch = ready.collator([ready.train[number] for number in range(3)])
    assert ready.collator.decode(batch["labels"]) == [rows["train"][number]["text"] for number in range(3)]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path, width):
    samples = np.sin(np.arange(50) / 5) * 0.5
    write_wav(tmp_path / "one.wav", samples, width=width)
    read = read_sound((tmp_path / "one.wav").read_bytes(), RATE)
    assert read.dtype == np.float32 and np.abs(read - samples).max() < 1 / (1 << min(8 * width - 2, 20))
    write_wav(tmp_path / "two.wav", np.stack([samples, -samples / 2], 1), width=width)
    assert np.abs(read_sound((tmp_path / "two.wav").read_bytes(), RATE) - samples / 4).max() < 0.02


def test_another_rate_is_resampled():
    time = np.arange(800) / 8000
    tone = np.sin(2 * np.pi * 500 * time)
    wanted = np.sin(2 * np.pi * 500 * np.arange(1600) / 16000)
    assert np.abs(resampled(tone, 8000, 16000) - wanted).max() < 0.01
    assert np.abs(resampled(wanted, 16000, 8000) - tone).max() < 0.01
    given = {"array": (0.5 * tone).tolist(), "sampling_rate": 8000}
    assert samples_of(given, 16000).shape == (1600,)


def test_sounds_in_memory_need_no_file(wav2vec):
    rows = [{"audio": [0.1, -0.1] * 400, "said": "low"}, {"audio": [0.2] * 900, "said": "high"}]
    data = datasets.Dataset.from_list(rows * 2)
    ready = prepare({"train": data, "test": data}, "speech-ctc", wav2vec, target_column="said")
    assert [len(row["input_values"]) for row in ready.train] == [800, 900, 800, 900]


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ("nowhere.wav", r"Row 0, column 'audio': .*there is no sound file '.*nowhere\.wav'"),
        ("http://example.org/a.wav", "Download it"),
        ("noise.bin", "other formats need soundfile|cannot be decoded"),
        ("cut.wav", "cannot be decoded|samples is needed"),
        ([0.5, 2.0], "must lie in -1..1"),
        ([], "where one channel"),
    ],
)
def test_a_sound_that_is_none(tmp_path, wav2vec, sound, message):
    (tmp_path / "noise.bin").write_bytes(b"\x01\x02\x03" * 50)
    (tmp_path / "cut.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"audio": sound, "text": f"low {number}"}) for number in range(4)))
    with pytest.raises(DataError, match=message):
        prepare(load_dataset_any(path), "speech-ctc", wav2vec)


def test_too_many_samples_are_not_decoded(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", np.zeros(100))
    monkeypatch.setattr("hf_efficient.data.sounds.MAX_SAMPLES", 99)
    with pytest.raises(DataError, match="100 samples, at most 99"):
        read_sound((tmp_path / "a.wav").read_bytes(), RATE)


def test_a_rate_that_would_make_too_many_samples_is_refused(monkeypatch):
    sound = {"array": [0.1] * 100, "sampling_rate": 1}
    assert samples_of(sound, 16).shape == (1600,)
    monkeypatch.setattr("hf_efficient.data.sounds.MAX_SAMPLES", 1599)
    with pytest.raises(DataError, match="100 samples at 1 a second would be more than 1,599 at 16"):
        samples_of(sound, 16)


class SoundFile:
    """What soundfile gives of a file, which is one second of a million channels; it is not to be read."""

    frames, channels, samplerate = 16000, 1_000_000, 16000

    def __init__(self, file):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_other_formats_are_not_decoded_either_where_they_are_too_large(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", SimpleNamespace(SoundFile=SoundFile))
    with pytest.raises(DataError, match="16,000,000,000 samples, at most"):
        read_sound(b"fLaC", RATE)


def test_an_image_that_leaves_no_room(llava, pictures):
    with pytest.raises(DataError, match="max_length=8 leaves none for the answer"):
        prepare(load_dataset_any(pictures), "image-text-to-text", llava, max_length=8)
    ready = prepare(load_dataset_any(pictures), "image-text-to-text", llava, max_length=10)
    assert {len(row["input_ids"]) for row in ready.train} == {10}


def test_a_processor_that_reads_something_else(llava, wav2vec, pictures, sounds):
    with pytest.raises(ConfigError, match="has no image_processor"):
        prepare(load_dataset_any(pictures), "image-text-to-text", wav2vec)
    with pytest.raises(ConfigError, match="has no feature_extractor"):
        prepare(load_dataset_any(sounds), "speech-ctc", llava)
    with pytest.raises(ConfigError, match="has no feature_extractor"):
        prepare(load_dataset_any(sounds), "speech-ctc", llava.tokenizer)


def test_a_chat_template_asks(llava, pictures, monkeypatch):
    part = "{{ '<image>' if part.type == 'image' else ' is it ' + part.text }}"
    template = "{% for part in messages[0].content %}" + part + "{% endfor %}"
    monkeypatch.setattr(llava, "chat_template", template)
    ready = prepare(load_dataset_any(pictures), "image-text-to-text", llava)
    asked = llava.tokenizer.convert_ids_to_tokens(ready.train[0]["input_ids"])
    assert asked[4:6] == ["is", "it"] and torch.is_tensor(ready.train[0]["pixel_values"])
