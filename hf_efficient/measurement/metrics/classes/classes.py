"""The usual scores of classes for `evaluate.load`: the `evaluate` package ships no metric and fetches them.

    metric = evaluate.load(str(files("hf_efficient.measurement") / "metrics" / "classes"), "f1")
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])        # {"f1": 0.667}

Defined as in scikit-learn and SciPy. `average`: `binary` scores class 1, `macro` takes the mean over the classes that
occur. The last four take classes for numbers, such as stars.
`evaluate` reads the imports of this file line by line: one module on each line.
"""

import datasets
import evaluate
import numpy as np


def confusion(predictions, references):
    """[classes, classes]: how often each class (row) was taken for each (column)."""
    classes, places = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    true, said = np.split(places, 2)
    return classes, np.bincount(true * len(classes) + said, minlength=len(classes) ** 2).reshape(2 * (len(classes),))


def by_class(share):
    """A score of each class, averaged; a class that it does not define counts as 0."""

    def compute(predictions, references, average):
        classes, table = confusion(predictions, references)
        scores = share(table.diagonal(), table.sum(0), table.sum(1))
        return scores[classes == 1].sum() if average == "binary" else scores.mean()

    return compute


def over(part, whole):
    return part / np.maximum(whole, 1)


def matthews(predictions, references, average):
    """The correlation of the two columns of classes (Gorodkin 2004); 0 where one of them has a single class."""
    _, table = confusion(predictions, references)
    said, true, n = table.sum(0).astype(float), table.sum(1).astype(float), float(table.sum())
    spread = (n**2 - said @ said) * (n**2 - true @ true)
    return (table.trace() * n - true @ said) / np.sqrt(spread) if spread else 0.0


def pearson(predictions, references, average):
    with np.errstate(invalid="ignore"):  # one value alone has no correlation: nan
        return np.corrcoef(predictions, references)[0, 1]


def ranks(values):
    """Equal values share the mean of their places."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


SCORES = {
    "accuracy": lambda predictions, references, average: np.mean(predictions == references),
    "precision": by_class(lambda right, said, true: over(right, said)),
    "recall": by_class(lambda right, said, true: over(right, true)),
    "f1": by_class(lambda right, said, true: over(2 * right, said + true)),
    "matthews_correlation": matthews,
    "pearsonr": pearson,
    "spearmanr": lambda predictions, references, average: pearson(ranks(predictions), ranks(references), average),
    "mse": lambda predictions, references, average: np.mean((predictions - references) ** 2),
    "mae": lambda predictions, references, average: np.mean(np.abs(predictions - references)),
}


class Classes(evaluate.Metric):
    """One of `SCORES`, chosen by the name of the configuration."""

    def _info(self):
        return evaluate.MetricInfo(
            description=f"{self.config_name} of classes.",
            citation="",
            features=datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64")),
        )

    def _compute(self, predictions, references, average="binary"):
        score = SCORES[self.config_name](np.asarray(predictions), np.asarray(references), average)
        return {self.config_name: float(score)}
