"""TF-IDF: what is read again from its files answers as scikit-learn does, and a class without rows is never said."""

from types import SimpleNamespace

import pytest
import torch

from hf_efficient.baselines.base import evaluate_reader
from hf_efficient.baselines.tfidf import PENALTIES, TERMS, TFIDF, VECTORS, WEIGHTS
from hf_efficient.errors import ConfigError

TEXTS = ["a fine film", "fine acting, fine!", "a dull film", "dull, dull, dull", "a film of films", "films and more"]


def run_of(texts, labels, classes):
    rows = [(text,) if isinstance(text, str) else text for text in texts]
    prepared = SimpleNamespace(train={"labels": labels}, num_labels=classes)
    return SimpleNamespace(read_texts=lambda split: rows, data=lambda: prepared, recipe=SimpleNamespace(seed=0))


def made(folder, labels, classes, texts=TEXTS):
    run = run_of(texts, labels, classes)
    facts = TFIDF.make(run, None, folder)
    assert facts["about"] and {path.name for path in folder.iterdir()} == {TERMS, WEIGHTS}
    return TFIDF.reader(run, folder)


@pytest.mark.parametrize("labels", [[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]])
def test_it_answers_as_scikit_learn(tmp_path, labels):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    reader = made(tmp_path, labels, max(labels) + 1)
    vectors = TfidfVectorizer(**VECTORS)
    inputs = vectors.fit_transform(TEXTS)
    if len(set(labels)) == 2:  # three of each: the penalty that is best on training rows held out in turn
        score = {c: cross_val_score(LogisticRegression(C=c), inputs, labels, cv=3).mean() for c in PENALTIES}
        penalty = max(PENALTIES, key=score.__getitem__)
    else:
        penalty = 1.0
    expected = LogisticRegression(C=penalty).fit(inputs, labels)
    others = [*TEXTS, "fine and dull", "never seen"]
    found = torch.softmax(reader([(text,) for text in others]).logits, -1)
    told = torch.from_numpy(expected.predict_proba(vectors.transform(others)))
    assert torch.allclose(found, told, atol=1e-5) and found.argmax(-1)[:6].tolist() == labels
    assert not torch.allclose(found[0], found[2], atol=0.1)
    classes, terms = reader.weight.shape
    assert reader.weight_bytes == 4 * (classes * terms + terms + classes)


def test_classes_without_rows_are_never_said(tmp_path):
    (tmp_path / "two").mkdir()
    two = made(tmp_path / "two", [3, 3, 1, 1, 3, 1], 5)
    assert two([(text,) for text in TEXTS]).logits.argmax(-1).tolist() == [3, 3, 1, 1, 3, 1]
    assert set(two([("never",)]).logits.topk(2).indices[0].tolist()) == {1, 3}
    (tmp_path / "one").mkdir()
    one = made(tmp_path / "one", [2] * 6, 3)
    assert one([("fine",), ("",)]).logits.argmax(-1).tolist() == [2, 2]


def test_both_texts_of_a_pair_are_read(tmp_path):
    reader = made(tmp_path, [0, 0, 1, 1, 0, 1], 2, [(text, "") for text in TEXTS])
    assert torch.equal(reader([("fine", "")]).logits, reader([("", "fine")]).logits)
    assert not torch.equal(reader([("fine", "")]).logits, reader([("", "dull")]).logits)


def test_texts_without_a_word_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tfidf cannot read the training texts"):
        TFIDF.make(run_of(["", " "], [0, 1], 2), None, tmp_path)


def test_it_is_scored_as_any_classifier(tmp_path):
    labels = [1, 1, 0, 0, 1, 0]
    reader = made(tmp_path, labels, 2)
    found = evaluate_reader(reader, [(text,) for text in TEXTS], labels, batch_size=4)
    wrong = evaluate_reader(reader, [(text,) for text in TEXTS], [1 - label for label in labels])
    assert found.quality.main.value == 1 and wrong.quality.main.value == 0
    assert found.predictions.tolist() == labels and found.quality.largest_class == 0.5
