"""Which Auto class loads a model class: transformers' own tables, by exact names.

auto_class_of_architecture("MarianMTModel")                    # "AutoModelForSeq2SeqLM"
auto_class_of_architecture("EfficientWhisperForConditionalGeneration")  # "AutoModelForSpeechSeq2Seq"
auto_class_of_architecture("GPT2DoubleHeadsModel")             # None: no Auto class makes one
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

# A class may be in several tables: those that say most about its head come first, those for anything come last.
_FIRST = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForCTC",
    "AutoModelForRNNT",
    "AutoModelForTDT",
    "AutoModel",
)
_LAST = ("AutoModelForTextEncoding", "AutoModelForMultimodalLM", "AutoModelForPreTraining")
_EFFICIENT = "Efficient"
PREPARE = "prepare_decoder_input_ids_from_labels"

# All that `problem_type` of a config may be.
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


def state_problem(model: PreTrainedModel | None, problem: str | None) -> None:
    """Let a model with one label be trained as the labels are, where its config leaves that open.

    A score of yes or no is compared with its label by binary cross-entropy; left open, it would be taken for a number
    to hit (regression).
    """
    if model is not None and problem is not None and model.config.num_labels == 1:
        model.config.problem_type = model.config.problem_type or problem


def auto_class_of_architecture(name: str) -> str | None:
    """The Auto class that makes models of the class `name`; an efficient class counts as the stock one.

    `None` for a class that is in none of transformers' tables, and that nobody registered with an Auto class.
    """
    stock = name.removeprefix(_EFFICIENT)  # EfficientNetModel is a stock class
    return _auto_classes().get(name) or _auto_classes().get(stock) or _registered(name) or _registered(stock)


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether `decoder_inputs` works for this model."""
    return hasattr(model, PREPARE) or None not in _start_and_padding(model)


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The decoder's inputs for labels `[B, T]`, as the model makes them itself: shifted by one, -100 is padding.

    Whisper and other models of speech have no `prepare_decoder_input_ids_from_labels`; they all do this.
    """
    if hasattr(model, PREPARE):
        prepare: Any = getattr(model, PREPARE)
        return prepare(labels=labels)
    start, padding = _start_and_padding(model)
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, padding)


def _start_and_padding(model: PreTrainedModel) -> tuple[Any, Any]:
    config = model.config
    return getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)


def _tables() -> dict[str, type]:
    """Auto class by name, the most telling first."""
    names = [name for name in vars(modeling_auto) if name.startswith("AutoModel")]
    order = {name: place for place, name in enumerate((*_FIRST, *sorted({*names} - {*_FIRST, *_LAST}), *_LAST))}
    return {name: getattr(modeling_auto, name) for name in sorted(names, key=order.__getitem__)}


@cache
def _auto_classes() -> dict[str, str]:
    by_class: dict[str, str] = {}
    for auto, kind in _tables().items():
        for value in kind._model_mapping._model_mapping.values():
            for name in value if isinstance(value, (tuple, list)) else (value,):
                by_class.setdefault(name, auto)
    return by_class


def _registered(name: str) -> str | None:
    """Of classes that were given to `AutoModel....register`; not kept, more may come."""
    for auto, kind in _tables().items():
        for value in kind._model_mapping._extra_content.values():
            if name in [each.__name__ for each in (value if isinstance(value, (tuple, list)) else (value,))]:
                return auto
    return None
