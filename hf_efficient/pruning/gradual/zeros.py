"""Train a model with zeros so that they stay zero.

trainer = Trainer(model=sparse, ..., callbacks=[KeepZeros()])
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import UnsupportedModelError
from ...models.anatomy import Anatomy
from ..cut.linears import count_zeros, find_linears, parameter_of

NOTICED = 0.01  # below this fraction zeros are chance, such as an underflow


def was_sparsified(model: PreTrainedModel) -> bool:
    """True if at least a percent of the linears' weights is zero."""
    zeros, total = count_zeros(model)
    return zeros >= NOTICED * total


class HeldZeros:
    """Parts of parameters that are zero and stay so: the weights, their gradients, and the optimizer's moments.

        held = HeldZeros(model)
        held.hold({"classifier.weight": mask})      # bool, of a shape that broadcasts to the parameter's; True: zero
        held.apply(optimizer)                       # after each optimizer step
        held.release()

    Gradients are cleared on their way into `.grad`, so neither accumulation nor clipping nor the average of DDP sees
    what belongs to a zero; an overflow there makes no step of a loss scaler fail.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._masks: dict[str, Tensor] = {}
        self._hooks: dict[str, RemovableHandle] = {}

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """From now on these, by the names of parameters."""
        for name, mask in masks.items():
            parameter = self._model.get_parameter(name)
            self._masks[name] = mask.to(parameter.device)
            if parameter.requires_grad and name not in self._hooks:
                self._hooks[name] = parameter.register_hook(
                    lambda gradient, name=name: gradient.masked_fill(self._masks[name], 0)
                )

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Make it so: the weights, and every moment that has their shape."""
        for name, mask in self._masks.items():
            parameter = self._model.get_parameter(name)
            parameter.masked_fill_(mask, 0)
            for moment in optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.is_floating_point():
                    moment.masked_fill_(mask, 0)

    def release(self) -> None:
        """Let go of model and gradients."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._masks = {}, {}


def check_sharding(args: TrainingArguments, name: str) -> None:
    """UnsupportedModelError under FSDP and DeepSpeed: parameters in pieces."""
    if args.fsdp or args.deepspeed:
        raise UnsupportedModelError(
            f"{name} needs whole parameters on every process; FSDP and DeepSpeed shard them. Use DDP."
        )


class KeepZeros(TrainerCallback):
    """The weights of the linears that are zero when training begins are zero after every step, and get no gradient.

    Raises:
        UnsupportedModelError: FSDP or DeepSpeed, when training begins.
    """

    def __init__(self) -> None:
        self.held: HeldZeros | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        check_sharding(args, "KeepZeros")
        self._release()
        weights = {f"{linear.name}.weight": parameter_of(model, linear) for linear in find_linears(Anatomy.of(model))}
        self.held = HeldZeros(model)
        self.held.hold({name: weight.detach() == 0 for name, weight in weights.items()})

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        if self.held is not None:
            self.held.apply(optimizer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._release()

    def _release(self) -> None:
        if self.held is not None:
            self.held.release()
        self.held = None
