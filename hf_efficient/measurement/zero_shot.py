"""Zero-shot agreement: for how many images does a model like CLIP choose the text that its teacher chooses? No labels.

    agreement = zero_shot_agreement(student, teacher, processor, images, ["a photo of a cat", "a photo of a dog"])
    agreement.value, agreement.standard_error        # 0.96, 0.02

`images` are what the processor takes, such as PIL images; texts are padded together, and the best text of an image is
the one with the largest `logits_per_image` (Radford et al. 2021).
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import DataError, UnsupportedModelError, check_positive
from ..models.modes import evaluating
from ..reporting.schema import Score

_NEEDED = {"input_ids", "pixel_values"}


def zero_shot_agreement(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    batch_size: int = 32,
) -> Score:
    """The fraction of images whose best text is the same for both models, with its standard error.

    Parameters:
        processor: of both, an AutoProcessor: `processor(text=..., images=..., return_tensors="pt", padding=True)`.

    Raises:
        UnsupportedModelError: a model that does not compare texts with images.
        DataError: no image, or fewer than two different texts.
    """
    check_positive("batch_size", batch_size)
    for model in (student, teacher):
        if not set(inspect.signature(model.forward).parameters) >= _NEEDED:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not compare texts with images. Load a model such as CLIP with AutoModel."
            )
    if not len(images) or len(set(texts)) < max(2, len(texts)):
        raise DataError(
            f"Zero-shot agreement needs images and two or more texts that differ, got {len(images)} images and "
            f"{len(texts)} texts."
        )
    same = []
    with evaluating(student, teacher):
        for start in range(0, len(images), batch_size):
            batch = list(images[start : start + batch_size])
            inputs = processor(text=list(texts), images=batch, return_tensors="pt", padding=True)
            choices = [_best_texts(model, inputs) for model in (student, teacher)]
            same += (choices[0] == choices[1]).tolist()
    share = sum(same) / len(same)
    return Score("zero_shot_agreement", share, math.sqrt(share * (1 - share) / len(same)), True)


def _best_texts(model: PreTrainedModel, inputs: Any) -> torch.Tensor:
    """`[images]`"""
    output = model(**{name: value.to(model.device) for name, value in inputs.items()})
    scores = getattr(output, "logits_per_image", None)
    if scores is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits_per_image. Load a model such as CLIP with AutoModel."
        )
    return scores.argmax(-1).cpu()
