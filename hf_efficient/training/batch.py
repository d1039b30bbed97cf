"""What a batch means for the losses: which labels belong to which outputs, and which positions count.

    head = head_of(model)                          # Head(kind="causal_lm", ...)
    batch = Batch(inputs, head)
    labels, mask = batch.label_targets()           # aligned with the logits: y[t + 1] for a causal model
    logits = batch.logits(model(**inputs))         # one tensor, whatever the head calls its outputs

The masks made here are both what a loss sums over and what its denominator counts, so the two cannot disagree.
"""

import inspect
import typing
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..data.tasks import TASKS
from ..errors import DataError, UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.frames import Frames, frames_of
from ..models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL, auto_class_of_architecture, decoder_inputs
from ..models.registry import is_known
from ..models.token_masks import IGNORED, from_first, real_labels, token_masks

# How labels and logits are aligned, by the Auto class of the model's class: that of a task, or one like it. Scores are
# examples with one label.
AUTO_KINDS = {task.auto_class: task.kind for task in TASKS.values() if task.kind != "scores"} | {
    "AutoModelForSeq2SeqLM": "causal_lm",  # "tokens" where there is a decoder of its own
    "AutoModelForSpeechSeq2Seq": "causal_lm",
    "AutoModelForImageTextToText": "causal_lm",
    "AutoModelForAudioClassification": "examples",
    "AutoModelForVideoClassification": "examples",
    "AutoModelForDocumentQuestionAnswering": "spans",
    "AutoModelForTextEncoding": "embeddings",
}
# For classes that no Auto class makes: the loss that transformers gives them (`PreTrainedModel.loss_type`).
LOSS_KINDS = {auto.removeprefix("AutoModel"): kind for auto, kind in AUTO_KINDS.items() if auto != "AutoModel"}
LOSS_KINDS["ForConditionalGeneration"] = "causal_lm"
# What the forward of each kind takes and gives beside its inputs.
TAKES = {"spans": "start_positions"}
GIVES = {"spans": "start_logits", "embeddings": "last_hidden_state"}
KINDS = ("causal_lm", "tokens", "examples", "spans", "embeddings")
LABELS = frozenset({"labels", "start_positions", "end_positions"})
REAL_ROWS = "real_rows"  # beside the tensors of a batch: how many of its examples count


@dataclass(frozen=True)
class Head:
    """What a model's head predicts.

    kind: `causal_lm` (logits[t] predict labels[t + 1]), `tokens` (logits[t] predict labels[t]), `examples`, `spans`
        (the first and the last token of an answer), `ctc` (logits[t] spell a frame, and which label that is nobody
        says) or `embeddings` (no head: hidden states alone).
    num_labels: the classes of a classification head, else 0.
    problem: transformers' `problem_type`, `None` while it has to be guessed from the labels.
    stacks: `("encoder", "decoder")` where the forward takes decoder inputs, else `("encoder",)`.
    is_causal: the only stack is a decoder: its tokens see those before them.
    """

    kind: str
    problem: str | None
    num_labels: int
    stacks: tuple[str, ...] = ("encoder",)
    is_causal: bool = False


@dataclass(frozen=True)
class FramesHead(Head):
    """A head of kind `ctc`, and the frames that it spells."""

    _: KW_ONLY
    frames: Frames = field(compare=False, repr=False)

    def is_like(self, other: Head) -> bool:
        """Whether each frame of the one can be compared with that of the other."""
        lengths = torch.arange(1_000, 20_000, 97)  # of sounds
        return (
            isinstance(other, FramesHead)
            and self.frames.blank == other.frames.blank
            and torch.equal(self.frames.count(lengths), other.frames.count(lengths))
        )


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, or the model itself."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def forward_names(model: nn.Module) -> frozenset[str]:
    """The names that the model's forward takes by name; transformers forwards swallow any other in silence."""
    parameters = inspect.signature(base_of(model).forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def head_of(model: nn.Module) -> Head:
    """By the model's class, config and forward; UnsupportedModelError for a head whose losses are not known."""
    base, names = base_of(model), forward_names(model)
    stacks = ("encoder", "decoder") if "decoder_input_ids" in names else ("encoder",)
    auto = next(filter(None, (auto_class_of_architecture(kind.__name__) for kind in type(base).__mro__)), None)
    kind = AUTO_KINDS.get(auto or "") if auto is not None else LOSS_KINDS.get(base.loss_type or "")
    if kind is None and auto is None and base.get_output_embeddings() is not None and base.can_generate():
        kind = "causal_lm"  # GPT2DoubleHeadsModel
    if kind is None and auto is None and not type(base).__module__.startswith("transformers."):
        kind = "embeddings"  # a class of one's own, if it is like those of AutoModel
    fields_of = _given_by(base)
    if kind is None and auto is None and fields_of is not None and "last_hidden_state" in fields_of:
        kind = "embeddings"  # a tower (SiglipTextModel)
    output = GIVES.get(kind or "", "logits")
    if kind == "embeddings":  # one text or one image, and no labels: `BertModel`, `ViTModel`; not `CLIPModel`
        fits = len(stacks) == 1 and not LABELS & names and len({"input_ids", "pixel_values"} & names) == 1
    else:
        fits = TAKES.get(kind or "", "labels") in names
    if kind is None or not fits or (fields_of is not None and output not in fields_of):
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot be distilled: its head is none of those whose losses are known. Load the "
            "model with one of AutoModelForSequenceClassification, ForTokenClassification, ForQuestionAnswering, "
            "ForMaskedLM, ForCausalLM, ForSeq2SeqLM, ForSpeechSeq2Seq, ForCTC or ForImageClassification; or, for "
            "embeddings, an encoder or decoder with AutoModel (T5EncoderModel for T5)."
        )
    if kind == "causal_lm" and len(stacks) == 2:
        kind = "tokens"
    is_decoder = is_known(base.config) and [stack.name for stack in Anatomy.of(base).stacks] == ["decoder"]
    has_classes = kind == "examples" or "ForTokenClassification" in (auto or base.loss_type or "")
    if kind == "ctc":
        return FramesHead(kind, SINGLE_LABEL, 0, stacks, frames=frames_of(base))
    return Head(
        kind=kind,
        problem=base.config.problem_type if kind == "examples" else SINGLE_LABEL,
        num_labels=base.config.num_labels if has_classes else 0,
        stacks=stacks,
        is_causal=len(stacks) == 1 and (kind == "causal_lm" or is_decoder),
    )


def _given_by(model: PreTrainedModel) -> set[str] | None:
    """The fields of what the forward gives, by its annotation; `None` without one."""
    hint = inspect.signature(model.forward).return_annotation
    kinds = [each for each in (hint, *typing.get_args(hint)) if isinstance(each, type)]
    outputs = [each for each in kinds if issubclass(each, ModelOutput) and each is not ModelOutput]
    return {item.name for each in outputs for item in fields(each)} or None


class Batch:
    """One batch with its masks.

    Parameters:
        inputs: the collated tensors by name.
        head: the student's.
        soft_positions: for soft labels of token models, `labels` (where a label counts, if there are labels) or
            `attended` (everything that is not padding).
        rows: only the first `rows` examples count (a sampler repeats examples to fill the last batch); default: what
            the batch itself says, else all.
    """

    def __init__(self, inputs: dict[str, Any], head: Head, *, soft_positions: str = "labels", rows: int | None = None):
        if REAL_ROWS in inputs:
            rows = inputs[REAL_ROWS] if rows is None else rows
            inputs = {name: value for name, value in inputs.items() if name != REAL_ROWS}
        self.labels = _labels(inputs, head)
        is_moved = head.kind != "spans" and self.labels is not inputs.get("labels")
        self.inputs = {**inputs, "labels": self.labels} if is_moved else inputs
        self.head = head
        self.soft_positions = soft_positions
        first = self.labels if self.labels is not None else next(v for v in inputs.values() if torch.is_tensor(v))
        self.size, self.device = first.shape[0], first.device
        self.rows = self.size if rows is None else min(rows, self.size)

    @property
    def problem(self) -> str:
        if self.head.problem is not None:
            return self.head.problem
        if self.head.num_labels == 1:
            return REGRESSION
        return SINGLE_LABEL if self.labels is None or not self.labels.is_floating_point() else MULTI_LABEL

    def label_targets(self) -> tuple[Tensor, Tensor]:
        """Labels aligned with the logits, and where they count; DataError if there are no labels."""
        if self.labels is None:
            raise DataError(
                f"The `ce` loss needs labels, this batch has only {', '.join(self.inputs)}. Add a `labels` column, or "
                'train on the teacher alone with losses={"kd": 1.0}.'
            )
        labels = self.labels
        if self.head.kind == "spans":  # positions behind the end of a text that was cut are nowhere in it
            tokens = self.token_masks()["encoder"]
            inside = (labels >= 0) & (labels < tokens.shape[1])
            return labels, self._real(inside & tokens.gather(1, labels.clamp(0, tokens.shape[1] - 1)))
        if self.head.kind in ("causal_lm", "tokens"):
            mask = self.token_masks()[self.head.stacks[-1]]
            labels = real_labels(labels, mask, ahead=int(self.head.kind == "causal_lm"))
        if self.head.kind == "causal_lm":
            labels = torch.cat([labels[:, 1:], labels.new_full((self.size, 1), IGNORED)], dim=1)
        if self.head.kind != "examples" or self.problem == SINGLE_LABEL:
            labels = labels.view(self.size) if self.head.kind == "examples" else labels
            return labels, self._real(labels != IGNORED)
        labels = labels.view(self.size, self.head.num_labels)
        return labels, self._real(torch.ones_like(labels, dtype=torch.bool))

    def label_mask(self) -> Tensor:
        """Where the labels count, of the shape of `label_targets`."""
        return self.label_targets()[1]

    def soft_mask(self) -> Tensor:
        """Where the student's outputs are compared with the teacher's.

        [batch, length] for tokens; [batch, frames]; [batch] or [batch, labels] for examples; [batch, 2] for spans.
        """
        if self.head.kind == "spans":
            return self._real(torch.ones((self.size, 2), dtype=torch.bool, device=self.device))
        if self.head.kind == "embeddings":
            return self.example_mask()
        if self.head.kind == "examples":
            shape = (self.size,) if self.problem == SINGLE_LABEL else (self.size, self.head.num_labels)
            return self._real(torch.ones(shape, dtype=torch.bool, device=self.device))
        if self.labels is not None and self.soft_positions == "labels" and self.head.kind != "ctc":
            return self.label_targets()[1]
        return self.token_masks()[self.head.stacks[-1]]

    def model_inputs(self, names: Collection[str], model: PreTrainedModel) -> dict[str, Any]:
        """What a forward that takes `names` is given: never labels, and for seq2seq the decoder inputs of `model`.

        So no model computes a loss of its own, and both get the same decoder inputs.
        """
        inputs = {name: value for name, value in self.inputs.items() if name in names and name not in LABELS}
        seq2seq = self.head.kind == "tokens" and len(self.head.stacks) == 2
        if seq2seq and inputs.get("decoder_input_ids") is None and self.labels is not None:
            inputs["decoder_input_ids"] = decoder_inputs(model, self.labels)
        if "use_cache" in names:
            inputs["use_cache"] = False
        return inputs

    def example_mask(self) -> Tensor:
        """[batch]"""
        return self._real(torch.ones(self.size, dtype=torch.bool, device=self.device))

    def logits(self, outputs: Any) -> Tensor | None:
        """What the head says: [batch, length, classes] or [batch, classes]; of spans [batch, 2, length].

        An answer cannot begin or end in padding: the logits of spans are the lowest number there.
        """
        if self.head.kind == "embeddings":
            return None
        if self.head.kind != "spans":
            return outputs.logits
        return self.span_logits(outputs.start_logits, outputs.end_logits)

    def span_logits(self, start: Tensor, end: Tensor) -> Tensor:
        """[batch, 2, length] from two [batch, length]."""
        both = torch.stack([start, end], dim=1)
        return both.masked_fill(~self.token_masks()["encoder"][:, None], torch.finfo(both.dtype).min)

    def token_masks(self) -> dict[str, Tensor]:
        """Positions that are not padding, for each stack: [batch, length or frames], or [batch] for images."""
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = self.inputs.get(name)
            if mask is not None and mask.dim() != 2:
                raise DataError(
                    f"`{name}` has shape {tuple(mask.shape)}; distillation needs [batch, length] (1 token, 0 padding)."
                )
        if isinstance(self.head, FramesHead):
            return {"encoder": self._real(self.head.frames.mask(self.inputs))}
        say_positions = self.head.kind == "tokens"
        inputs = {name: value for name, value in self.inputs.items() if say_positions or name != "labels"}
        masks = token_masks(inputs, has_decoder=len(self.head.stacks) == 2)
        return {stack: self._real(mask) for stack, mask in masks.items()}

    def _real(self, mask: Tensor) -> Tensor:
        if self.rows < self.size:
            mask = mask.clone()
            mask[self.rows :] = False
        return mask


def _labels(inputs: dict[str, Any], head: Head) -> Tensor | None:
    """`labels`; of spans [batch, 2] from `start_positions` and `end_positions`.

    Those from which a decoder's inputs are made begin in the first column.
    """
    if head.kind != "spans":
        labels = inputs.get("labels")
        is_read = head.kind == "tokens" and len(head.stacks) == 2 and inputs.get("decoder_input_ids") is None
        return from_first(labels) if is_read and labels is not None else labels
    ends = [inputs.get("start_positions"), inputs.get("end_positions")]
    return None if any(end is None for end in ends) else torch.stack([end.flatten() for end in ends], dim=1)


def first_tokens(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The inputs with the first `length` real tokens of each row, on whichever side its padding is."""
    ids = inputs["input_ids"]
    spare = ids.shape[1] - length
    if spare <= 0:
        return inputs
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    start = mask.long().argmax(1, keepdim=True).clamp(max=spare)  # a row that is short enough keeps its padding
    index = start + torch.arange(length, device=ids.device)
    by_token = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.shape == ids.shape}
    return inputs | {name: value.gather(1, index) for name, value in by_token.items()}
