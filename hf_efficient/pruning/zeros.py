"""Train a model with zero weights so that they stay zero.

trainer = Trainer(model=sparse, ..., callbacks=[KeepZeros()])
"""

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UnsupportedModelError
from .linears import count_zeros, find_linears, parameter_of

NOTICED = 0.01  # below this fraction zeros are chance, such as an underflow


def was_sparsified(model: PreTrainedModel) -> bool:
    """True if at least a percent of the linears' weights is zero."""
    zeros, total = count_zeros(model)
    return zeros >= NOTICED * total


class KeepZeros(TrainerCallback):
    """The weights of the linears that are zero when training begins are zero after every step, and get no gradient.

    Raises:
        UnsupportedModelError: FSDP or DeepSpeed, when training begins.
    """

    def __init__(self) -> None:
        self.masks: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        if args.fsdp or args.deepspeed:
            raise UnsupportedModelError(
                "KeepZeros needs whole parameters on every process; FSDP and DeepSpeed shard them. Use DDP."
            )
        weights = {f"{linear.name}.weight": parameter_of(model, linear) for linear in find_linears(model)}
        self.masks = {name: weight.detach() == 0 for name, weight in weights.items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, mask in self.masks.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, mask in self.masks.items():
            model.get_parameter(name).masked_fill_(mask, 0)
