"""What calibration batches are, and the scalars whose gradients say what matters.

`answer_loss` needs no labels. Its squared gradients measure how far the answer moves (a Gauss-Newton matrix), whether
the model is sure of it or not; the loss of a model that is right has hardly any gradient to go by.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import DataError, shown
from .checked_batches import check_batches, longest_text
from .costs import num_patches
from .finite import check_finite, not_finite
from .stream import Batch, forward

Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]

# The field of the output that is the model's answer; the first that is there.
ANSWERS = ("logits", "logits_per_image", "start_logits", "last_hidden_state")
IGNORED = -100
# The length at which MACs are counted when there are no calibration batches to take it from.
DEFAULT_LENGTH = 128


def check_calibration(model: PreTrainedModel, calibration: Iterable[Batch] | None) -> list[Batch]:
    """The batches as a list.

    Raises:
        DataError: something is not a batch of inputs that the model can read: see `check_batches`.
    """
    if isinstance(calibration, Mapping):
        raise DataError("calibration must give batches, got one batch. Put it in a list: [batch].")
    if calibration is not None and (isinstance(calibration, str) or not isinstance(calibration, Iterable)):
        raise DataError(f"calibration must give batches (a list of dicts of tensors), got {shown(calibration)}.")
    batches = list(calibration) if calibration is not None else []
    for batch in batches:
        fields = {key: type(value).__name__ for key, value in batch.items()} if isinstance(batch, Mapping) else {}
        if model.main_input_name not in fields or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            raise DataError(
                f"calibration must give dicts of tensors with {model.main_input_name!r}, got "
                f"{fields or type(batch).__name__}. A DataLoader with the collator of your Trainer does."
            )
    check_batches(model, batches)
    # Tensors made in inference mode cannot take part in gradients; copies can.
    return [{name: v.clone() if v.is_inference() else v for name, v in batch.items()} for batch in batches]


def average_length(batches: Sequence[Batch], model: PreTrainedModel) -> int:
    """Tokens in a sequence of the calibration data, padding not counted; for images the number of patches, for
    sound that of frames. Of CLIP's two towers it is that of the text."""
    if model.main_input_name == "pixel_values":
        return num_patches(model.config)
    if model.main_input_name == "input_features":
        return model.config.max_source_positions
    tokens = sequences = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        tokens += int(mask.sum()) if mask is not None else ids.numel()
        sequences += ids.shape[0]
    return max(1, tokens // sequences) if sequences else DEFAULT_LENGTH


def fitting_length(batches: Sequence[Batch], model: PreTrainedModel) -> int:
    """`average_length`; without batches no more than the model takes."""
    usual = average_length(batches, model)
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # rotary positions have no end
    return usual if batches else min(limit for limit in (usual, longest_text(model), made_for) if limit)


def answer_loss(seed: int = 0) -> Loss:
    """A random direction of the answer, summed over rows: E[(d loss)^2] is the squared change of the answer.

    Over a vocabulary the direction is the cross-entropy of a token drawn from the model's own distribution (the
    Fisher matrix, Martens 2020, section 5), since most of its logits do not matter. Over classes it is uniform among
    those of length 1 that change the logits against each other: of two classes always their difference. Else it is
    Gaussian. Of token by token answers the mean over real tokens is taken.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        answer = answer_of(model, batch)  # [B, C] or [B, T, C]
        if answer.ndim == 3 and answer.shape[-1] == getattr(model.config, "vocab_size", None):
            chances = answer.detach().softmax(-1).flatten(0, 1).cpu()
            if not chances.isfinite().all():  # multinomial would say less
                raise not_finite("The answer of the model to a calibration batch")
            drawn = torch.multinomial(chances, 1, generator=generator).view(answer.shape[:2])
            along = F.cross_entropy(answer.transpose(1, 2), drawn.to(answer.device), reduction="none")
        else:
            direction = torch.randn(answer.shape, generator=generator).to(answer)
            if is_distribution(model, answer):
                direction = F.normalize(direction - direction.mean(-1, keepdim=True), dim=-1)
            along = (answer * direction).sum(-1)
        if along.ndim == 1:
            total = along.sum()
        else:
            mask = token_mask(batch, model, None, along)
            total = ((along * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()
        check_finite(total.detach(), "The answer of the model to a calibration batch")
        return total

    return loss


def answer_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The answer in float32, [B, C] or [B, T, C].

    Raises:
        DataError: the model gives nothing that is known to be an answer.
    """
    outputs = forward(model, batch)
    for name in ANSWERS:
        if outputs.get(name) is not None:
            return outputs[name].float()
    raise DataError(
        f"{type(model).__name__} gives {', '.join(outputs)}; importance needs one of {', '.join(ANSWERS)}. Use "
        "importance='magnitude'."
    )


def is_distribution(model: PreTrainedModel, answer: torch.Tensor) -> bool:
    """True for the logits of classes or tokens that exclude each other."""
    exclusive = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    return exclusive and answer.shape[-1] > 1 and model.loss_type is not None


def model_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Times the number of rows: the model's own loss if the batch has labels, else the cross-entropy of its own hard
    predictions.

    Two towers (CLIP) have to tell the pairs of the batch from all other combinations, as when they were trained.

    Raises:
        DataError: the model returns no logits, so there is no loss to measure importance with.
    """
    outputs = forward(model, batch)
    rows = len(next(iter(batch.values())))
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
    logits = outputs.logits.float()  # [B, C] or [B, T, C]
    if logits.ndim == 3:
        logits = logits[token_mask(batch, model, None, logits[..., 0]).bool()]
    if logits.shape[-1] == 1:
        return logits.square().mean() * rows
    return F.cross_entropy(logits, logits.argmax(-1)) * rows


def token_mask(batch: Batch, model: PreTrainedModel, stack: str | None, like: torch.Tensor) -> torch.Tensor:
    """`[B, T]` as `like`: 1 for each real token of a stack (None: of the answer), 0 for padding."""
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder and stack != "encoder":
        mask = batch.get("decoder_attention_mask")
        if mask is None and "labels" in batch:
            mask = batch["labels"] != IGNORED
    if mask is None or mask.shape != like.shape[:2]:
        return torch.ones(like.shape[:2], dtype=like.dtype, device=like.device)
    return mask.to(like)
