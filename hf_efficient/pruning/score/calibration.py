"""What calibration batches are, and the scalars whose gradients say what matters.

`answer_loss` needs no labels. Its squared gradients measure how far the answer moves (a Gauss-Newton matrix), whether
the model is sure of it or not; the loss of a model that is right has hardly any gradient to go by.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...errors import DataError, shown
from ...models.anatomy import Anatomy
from ...models.modes import evaluating
from ...models.registry import token_limit
from ...models.token_masks import IGNORED, masks_of, predicts_next, real_inputs
from ...training.ranks import Numbered
from ..price.costs import num_patches
from .checked_batches import check_batches
from .finite import check_finite, not_finite
from .handing import Batch, forward

ANSWER = "The answer of the model to a calibration batch"
Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]

# The field of the output that is the model's answer; the first that is there.
ANSWERS = ("logits", "logits_per_image", "start_logits", "last_hidden_state")
# The length at which MACs are counted when there are no calibration batches to take it from.
DEFAULT_LENGTH = 128


def check_calibration(anatomy: Anatomy, calibration: Iterable[Batch] | None) -> list[Batch]:
    """The batches as a list; DataError if one is not what the model can read: see `check_batches`."""
    if isinstance(calibration, Mapping):
        raise DataError("calibration must give batches, got one batch. Put it in a list: [batch].")
    if calibration is not None and (isinstance(calibration, str) or not isinstance(calibration, Iterable)):
        raise DataError(f"calibration must give batches (a list of dicts of tensors), got {shown(calibration)}.")
    batches, model = list(calibration) if calibration is not None else [], anatomy.model
    for batch in batches:
        fields = {key: type(value).__name__ for key, value in batch.items()} if isinstance(batch, Mapping) else {}
        if model.main_input_name not in fields or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            raise DataError(
                f"calibration must give dicts of tensors with {model.main_input_name!r}, got "
                f"{fields or type(batch).__name__}. A DataLoader with the collator of your Trainer does."
            )
    check_batches(anatomy, batches)
    # Tensors made in inference mode cannot take part in gradients; copies can.
    return [{name: v.clone() if v.is_inference() else v for name, v in batch.items()} for batch in batches]


def average_length(batches: Sequence[Batch], model: PreTrainedModel) -> int:
    """Tokens in a sequence of the calibration data, padding not counted; for images the number of patches, for
    sound that of frames. Of CLIP's two towers it is that of the text. Of other inputs it is what its first layer reads
    of the first batch."""
    vision = getattr(model.config, "vision_config", model.config)
    if model.main_input_name == "pixel_values" and hasattr(vision, "image_size"):
        return num_patches(vision)
    if model.main_input_name == "input_features":
        return model.config.max_source_positions
    if batches and "input_ids" not in batches[0]:
        return _length_read(batches[0], model)
    tokens = sequences = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        tokens += int(mask.sum()) if mask is not None else ids.numel()
        sequences += ids.shape[0]
    return max(1, tokens // sequences) if sequences else DEFAULT_LENGTH


def _length_read(batch: Batch, model: PreTrainedModel) -> int:
    lengths: list[int] = []

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        lengths.append(states.shape[-2])

    handle = Anatomy.of(model).stacks[0].layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model):
            forward(model, batch)
    finally:
        handle.remove()
    return lengths[0]


def fitting_length(batches: Sequence[Batch], model: PreTrainedModel) -> int:
    """`average_length`; without batches no more than the model takes."""
    usual = average_length(batches, model)
    return usual if batches else min(usual, token_limit(model.config) or usual)


def answer_loss(seed: int = 0) -> Loss:
    """A random direction of the answer, summed over rows: E[(d loss)^2] is the squared change of the answer.

    Over a vocabulary the direction is the cross-entropy of a token drawn from the model's own distribution (the
    Fisher matrix, Martens 2020, section 5), since most of its logits do not matter. Over classes it is uniform among
    those of length 1 that change the logits against each other: of two classes always their difference. Else it is
    Gaussian. Of token by token answers the mean over real tokens is taken.

    Each row has a seed of its own, its number since the first batch, and draws for its real tokens alone: so its
    direction depends neither on its padding nor on how the rows are cut into batches or shared by processes.
    """
    since_first = itertools.count()

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        answer = answer_of(model, batch)  # [B, C] or [B, T, C]
        where = real_entries(model, batch, answer)  # [B, C] or [B, T]
        sums = []
        numbers = itertools.count(batch.first_row) if isinstance(batch, Numbered) else since_first
        for row, real in zip(answer, where, strict=True):
            generator = torch.Generator().manual_seed(Random(f"{seed} {next(numbers)}").getrandbits(63))
            counted = row if real.all() else row[real]  # a copy of [real classes] or [real tokens, C] only if needed
            along = _along(model, counted, generator)
            sums.append(along.sum() / max(1, along.numel()))
        total = torch.stack(sums).sum()
        check_finite(total.detach(), ANSWER)
        return total

    return loss


def _along(model: PreTrainedModel, answer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """How far each answer, `[..., C]`, goes in a direction drawn for it: `[...]`."""
    if answer.ndim == 2 and answer.shape[-1] == getattr(model.config, "vocab_size", None):
        if not len(answer):  # a row of padding only
            return answer.sum(-1)
        logs = answer.log_softmax(-1)
        upto = logs.detach().cpu().exp().cumsum_(-1)
        if not upto[:, -1].isfinite().all():
            raise not_finite(ANSWER)
        # One number a token; `multinomial` draws one for every entry of the vocabulary.
        where = torch.rand(len(upto), 1, generator=generator, dtype=upto.dtype) * upto[:, -1:]
        drawn = torch.searchsorted(upto, where, right=True).clamp(max=upto.shape[-1] - 1)
        return -logs.gather(-1, drawn.to(logs.device))[:, 0]
    direction = torch.randn(answer.shape, generator=generator, dtype=answer.dtype).to(answer.device)
    if is_distribution(model, answer):
        direction = F.normalize(direction - direction.mean(-1, keepdim=True), dim=-1)
    return (answer * direction).sum(-1)


def real_entries(model: PreTrainedModel, batch: Batch, answer: torch.Tensor) -> torch.Tensor:
    """What of an answer counts, bool: its real tokens, `[B, T]`; the classes of `[B, C]`, which are tokens themselves
    where a text is asked for the place of an answer."""
    are_classes = answer.ndim == 2 and model.loss_type != "ForQuestionAnswering"
    return torch.ones_like(answer, dtype=torch.bool) if are_classes else token_mask(batch, model, None, answer).bool()


def answer_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The answer in float32 or wider, [B, C] or [B, T, C]; DataError if nothing is known to be one."""
    outputs = forward(model, batch)
    for name in ANSWERS:
        if outputs.get(name) is not None:
            return wide(outputs[name])
    raise DataError(
        f"{type(model).__name__} gives {', '.join(outputs)}; importance needs one of {', '.join(ANSWERS)}. Use "
        "importance='magnitude'."
    )


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_distribution(model: PreTrainedModel, answer: torch.Tensor) -> bool:
    """True for the logits of classes or tokens that exclude each other."""
    exclusive = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    return exclusive and answer.shape[-1] > 1 and model.loss_type is not None


def model_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed over rows: the loss of the labels if the batch has some, else the cross-entropy of the model's own hard
    predictions. Of token by token answers the mean over the real tokens of a row is taken, of answers in a text that
    over first and last token; so a row counts the same whatever else is in its batch.

    Two towers (CLIP) have to tell the pairs of the batch from all other combinations, as when they were trained.

    Raises:
        DataError: the model returns no logits, so there is no loss to measure importance with.
    """
    batch = real_inputs(batch, model)
    outputs = forward(model, batch)
    rows = len(next(iter(batch.values())))
    if "start_logits" in outputs and "start_positions" in batch:
        return _span_loss(model, batch, outputs)
    logits, labels = outputs.get("logits"), batch.get("labels")
    if labels is not None and logits is not None and logits.ndim == 3 and labels.shape == logits.shape[:2]:
        return _token_loss(wide(logits), labels.to(logits.device), ahead=int(predicts_next(model)))
    if outputs.get("loss") is not None:
        return outputs.loss * rows
    if "logits_per_text" in outputs:  # CLIP: every text belongs to the image of its row
        pairs = outputs.logits_per_text.float()
        own = torch.arange(len(pairs), device=pairs.device)
        return (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2 * rows
    if "logits" not in outputs:
        raise DataError(
            f"importance='taylor' needs a loss, but {type(model).__name__} returned neither loss nor logits. "
            "Use a model with a task head, batches with labels, or importance='fisher'."
        )
    logits = wide(outputs.logits)  # [B, C] or [B, T, C]
    if logits.ndim == 3 and logits.shape[-1] > 1:
        real = token_mask(batch, model, None, logits[..., 0]).bool()
        return _token_loss(logits, logits.argmax(-1).masked_fill(~real, IGNORED), ahead=0)
    if logits.shape[-1] == 1:
        return logits.square().mean() * rows
    return F.cross_entropy(logits, logits.argmax(-1)) * rows


def _token_loss(logits: torch.Tensor, labels: torch.Tensor, ahead: int) -> torch.Tensor:
    """Logits [B, T, C] of labels [B, T] that run `ahead`: the mean cross-entropy of each row, summed."""
    logits, labels = logits[:, : logits.shape[1] - ahead], labels[:, ahead:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).sum()


def _span_loss(model: PreTrainedModel, batch: Batch, outputs: Mapping) -> torch.Tensor:
    """The answer is sought among the real tokens; one that lies elsewhere does not count."""
    total = wide(outputs["start_logits"]).new_zeros(())
    for end in ("start", "end"):
        logits = wide(outputs[f"{end}_logits"])
        real = token_mask(batch, model, None, logits).bool()
        where = batch[f"{end}_positions"].flatten().to(logits.device)
        inside = (where >= 0) & (where < logits.shape[1])
        inside &= real.gather(1, where.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
        total = total + F.cross_entropy(logits[inside], where[inside], reduction="sum") / 2
    return total


def token_mask(batch: Batch, model: PreTrainedModel, stack: str | None, like: torch.Tensor) -> torch.Tensor:
    """`[B, T]` as `like`: 1 for each real token of a stack (None: of the answer), 0 for padding.

    A mask of another shape belongs to something else (frames of sound before they were joined).
    """
    mask = _mask_of(stack, batch, model)
    if stack == "vision" or mask.shape != like.shape[:2]:
        return torch.ones(like.shape[:2], dtype=like.dtype, device=like.device)
    return mask.to(like)


def state_mask(batch: Batch, model: PreTrainedModel, stack: str, states: torch.Tensor) -> torch.Tensor:
    """`token_mask` of states `[B, T, width]`; `[N]` of states `[N, width]`, all tokens one after another (OPT)."""
    if states.ndim > 2:
        return token_mask(batch, model, stack, states)
    mask = _mask_of(stack, batch, model).flatten()
    if stack == "vision" or len(mask) != len(states):
        return torch.ones(len(states), dtype=states.dtype, device=states.device)
    return mask.to(states)


def _mask_of(stack: str | None, batch: Batch, model: PreTrainedModel) -> torch.Tensor:
    masks = masks_of(batch, model)
    return masks["encoder" if stack == "encoder" else list(masks)[-1]]
