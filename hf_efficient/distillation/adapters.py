"""A PEFT student that learns from its own base model, so that there is one copy of the weights.

with without_adapters(student) as teacher:
    logits = teacher(**inputs).logits           # those of the model that the adapters were put into
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..models.modes import eval_mode
from ..training.batch import base_of


def own_base(student: nn.Module, args: Any) -> PreTrainedModel:
    """The base model of a PEFT student; ConfigError without adapters, or if settings would change the base."""
    if not isinstance(student, PeftModel):
        raise ConfigError(
            f"losses={list(args.losses)} need a teacher. Give teacher=AutoModelFor....from_pretrained(...) or a "
            "TeacherCache; losses={'ce': 1.0} needs none, and a PEFT student learns from its own base."
        )
    for name in ("teacher_dtype", "share_encoder"):
        if getattr(args, name):
            raise ConfigError(f"{name}={getattr(args, name)!r} needs a teacher of its own: student and base are one.")
    return base_of(student)


@contextmanager
def without_adapters(student: PeftModel) -> Iterator[PreTrainedModel]:
    """The base model in eval mode, its adapters off; afterwards all is as it was."""
    with eval_mode(student), student.disable_adapter():
        yield base_of(student)
