"""Quality with its uncertainty, and the paired difference of two models on the same samples.

    teacher = evaluate_quality(a, dataset, collator, "text-classification")
    student = evaluate_quality(b, dataset, collator, "text-classification")
    difference = compare_quality(teacher, student)        # far more certain than two separate accuracies

Standard errors, for n samples where sample i has the total s_i over its w_i targets (S and W their sums, r = S / W):

    one right or wrong a sample   sqrt(p (1 - p) / n)
    any mean over tokens          sqrt(n / (n - 1) * sum_i (s_i - r w_i)^2) / W

The second is the ratio estimator over samples: tokens of one text are not independent, so they are not counted as if
they were. Perplexity is exp(loss), so by d exp(x) = exp(x) dx its error is perplexity times the loss's error. That of
macro F1 is the jackknife's: the score is computed anew without each sample.

The difference of two models is taken sample by sample: where a sample is right or wrong its error is McNemar's
sqrt(b + c - (b - c)^2 / n) / n, where b and c count the samples that only one of them gets right; for perplexity it is
the ratio estimator's with perplexity * (s_i - r w_i) of the second model minus that of the first in the sum, for the
accuracy over tokens the same without that factor.

Of speech the totals are word errors and words (`speech`); its loss is that of the tokens, given those before them.

An answer is right if its first and its last token are; an embedding, if the nearest is that of its own pair
(`retrieval`). Of rankings a sample is a query (`ranking`): `correct` is its NDCG, and two models agree on the order of
two candidates.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import default_data_collator

from ..data.respelling import TARGETS
from ..data.tasks import TASKS, Task
from ..errors import DataError, UnsupportedModelError, check_positive, unknown_name
from ..models.frames import frames_of
from ..models.heads import auto_class_of_architecture, decoder_inputs
from ..models.modes import evaluating
from ..models.token_masks import IGNORED, counts_columns, first_positions, from_first, real_labels, token_masks
from ..reporting.schema import Quality, Score
from ..training.lengths import in_batches
from ..training.progress import told
from ..training.ranks import gather_rows, share
from .correlation import spearman
from .estimates import exp_of, macro_f1, mean_and_error
from .ranking import QUERY, ranked, same_order, score_pairs
from .retrieval import PAIR, SIMILARITY, scored, vectors_of
from .scores import check_metrics, further_scores, load_metrics
from .speech import decoder_of, score_texts

_LABELS = ("labels", "start_positions", "end_positions", PAIR, SIMILARITY, QUERY)
_SPAN = 1 << 32


@dataclass(frozen=True)
class Evaluation:
    """Per-sample results, in the data set's order; `quality` is their summary.

    Parameters:
        loss, correct, count: `[n]` summed negative log-likelihood (of embeddings 1 - 1 / rank), right predictions and
            targets of each sample; of speech word errors and words.
        predictions, targets: `[total targets]` class or token ids, sample after sample; of embeddings the nearest and
            the own pair; of an answer start * 2^32 + end; of speech a digest of each text; of rankings the scores and
            the labels of all candidates.
        is_respelled: whether `count` is that of other tokens than the predictions (`data.respelling`).
        similarities: of embeddings the cosines of some texts (`retrieval`).
    """

    quality: Quality
    loss: torch.Tensor
    correct: torch.Tensor
    count: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor
    is_respelled: bool = False
    similarities: torch.Tensor | None = None


@dataclass(frozen=True)
class QualityDifference:
    """Second model minus first in the score `name`; `only_first`, `only_second`: targets that only one gets right.

    `agreement` and those are None where the two spell the texts in other tokens (`data.respelling`), and those of
    rankings and correlations. `similarity`: of embeddings, Spearman's correlation of the cosines of both.
    """

    name: str
    difference: float
    standard_error: float
    agreement: float | None
    only_first: int | None
    only_second: int | None
    samples: int
    similarity: float | None = None


def task_of(model: torch.nn.Module) -> str:
    """The task that the model's head was made for; UnsupportedModelError if none is known."""
    name = type(model).__name__
    auto = auto_class_of_architecture(name)
    heads = {task: entry for task, entry in TASKS.items() if entry.class_endings}
    # The Auto class first: it knows MarianMTModel and BertLMHeadModel, whose names do not say what they are for.
    by_auto = (task for task, entry in heads.items() if entry.auto_class == auto)
    by_name = (task for task, entry in heads.items() if name.endswith(entry.class_endings))
    if (task := next(by_auto, None) or next(by_name, None)) is not None:
        return task
    raise UnsupportedModelError(f"No task is known for {name}. Pass task=, one of: {', '.join(TASKS)}.")


def evaluate_quality(
    model: torch.nn.Module,
    dataset: Any,
    collator: Callable[[list], Mapping[str, torch.Tensor]] | None = None,
    task: str | None = None,
    batch_size: int = 32,
    pooling: str = "mean",
    metrics: Sequence[str] | Mapping[str, Any] = (),
) -> Evaluation:
    """Run the model over the data set in eval mode, and score it; rows of one length are run together.

    Parameters:
        dataset: samples with labels, as `Trainer` takes them; -100 marks token labels that do not count. Nor do those
            of padding, or predicted by it: on the left the first real token of a causal model.
        collator: list of samples -> batch with `labels`; default `transformers.default_data_collator`.
        task: one of `data.tasks.TASKS`; default: what the model's head is for.
        pooling: of embeddings: one of `models.pooling.POOLINGS`.
        metrics: further scores of classes: names of `scores.METRICS`, or what `load_metrics` gives. A score that is
            there already is not repeated.

    Raises:
        ConfigError: an unknown task or metric, or bad batch size.
        DataError: an empty data set, no labels, or nothing to predict.
    """
    task = task_of(model) if task is None else task
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    check_positive("batch_size", batch_size)
    if not isinstance(metrics, Mapping):
        check_metrics(metrics, task, trusted=False)
        metrics = load_metrics(metrics)
    if len(dataset) == 0:
        raise DataError("The data set to evaluate on is empty. Give at least one sample.")
    places = share(in_batches(dataset, batch_size))
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=places, collate_fn=collator or default_data_collator)
    batches, numbers = told(loader, "evaluate"), [*itertools.chain(*places)]
    with evaluating(model):
        if TASKS[task].kind == "embeddings":
            return Evaluation(**scored(task, *vectors_of(model, batches, numbers, pooling, inputs_of)))
        if TASKS[task].metric == "wer":
            decode = decoder_of(collator)
            spoken = [row for batch in batches for row in _score_speech(model, batch, task, decode)]
            return _speech(task, gather_rows(spoken, numbers))
        else:
            rows = gather_rows([row for batch in batches for row in _score_batch(model, batch, TASKS[task])], numbers)
    if TASKS[task].kind == "scores":
        return Evaluation(**ranked(task, rows))
    loss, correct, count = (torch.stack([row[i] for row in rows]).double() for i in range(3))
    if not count.sum():
        raise DataError("No label counts: all are -100. Give samples with labels.")
    predictions, targets = (torch.cat([row[i] for row in rows]) for i in (3, 4))
    is_respelled = isinstance(dataset[0], Mapping) and TARGETS in dataset[0]
    scores = _scores(TASKS[task], loss, correct, count, predictions, targets, is_respelled)
    if metrics:
        config: Any = model.config
        further = further_scores(metrics, predictions, targets, count, config.num_labels)
        scores += tuple(each for each in further if each.name not in {score.name for score in scores})
    quality = Quality(task, len(count), int(count.sum()), scores, _largest_class(TASKS[task], targets))
    return Evaluation(quality, loss, correct, count, predictions, targets, is_respelled)


def _largest_class(task: Task, targets: torch.Tensor) -> float | None:
    return int(targets.bincount().max()) / len(targets) if task.kind == "examples" else None


def _score_speech(model: Any, batch: Mapping[str, Any], task: str, decode: Callable) -> list[tuple]:
    """(loss sum, tokens, word errors, words, digest heard, digest said) of each sample."""
    if "labels" not in batch:
        raise DataError(f"The batch has no 'labels', only {', '.join(sorted(batch))}. Give texts of what is said.")
    inputs, labels = inputs_of(model, batch), batch["labels"].to(next(model.parameters()).device)
    if TASKS[task].kind == "ctc":
        logits = model(**inputs).logits
        _check_labels(labels[labels != IGNORED], logits.shape[-1], "tokens of its output")
        frames = frames_of(model)
        losses = frames.losses(logits, labels, frames.mask(inputs).sum(1))
        told = list(zip(losses.cpu(), (labels != IGNORED).sum(1).cpu(), strict=True))
    else:
        logits, told = None, [row[:3:2] for row in _score_batch(model, batch, TASKS[task])]
    texts = score_texts(model, inputs, logits, labels, decode)
    return [(*loss, *(torch.tensor(number) for number in text)) for loss, text in zip(told, texts, strict=True)]


def _speech(task: str, rows: list[tuple]) -> Evaluation:
    loss, tokens, errors, words = (torch.stack([row[i] for row in rows]).double() for i in range(4))
    heard, said = (torch.stack([row[i] for row in rows]) for i in (4, 5))
    if not words.sum() or not tokens.sum():
        raise DataError("Nothing is said in any of the texts. Give samples with words.")
    scores = Score("wer", *mean_and_error(errors, words), False), Score("loss", *mean_and_error(loss, tokens), False)
    return Evaluation(Quality(task, len(rows), int(words.sum()), scores), loss, errors, words, heard, said)


def _score_batch(model: Any, batch: Mapping[str, Any], task: Task) -> list[tuple[torch.Tensor, ...]]:
    """(loss sum, correct, count, predictions, targets) of each sample, on the CPU; of pairs see `score_pairs`."""
    if task.kind == "scores":
        return score_pairs(model, batch, inputs_of)
    names = ("start_positions", "end_positions") if task.kind == "spans" else ("labels",)
    if missing := [name for name in names if name not in batch]:
        raise DataError(
            f"The batch has no {missing[0]!r}, only {', '.join(sorted(batch))}. Label the data or fix the collator."
        )
    inputs = inputs_of(model, batch)
    _check_ids(model, inputs.get("input_ids"))
    labels = torch.stack([batch[name] for name in names], dim=-1).to(next(model.parameters()).device)
    if len(names) == 2:
        return _score_spans(model(**inputs), token_masks(inputs, has_decoder=False)["encoder"], labels)
    labels = labels[..., 0]
    if task.is_by_token:
        labels = _place(model, inputs, labels, task)
    logits = model(**inputs).logits  # [B, classes] or [B, T, C]
    if not task.is_by_token:
        if logits.shape[-1] < 2 or labels.is_floating_point():
            raise DataError("Accuracy needs class labels and at least 2 classes; this is a regression head or label.")
        logits, labels = logits[:, None], labels.reshape(-1, 1)
    elif task.kind == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = [_score_sample(logits[i], labels[i]) for i in range(len(labels))]
    if TARGETS not in batch:
        return scored
    return [(*row[:2], targets.cpu(), *row[3:]) for row, targets in zip(scored, batch[TARGETS], strict=True)]


def _place(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, task: Task) -> torch.Tensor:
    """Token labels `[B, T]` where the logits are, -100 where these are of padding; adds the inputs of a decoder."""
    has_decoder = model.config.is_encoder_decoder
    if has_decoder and "decoder_input_ids" not in inputs:
        labels = from_first(labels)
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    masks = token_masks(inputs | {"labels": labels}, has_decoder=has_decoder)
    return real_labels(labels, list(masks.values())[-1], ahead=int(task.kind == "causal_lm"))


def inputs_of(model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What of a batch the model is given: no labels, on its device; positions that do not count padding."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value) and key not in _LABELS}
    names = inspect.signature(model.forward).parameters
    if model.main_input_name in names:
        inputs = {key: value for key, value in inputs.items() if key in names}
    else:  # a wrapper such as PEFT's names none and passes all on
        from ..training.batch import base_of

        model = base_of(model)
        names = inspect.signature(model.forward).parameters
    return inputs | first_positions(inputs) if counts_columns(model, names) else inputs


def _check_ids(model: Any, ids: torch.Tensor | None) -> None:
    """Raises DataError for ids that the embeddings have no row for: another tokenizer than the model's."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if ids is not None and ids.numel() and isinstance(table, torch.nn.Embedding):
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= table.num_embeddings:
            raise DataError(
                f"A text has the token {high if high >= table.num_embeddings else low}, and {type(model).__name__} "
                f"knows 0 to {table.num_embeddings - 1}. Tokenize with the tokenizer of the model."
            )


def _check_labels(labels: torch.Tensor, classes: int, what: str) -> None:
    """Raises DataError for a label that is no class, or no token of the text."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.numel():
        raise DataError(
            f"A label is {int(wrong[0])}, and there are {classes} {what}. Check the data, and the model's num_labels."
        )


def _score_spans(output: Any, mask: torch.Tensor, ends: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Start and end logits and mask `[B, T]`, ends `[B, 2]`: the most probable first and last token of each text."""
    both = torch.stack([output.start_logits, output.end_logits], dim=1).float()
    both = both.masked_fill(~mask[:, None], -torch.inf)
    _check_labels(ends, both.shape[-1], "tokens in that text")
    loss = torch.nn.functional.cross_entropy(both.transpose(1, 2), ends, reduction="none").mean(1)
    spans = [positions[:, 0] * _SPAN + positions[:, 1] for positions in (both.argmax(-1), ends)]
    return [_one(*row) for row in zip(loss.cpu(), *(span.cpu() for span in spans), strict=True)]


def _one(loss: torch.Tensor, prediction: torch.Tensor, target: Any) -> tuple[torch.Tensor, ...]:
    """A sample with one answer."""
    target = torch.as_tensor(target)
    return loss, prediction == target, torch.tensor(1), prediction[None], target[None]


def _score_sample(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits `[T, classes]`, labels `[T]`; only labels other than -100 count."""
    kept = labels != IGNORED
    logits, targets = logits[kept].float(), labels[kept]
    _check_labels(targets, logits.shape[-1], "classes")
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").cpu()
    predictions, targets = logits.argmax(-1).cpu(), targets.cpu()
    return loss, (predictions == targets).sum(), torch.tensor(len(targets)), predictions, targets


def _scores(
    task: Task,
    loss: torch.Tensor,
    correct: torch.Tensor,
    count: torch.Tensor,
    predictions: torch.Tensor,
    targets: torch.Tensor,
    is_respelled: bool,
) -> tuple[Score, ...]:
    mean_loss, loss_error = mean_and_error(loss, count)
    share, share_error = mean_and_error(correct, count)
    loss_score = Score("loss", mean_loss, loss_error, False)
    if task.metric == "perplexity":
        perplexity = exp_of(mean_loss)
        main = Score("perplexity", perplexity, perplexity * loss_error, False)
        if is_respelled:  # there are more to guess: how many are right says nothing
            return main, loss_score
        return main, loss_score, Score("token_accuracy", share, share_error, True)
    if task.is_by_token:
        f1 = Score("macro_f1", *macro_f1(count, predictions, targets), True)
        return Score("accuracy", share, share_error, True), f1, loss_score
    return Score(task.metric, share, math.sqrt(share * (1 - share) / len(count)), True), loss_score


def compare_quality(first: Evaluation, second: Evaluation) -> QualityDifference:
    """Second minus first in the main score, with the paired standard error (formulas in the module docstring);
    DataError unless both were evaluated on the same samples and labels in the same order."""
    spelled_anew = first.is_respelled or second.is_respelled
    alike = spelled_anew or torch.equal(first.targets, second.targets)
    same = torch.equal(first.count, second.count) and alike
    if not same or first.quality.task != second.quality.task:
        raise DataError("The two evaluations have different samples or tasks. Evaluate both on the same data set.")
    n = len(first.count)
    entry = TASKS[first.quality.task]
    if entry.is_by_token or entry.metric == "wer":
        change = _pulls(second) - _pulls(first)
        error = (n / (n - 1) * (change**2).sum()).sqrt().item() / first.count.sum().item() if n > 1 else math.nan
    else:
        change = second.correct - first.correct
        error = math.sqrt(((change - change.mean()) ** 2).sum().item()) / n
    shared: dict[str, Any] = {"agreement": None, "only_first": None, "only_second": None}
    if entry.kind == "scores":
        shared["agreement"] = same_order(first.predictions, second.predictions, first.count.long())
    elif not spelled_anew and not first.targets.is_floating_point():
        shared = _shared(first, second)
    if first.similarities is not None and second.similarities is not None:
        shared["similarity"] = float(spearman(first.similarities, second.similarities).nan_to_num())
    return QualityDifference(
        name=first.quality.main.name,
        difference=second.quality.main.value - first.quality.main.value,
        standard_error=error,
        samples=first.quality.samples,
        **shared,
    )


def _shared(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """What two models say of the same targets."""
    right_first, right_second = first.predictions == first.targets, second.predictions == second.targets
    return {
        "agreement": (first.predictions == second.predictions).double().mean().item(),
        "only_first": int((right_first & ~right_second).sum()),
        "only_second": int((right_second & ~right_first).sum()),
    }


def _pulls(evaluation: Evaluation) -> torch.Tensor:
    """`[n]`: how far each sample pulls the perplexity, or the accuracy over tokens, from its value, times the number
    of targets."""
    by_loss = TASKS[evaluation.quality.task].metric == "perplexity"
    totals = evaluation.loss if by_loss else evaluation.correct
    mean = totals.sum() / evaluation.count.sum()
    return (exp_of(mean.item()) if by_loss else 1.0) * (totals - mean * evaluation.count)
