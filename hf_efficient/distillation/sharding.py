"""A teacher whose weights are shared out among the processes, as FSDP2 does it with the student's.

teacher = shard_teacher(accelerator, teacher)
with resharded(teacher):
    teacher(**inputs)
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..models.anatomy import Anatomy
from ..models.registry import is_known


def shard_teacher(accelerator: Accelerator, teacher: PreTrainedModel) -> PreTrainedModel:
    """In place: each process keeps its part, and a layer is whole only while it runs.

    `Accelerator.prepare` would take the teacher for a second student; this is the function below it. It is told the
    teacher's own layers, where the plugin knows those of the student. (`_no_split_modules`, its default, would shard
    BERT's embeddings twice.)
    """
    plugin: Any = accelerator.state.fsdp_plugin
    policy, names = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    if isinstance(policy, functools.partial):  # the student's, already filled in
        plugin.auto_wrap_policy = policy.func
    layers = (
        [layer for stack in Anatomy.of(teacher).stacks for layer in stack.layers] if is_known(teacher.config) else []
    )
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers}) or None
    try:
        return fsdp2_prepare_model(accelerator, teacher.requires_grad_(False))
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, names


@contextmanager
def resharded(teacher: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Afterwards no process holds a whole weight: FSDP itself would keep embeddings and head until a backward."""
    try:
        yield teacher
    finally:
        for module in teacher.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
