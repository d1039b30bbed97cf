"""The settings of a distillation run: those of `transformers.TrainingArguments` and `DistillationOptions`.

    DistillationArguments(output_dir="out", losses={"ce": 0.5, "kd": 0.5, "hidden": 1.0}, temperature=4.0)

Loss = sum of weight x term; each term is a mean over its own positions of one whole optimizer step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import ConfigError
from .options import DistillationOptions, check_name
from .terms import LOSSES

logger = logging.get_logger(__name__)


@dataclass
class DistillationArguments(DistillationOptions, TrainingArguments):
    """`TrainingArguments` with the fields of distillation; the help of each field says what it means.

    Raises:
        ConfigError: a value that is not allowed, or a TrainingArguments option that distillation cannot honour.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "losses"]

    def __post_init__(self) -> None:
        DistillationOptions.__post_init__(self)
        readers = [name for name in self.losses if LOSSES[name].needs_attentions]
        if self.compile_student is not None:
            check_name("compile_student", self.compile_student, torch._dynamo.list_backends(None))
            if readers:
                raise ConfigError(
                    f"compile_student hides the attentions that {' and '.join(f'`{n}`' for n in readers)} look into. "
                    "Leave one of them out."
                )
        if self.greater_is_better is None and "loss_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # TrainingArguments knows only names that end in `loss`
        TrainingArguments.__post_init__(self)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # so called from 5.23 on
            options = getattr(self, name, None) or {}
            if readers and options.get("use_reentrant"):
                # Reentrant checkpointing runs layers without gradients first: what is noted there would have none.
                logger.warning(f"The losses {', '.join(readers)} look into attentions: use_reentrant is set to False.")
                setattr(self, name, options | {"use_reentrant": False})
        reasons = {
            "label_smoothing_factor": "the teacher's soft labels take its place",
            "use_liger_kernel": "its fused loss does not give the logits that kd compares",
            "torch_compile": "the losses run in the student's forward, which would be compiled anew at every step; "
            "compile_student='inductor' compiles the forward alone",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} cannot be used: {reason}. Leave it out.")
