"""Quality with its uncertainty, and the paired difference of two models on the same samples.

    teacher = evaluate_quality(a, dataset, collator, "text-classification")
    student = evaluate_quality(b, dataset, collator, "text-classification")
    difference = compare_quality(teacher, student)        # far more certain than two separate accuracies

Standard errors, for n samples where sample i has the total s_i over its w_i targets (S and W their sums, r = S / W):

    accuracy of classification   sqrt(p (1 - p) / n)
    any mean over tokens         sqrt(n / (n - 1) * sum_i (s_i - r w_i)^2) / W

The second is the ratio estimator over samples: tokens of one text are not independent, so they are not counted as if
they were. Perplexity is exp(loss), so by d exp(x) = exp(x) dx its error is perplexity times the loss's error.

The difference of two models is taken sample by sample: for classification its error is McNemar's
sqrt(b + c - (b - c)^2 / n) / n, where b and c count the samples that only one of them gets right; for perplexity it is
the ratio estimator's with perplexity * (s_i - r w_i) of the second model minus that of the first in the sum.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError, UnsupportedModelError, unknown_name
from ..reporting.schema import Quality, Score
from .context import evaluating


@dataclass(frozen=True)
class Task:
    """How to read a head's output: the class ending, whether labels are per token, how far labels run ahead."""

    head: str
    tokens: bool
    shift: int


TASKS = {
    "text-classification": Task("ForSequenceClassification", tokens=False, shift=0),
    "image-classification": Task("ForImageClassification", tokens=False, shift=0),
    "causal-lm": Task("ForCausalLM", tokens=True, shift=1),
    "seq2seq": Task("ForConditionalGeneration", tokens=True, shift=0),
}
_ALSO_CAUSAL = "LMHeadModel"


@dataclass(frozen=True)
class Evaluation:
    """Per-sample results, in the data set's order; `quality` is their summary.

    Parameters:
        loss, correct, count: `[n]` summed negative log-likelihood, right predictions and targets of each sample.
        predictions, targets: `[total targets]` class or token ids, sample after sample.
    """

    quality: Quality
    loss: torch.Tensor
    correct: torch.Tensor
    count: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class QualityDifference:
    """Second model minus first in the score `name`; `only_first`, `only_second`: targets that only one gets right."""

    name: str
    difference: float
    standard_error: float
    agreement: float
    only_first: int
    only_second: int
    samples: int


def task_of(model: torch.nn.Module) -> str:
    """The task that the model's head was made for.

    Raises:
        UnsupportedModelError: a head without a known task.
    """
    name = type(model).__name__
    for task, settings in TASKS.items():
        if name.endswith(settings.head):
            return task
    if name.endswith(_ALSO_CAUSAL):
        return "causal-lm"
    raise UnsupportedModelError(f"No task is known for {name}. Pass task=, one of: {', '.join(TASKS)}.")


def evaluate_quality(
    model: torch.nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, torch.Tensor]] | None = None,
    task: str | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Run the model over the data set in its order, in eval mode, and score it.

    Parameters:
        dataset: samples with labels, as `Trainer` takes them; -100 marks token labels that do not count.
        collator: list of samples -> batch with `labels`; default `transformers.default_data_collator`.
        task: one of `TASKS`; default: what the model's head is for.

    Raises:
        ConfigError: an unknown task or bad batch size. DataError: an empty data set, no labels, or nothing to predict.
    """
    task = task_of(model) if task is None else task
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if len(dataset) == 0:
        raise DataError("The data set to evaluate on is empty. Give at least one sample.")
    if collator is None:
        from transformers import default_data_collator as collator
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=collator, shuffle=False)
    rows: list[tuple[torch.Tensor, ...]] = []
    with evaluating(model):
        for batch in tqdm(loader, desc="evaluate", disable=None, leave=False):
            rows.extend(_score_batch(model, batch, TASKS[task]))
    loss, correct, count = (torch.stack([row[i] for row in rows]).double() for i in range(3))
    if not count.sum():
        raise DataError("No label counts: all are -100. Give samples with labels.")
    predictions, targets = (torch.cat([row[i] for row in rows]) for i in (3, 4))
    return Evaluation(_summary(task, loss, correct, count), loss, correct, count, predictions, targets)


def _score_batch(model: Any, batch: Mapping[str, Any], task: Task) -> list[tuple[torch.Tensor, ...]]:
    """(loss sum, correct, count, predictions, targets) of each sample, on the CPU."""
    if "labels" not in batch:
        raise DataError(
            f"The batch has no 'labels', only {', '.join(sorted(batch))}. Label the data or fix the collator."
        )
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
    labels = batch.pop("labels")
    names = inspect.signature(model.forward).parameters
    if model.main_input_name in names:  # a wrapper such as PEFT's names none and passes all on
        batch = {key: value for key, value in batch.items() if key in names}
    if model.config.is_encoder_decoder and task.tokens and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(**batch).logits  # [B, classes] or [B, T, vocabulary]
    if not task.tokens:
        if logits.shape[-1] < 2 or labels.is_floating_point():
            raise DataError("Accuracy needs class labels and at least 2 classes; this is a regression head or label.")
        logits, labels = logits[:, None], labels.reshape(-1, 1)
    elif task.shift:
        logits, labels = logits[:, : -task.shift], labels[:, task.shift :]
    return [_score_sample(logits[i], labels[i]) for i in range(len(labels))]


def _score_sample(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits `[T, classes]`, labels `[T]`; only labels other than -100 count."""
    kept = labels != -100
    logits, targets = logits[kept].float(), labels[kept]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").cpu()
    predictions, targets = logits.argmax(-1).cpu(), targets.cpu()
    return loss, (predictions == targets).sum(), torch.tensor(len(targets)), predictions, targets


def mean_and_error(total: torch.Tensor, count: torch.Tensor) -> tuple[float, float]:
    """sum(total) / sum(count) and its standard error over samples; the error of a single sample is unknown: nan."""
    mean = total.sum() / count.sum()
    n = len(total)
    if n < 2:
        return mean.item(), math.nan
    return mean.item(), ((n / (n - 1) * ((total - mean * count) ** 2).sum()).sqrt() / count.sum()).item()


def _summary(task: str, loss: torch.Tensor, correct: torch.Tensor, count: torch.Tensor) -> Quality:
    mean_loss, loss_error = mean_and_error(loss, count)
    accuracy, accuracy_error = mean_and_error(correct, count)
    loss_score = Score("loss", mean_loss, loss_error, False)
    scores: tuple[Score, ...]
    if TASKS[task].tokens:
        perplexity = _exp(mean_loss)
        scores = (
            Score("perplexity", perplexity, perplexity * loss_error, False),
            loss_score,
            Score("token_accuracy", accuracy, accuracy_error, True),
        )
    else:
        binomial = math.sqrt(accuracy * (1 - accuracy) / len(count))
        scores = (Score("accuracy", accuracy, binomial, True), loss_score)
    return Quality(task, len(count), int(count.sum()), scores)


def _exp(loss: float) -> float:
    """exp, but infinite instead of an OverflowError: a diverged model still gets its report."""
    return math.exp(loss) if not loss > 700 else math.inf


def compare_quality(first: Evaluation, second: Evaluation) -> QualityDifference:
    """Second minus first in the main score, with the paired standard error (formulas in the module docstring).

    Raises:
        DataError: the two were not evaluated on the same samples and labels in the same order.
    """
    same = torch.equal(first.count, second.count) and torch.equal(first.targets, second.targets)
    if not same or first.quality.task != second.quality.task:
        raise DataError("The two evaluations have different samples or tasks. Evaluate both on the same data set.")
    n = len(first.count)
    if TASKS[first.quality.task].tokens:
        change = _perplexity_parts(second) - _perplexity_parts(first)
        error = (n / (n - 1) * (change**2).sum()).sqrt().item() / first.count.sum().item() if n > 1 else math.nan
    else:
        change = second.correct - first.correct
        error = math.sqrt(((change - change.mean()) ** 2).sum().item()) / n
    right_first, right_second = first.predictions == first.targets, second.predictions == second.targets
    return QualityDifference(
        name=first.quality.main.name,
        difference=second.quality.main.value - first.quality.main.value,
        standard_error=error,
        agreement=(first.predictions == second.predictions).double().mean().item(),
        only_first=int((right_first & ~right_second).sum()),
        only_second=int((right_second & ~right_first).sum()),
        samples=n,
    )


def _perplexity_parts(evaluation: Evaluation) -> torch.Tensor:
    """`[n]`: how far each sample pulls the perplexity from its value, times the number of targets."""
    loss = evaluation.loss.sum() / evaluation.count.sum()
    return _exp(loss.item()) * (evaluation.loss - loss * evaluation.count)
