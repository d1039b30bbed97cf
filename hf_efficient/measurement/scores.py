"""Further scores by name, through `evaluate`: of classes, beside the score that a task has anyway.

    metrics = load_metrics(["f1", "matthews_correlation"])
    evaluate_quality(model, dataset, collator, "text-classification", metrics=metrics)

The usual ones come with the package and need no network. Any other is a program of somebody's, by a name on the Hub
or a path, and is loaded only where the caller says that it may run. With two classes f1, precision and recall are
those of class 1, with more the mean over the classes.

Standard errors are bootstrapped over the samples (Efron 1979): the score of 100 draws, tokens of a text together.
Light to import: `evaluate` is imported by the call.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.tasks import TASKS
from ..errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    import numpy as np

    from ..reporting.schema import Score

# name -> whether higher is better; computed by metrics/classes/classes.py
METRICS: dict[str, bool] = {
    "accuracy": True,
    "f1": True,
    "precision": True,
    "recall": True,
    "matthews_correlation": True,
    "pearsonr": True,
    "spearmanr": True,
    "mse": False,
    "mae": False,
}
DRAWS = 100


def check_metrics(names: Sequence[str], task: str, *, trusted: bool) -> None:
    """ConfigError for an unknown metric, a foreign one that is not trusted, or a task without classes; nothing is
    imported or fetched."""
    if names and not TASKS[task].has_classes:
        known = ", ".join(name for name, entry in TASKS.items() if entry.has_classes)
        raise ConfigError(f"metrics are computed from classes, which {task} has not. Tasks that have: {known}.")
    for name in names:
        if name not in METRICS and not trusted:
            raise ConfigError(
                f"metrics: {unknown_name('metric', name, METRICS)} Any other metric of `evaluate`, by its name on the "
                "Hub or by a path, is a program: it needs trust_remote_code."
            )


def load_metrics(names: Sequence[str], *, trusted: bool = False) -> dict[str, Any]:
    """The `evaluate` metric of each name, by `metrics/classes`, from the Hub or from a path; ConfigError if it cannot
    be loaded, such as without a network, or is foreign and not trusted."""
    from importlib.resources import as_file, files

    import evaluate

    metrics = {}
    for name in names:
        if name in METRICS:
            with as_file(files("hf_efficient.measurement") / "metrics" / "classes") as folder:
                metrics[name] = evaluate.load(str(folder), name, keep_in_memory=True)
            continue
        if not trusted:
            raise unknown_name("metric", name, METRICS)
        try:
            metrics[name] = evaluate.load(name, keep_in_memory=True)
        except Exception as error:  # whatever a stranger's program raises while it is imported
            raise ConfigError(
                f"Cannot load the metric {name!r}: {str(error)[:300] or type(error).__name__} Give the path of its "
                f"script where there is no network, or one that comes with hf_efficient: {', '.join(METRICS)}."
            ) from error
    return metrics


def compute_scores(
    metrics: Mapping[str, Any], predictions: "np.ndarray", references: "np.ndarray", classes: int
) -> dict[str, float]:
    """Every number that the metrics give for classes `[n]`; a metric's name comes first where it gives several, and
    DataError where it gives none."""
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        options = {}
        if "average" in inspect.signature(metric._compute).parameters:  # as those of scikit-learn have it
            options["average"] = "binary" if classes == 2 else "macro"
        # Of ours without the bookkeeping of `evaluate`, 20 ms a call: there are 100 draws.
        compute = metric._compute if name in METRICS else metric.compute
        try:
            results = compute(predictions=predictions, references=references, **options)
            numbers = {key: float(value) for key, value in results.items() if isinstance(value, (int, float))}
        except Exception as error:  # whatever a stranger's program raises
            raise DataError(f"The metric {name!r} cannot score these classes: {str(error)[:300]}") from error
        if not numbers:
            raise DataError(f"The metric {name!r} gives no number, only {', '.join(map(str, results))}.")
        short = name.rstrip("/").split("/")[-1].removesuffix(".py")
        scores |= {key if len(numbers) == 1 else f"{short}_{key}": value for key, value in numbers.items()}
    return scores


def further_scores(
    metrics: Mapping[str, Any], predictions: Any, targets: Any, count: Any, classes: int
) -> "tuple[Score, ...]":
    """The scores of the metrics with their standard errors.

    Parameters:
        predictions, targets: tensors `[total]` of class ids, sample after sample.
        count: `[n]` how many of them belong to each sample.
    """
    import numpy as np

    from ..reporting.schema import Score

    if not metrics:
        return ()
    predictions, targets, count = predictions.numpy(), targets.numpy(), count.long().numpy()
    values = compute_scores(metrics, predictions, targets, classes)
    starts, drawn = np.cumsum(count) - count, np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(DRAWS if len(count) > 1 else 0):
        samples = drawn.integers(len(count), size=len(count))
        places = np.concatenate([np.arange(starts[each], starts[each] + count[each]) for each in samples])
        with contextlib.suppress(DataError):  # a draw may lack what a stranger's metric needs
            for name, value in compute_scores(metrics, predictions[places], targets[places], classes).items():
                draws.setdefault(name, []).append(value)
    errors = {name: float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for name, each in draws.items()}
    return tuple(Score(name, value, errors[name], METRICS.get(name, True)) for name, value in values.items())


def for_trainer(metrics: Mapping[str, Any], classes: int) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of a `Trainer` that keeps the predicted classes; a label of -100 does not count."""

    def compute(prediction: Any) -> dict[str, float]:
        counts = prediction.label_ids != -100  # of token labels, and of what pads them
        return compute_scores(metrics, prediction.predictions[counts], prediction.label_ids[counts], classes)

    return compute
