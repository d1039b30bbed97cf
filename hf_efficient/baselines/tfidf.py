"""Words and pairs of words, weighted by how rare they are, and logistic regression: seconds of training.

    x_w = (1 + log count of w in the text) * log((1 + texts) / (1 + texts with w)),  x / |x|

As scikit-learn has it. Kept as a list of terms and three tensors, so that nothing is unpickled.
"""

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..io.disk import write_atomic
from ..io.json import read_json
from ..io.tensors import read_tensors, write_tensors
from ..stages.base import Run
from .base import Baseline, Reader, Texts

TERMS, WEIGHTS = "terms.json", "model.safetensors"
MANY = 1000  # training rows, from which on a term must be in two of them
VECTORS: dict[str, Any] = {"sublinear_tf": True, "ngram_range": (1, 2), "token_pattern": r"\w+|[^\w\s]"}
PENALTIES, FOLDS = (1.0, 3.0, 10.0), 3  # 1 / the weight of the penalty, chosen among training rows
NEVER = -1e4  # the score of a class that no training row has


class TfidfReader(Reader):
    """`idf`: `[terms]`; `weight`: `[classes, terms]`; `bias`: `[classes]`."""

    def __init__(self, terms: list[str], idf: Any, weight: Any, bias: Any):
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().__init__()
        self.vectors = TfidfVectorizer(**VECTORS, vocabulary={term: number for number, term in enumerate(terms)})
        self.vectors.idf_ = idf.double().numpy()
        self.weight, self.bias = weight.double().numpy(), bias.double().numpy()
        self.weight_bytes = 4 * (idf.numel() + weight.numel() + bias.numel())

    def scores(self, texts: Texts) -> torch.Tensor:
        return torch.from_numpy(self.vectors.transform(map(" ".join, texts)) @ self.weight.T + self.bias)


class Tfidf(Baseline):
    """TF-IDF and logistic regression."""

    name = "tfidf"

    def check(self, run: Run) -> None:
        if find_spec("sklearn") is None:
            raise ConfigError(
                "baselines: tfidf needs scikit-learn. Run `pip install scikit-learn`, or leave tfidf out."
            )

    def make(self, run: Run, student: Path, target: Path) -> dict[str, Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        prepared = run.data()
        texts, labels = list(map(" ".join, run.read_texts("train"))), list(prepared.train["labels"])
        vectors = TfidfVectorizer(**VECTORS, min_df=2 if len(texts) >= MANY else 1)
        try:
            inputs = vectors.fit_transform(texts)
        except ValueError as error:  # no text has a word
            raise ConfigError(f"baselines: tfidf cannot read the training texts: {error}. Leave it out.") from error
        terms = vectors.get_feature_names_out().tolist()
        weight, bias = torch.zeros(prepared.num_labels, len(terms)), torch.full((prepared.num_labels,), NEVER)
        if len(set(labels)) == 1:
            bias[labels[0]] = 0.0
        else:
            fitted = self._fitted(inputs, labels, run.recipe.seed)
            classes = torch.as_tensor(fitted.classes_)
            found = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
            if len(classes) == 2:  # one row: the log-odds of the second
                bias[classes[0]], classes = 0.0, classes[1:]
            weight[classes], bias[classes] = found
        tensors = {"idf": torch.from_numpy(vectors.idf_).float(), "weight": weight, "bias": bias}
        write_tensors(target / WEIGHTS, tensors)
        write_atomic(target / TERMS, json.dumps(terms))
        return {"about": "TF-IDF of words and pairs, logistic regression", "terms": len(terms)}

    def _fitted(self, inputs: Any, labels: list[int], seed: int) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        plain = LogisticRegression(max_iter=1000, random_state=seed)
        if min(Counter(labels).values()) < FOLDS:  # a class that not every fold would have
            return plain.fit(inputs, labels)
        return GridSearchCV(plain, {"C": PENALTIES}, cv=FOLDS).fit(inputs, labels).best_estimator_

    def reader(self, run: Run, folder: Path) -> Reader:
        tensors = read_tensors(folder / WEIGHTS)
        return TfidfReader(read_json(folder / TERMS), tensors["idf"], tensors["weight"], tensors["bias"])


TFIDF = Tfidf()
