"""Accuracy for `evaluate.load`, from this file, since the `evaluate` package ships no metric and fetches them.

    metric = evaluate.load(str(files("hf_efficient.measurement") / "metrics" / "accuracy"))
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 2])        # {"accuracy": 0.667}

`evaluate` reads the imports of this file line by line: one module on each line.
"""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """The fraction of predictions that equal their reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description="The fraction of predictions that equal their reference.",
            citation="",
            features=datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64")),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
