"""Attention transfer: fit the learned parts of converted attention to the softmax attention that they replace.

    model = convert_attention(model, AttentionConfig("linear", feature_map="hedgehog"))
    model = transfer_attention(model, rows, TrainingArguments("out", max_steps=200, learning_rate=1e-2))

    loss = sum over layers of  1/N sum_i mean((variant(q, k, v)_i - softmax_attention(q, k, v)_i)^2)

i runs over the N real queries of one whole optimizer step, the inner mean over heads and dimensions. This is the first
stage of LoLCATs (Zhang et al. 2024, arXiv 2410.10254; Hedgehog, arXiv 2402.04347, compares the weights instead). Every
layer sees the queries, keys and values of the original model and hands on its softmax output (teacher forcing), so the
layers learn independently. All other weights are frozen, and dropout is off. The second stage is distillation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..attention.config import FEATURE_MAPS, KINDS, AttentionConfig
from ..attention.dispatch import ATTACHED, variant_of
from ..attention.engines.parts import full_attention
from ..attention.registry import ATTENTIONS
from ..attention.variant import AttentionVariant, HeadShape
from ..errors import ConfigError, UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.heads import PREPARE, SINGLE_LABEL
from ..models.modes import eval_mode
from ..models.registry import is_known
from ..models.token_masks import counts_columns, first_positions
from ..training.batch import REAL_ROWS, Batch, Head, forward_names
from ..training.forward import call_inside
from ..training.trainers import Counts, StepTrainer
from .losses.losses import hidden_loss

LEARNING_RATE = 1e-2


def transfer_attention(
    model: PreTrainedModel,
    train_dataset: Any,
    args: TrainingArguments | None = None,
    data_collator: Callable | None = None,
    *,
    resume_from_checkpoint: str | bool | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Train the learned parts of the converted attentions of `model`, in place; all its other weights stay bit-equal.

    Parameters:
        model: a converted model, some of whose attentions have learned parts.
        train_dataset: rows as the model takes them. Labels are not needed; those of an encoder-decoder make its
            decoder's inputs.
        args: as for any `Trainer`; default: one epoch in batches of 8 at a learning rate of 1e-2, nothing saved.
        data_collator, resume_from_checkpoint: as in `Trainer`.
        kwargs: more for `TransferTrainer`: `eval_dataset`, `processing_class`, `callbacks`, ...

    Returns:
        `model`, with the `requires_grad` and the mode (train or eval) that it had.

    Raises:
        UnsupportedModelError: the attention of the model is not converted, or has no learned parts.
        ConfigError: an option that cannot be honoured.
    """
    with TemporaryDirectory() as folder, eval_mode(model):  # the trainer changes it, and it comes back
        args = args or TrainingArguments(
            folder, num_train_epochs=1, learning_rate=LEARNING_RATE, save_strategy="no", report_to="none"
        )
        trainer = TransferTrainer(model, args, train_dataset=train_dataset, data_collator=data_collator, **kwargs)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return model


@dataclass(frozen=True)
class _Attention:
    """One converted attention: its variant, and the stack that its queries come from."""

    variant: AttentionVariant
    stack: str

    @property
    def is_learned(self) -> bool:
        return any(True for _ in self.variant.parameters())


class TransferTrainer(StepTrainer):
    """`Trainer` for attention transfer: `accelerate launch`, resume, `report_to` and mixed precision work as there.

    Parameters:
        model: a converted transformers model; only its attentions' learned parts are trained.
        args: as for any `Trainer`.
        kwargs: as in `Trainer`: `train_dataset`, `eval_dataset`, `processing_class`, `data_collator`, ...

    Logs `transfer_loss/encoder.0` for each attention (cross attention: `transfer_loss/decoder.0.cross`), whose sum is
    `loss`, and `transfer_error`: the squared error as a part of the squared softmax output, averaged over attentions
    (0: equal; 1: no better than an output of zeros). `evaluate` gives the same as `eval_...`; less is better, which
    `metric_for_best_model` must be told (`greater_is_better=False`).

    Raises:
        ConfigError, UnsupportedModelError: as `transfer_attention`.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any):
        if not isinstance(args, TrainingArguments):
            raise ConfigError(f"args must be TrainingArguments, got {type(args).__name__}.")
        for name in ("model_init", "compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"{name} cannot be used: TransferTrainer has its own loss, of a loaded model.")
        if args.torch_compile:
            raise ConfigError("torch_compile=True cannot be used: the loss is made inside the forward. Leave it out.")
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"A transformers model is needed, got {type(model).__name__}. For a PEFT model, call "
                "`merge_and_unload()` first, or add the adapters after the transfer."
            )
        self.attentions = find_attentions(model)
        check_learned(self.attentions)
        if not is_known(model.config) and args.save_strategy != "no":
            raise ConfigError('A model that was converted in memory cannot be saved: pass save_strategy="no".')
        super().__init__(model, args, **kwargs)
        self._names = forward_names(model)
        self._stacks = list(dict.fromkeys(attention.stack for attention in self.attentions.values()))
        self._shift = getattr(model, PREPARE, None)  # where labels make the decoder's inputs
        two = "decoder_input_ids" in self._names
        self.head = Head("tokens" if two else "examples", SINGLE_LABEL, 0, ("encoder", "decoder")[: 1 + two])

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer.train`; only the learned parts collect gradients meanwhile."""
        learned = {id(p) for attention in self.attentions.values() for p in attention.variant.parameters()}
        before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad = id(parameter) in learned
        try:
            return super().train(*args, **kwargs)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = before[name]

    def counts(self, inputs: dict[str, Any]) -> Counts:
        return {stack: mask.sum() for stack, mask in self._masks(inputs).items()}

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        for name in (name for name, attention in self.attentions.items() if attention.is_learned):
            self.train_meter.add(_loss_name(name), 0.0, 1.0)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss of the step; `num_items_in_batch` as `StepTrainer` says."""
        counts = self.counts(inputs) if num_items_in_batch is None else num_items_in_batch
        share = 1 if num_items_in_batch is None else self.accelerator.num_processes
        losses = {}
        for name, (error, energy) in self._errors(model, inputs).items():
            losses[name] = share * error / counts[self.attentions[name].stack].clamp_min(1)
            self.train_meter.add(_loss_name(name), losses[name].detach(), 0.0)
            self.train_meter.add(_error_name(name), error.detach(), energy)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, losses) if return_outputs else loss

    def _errors(
        self, model: torch.nn.Module, inputs: dict[str, Any], rows: int | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """For each learned attention the squared error, and the squared softmax output, summed over real queries."""
        model.eval()
        masks, kwargs = self._masks(inputs, rows), self._model_inputs(inputs)

        def body(forward: Callable) -> dict[str, tuple[Tensor, Tensor]]:
            with transferring(self.attentions, masks) as errors:
                forward(**kwargs)
            return errors

        return call_inside(model, self.accelerator.unwrap_model(model, keep_torch_compile=False), body)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the forward takes, never labels: no loss of the model's own, and no more logits than it must make."""
        kwargs = {name: value for name, value in inputs.items() if name in self._names - {"labels"}}
        if self._shift is not None and inputs.get("labels") is not None and inputs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self._shift(labels=Batch(inputs, self.head).labels)
        if counts_columns(self.model, self._names):
            kwargs |= first_positions(inputs)
        return kwargs | {n: v for n, v in {"use_cache": False, "logits_to_keep": 1}.items() if n in self._names}

    def _masks(self, inputs: dict[str, Any], rows: int | None = None) -> dict[str, Tensor]:
        """The real queries of each stack, `[B, T]`; `[B]` for images."""
        rows = inputs.get(REAL_ROWS) if rows is None else rows
        if self._shift is None:  # labels that say nothing about positions
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        masks = Batch(inputs, self.head, rows=rows).token_masks()
        if "vision" in self._stacks:
            images = {"pixel_values": inputs["pixel_values"]}
            masks["vision"] = Batch(images, self.head, rows=rows).token_masks()["encoder"]
        return {stack: masks.get(stack, masks["encoder"]) for stack in self._stacks}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Only the loss: there is nothing to predict."""
        inputs = self._prepare_inputs(inputs)
        rows = self.real_rows(inputs)
        counts = {stack: mask.sum() for stack, mask in self._masks(inputs, rows).items()}
        with torch.no_grad():
            errors = self._errors(model, inputs, rows)
        for name, (error, energy) in errors.items():
            self.eval_meter.add(_loss_name(name), error, counts[self.attentions[name].stack])
            self.eval_meter.add(_error_name(name), error, energy)
        return torch.stack([error for error, _ in errors.values()]).sum(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`; the losses are means over all real queries of the data set, not means of batch means."""
        self.eval_meter.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = _summary(self.eval_meter.drain(self.accelerator))
        metrics["loss"] = sum(value for name, value in metrics.items() if name.startswith(_loss_name("")))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of the attentions to what `Trainer` logs about training."""
        if "loss" in logs:
            logs.update(_summary(self.train_meter.drain(self.accelerator)))
        super().log(logs, start_time)


def _loss_name(name: str) -> str:
    return f"transfer_loss/{name}"


def _error_name(name: str) -> str:
    return f"transfer_error/{name}"


def _summary(means: dict[str, float]) -> dict[str, float]:
    """The loss of each attention, and one error for all."""
    errors = [value for name, value in means.items() if name.startswith(_error_name(""))]
    losses = {name: value for name, value in means.items() if name.startswith(_loss_name(""))}
    return losses | ({"transfer_error": sum(errors) / len(errors)} if errors else {})


def find_attentions(model: PreTrainedModel) -> dict[str, _Attention]:
    """Every converted attention of the model by its name: `encoder.0`, `decoder.3.cross`.

    In a family outside the table (converted in memory) the name is the path of the module.
    """
    if not is_known(model.config):
        paths = {name.removesuffix(f".{ATTACHED}"): module for name, module in model.named_modules()}
        attentions = {name: module for name, module in paths.items() if isinstance(module, AttentionVariant)}
        return {name: _Attention(variant, _stack_of(name)) for name, variant in attentions.items()}
    attentions = {}
    for stack in Anatomy.of(model).stacks:
        for key, attention in stack.attentions.items():
            ending = ".cross" if key == "cross_heads" else ""
            for index in stack.attending:
                variant = variant_of(stack.layers[index].get_submodule(attention.module))
                if variant is not None:
                    attentions[f"{stack.name}.{index}{ending}"] = _Attention(variant, stack.name)
    return attentions


def _stack_of(path: str) -> str:
    """The stack that a module of a family outside the table belongs to, by the names that transformers uses."""
    parts = path.split(".")
    return "vision" if "vision_model" in parts else "decoder" if "decoder" in parts else "encoder"


def check_learned(attentions: dict[str, _Attention]) -> None:
    """UnsupportedModelError if there is nothing to fit: no converted attention, or none with learned parts."""
    if any(attention.is_learned for attention in attentions.values()):
        return
    kinds = sorted({attention.variant.config.kind for attention in attentions.values()})
    reason = (
        f"The attention of this model ({', '.join(kinds)}) has no learned parts"
        if kinds
        else ("The attention of this model is not converted")
    )
    raise UnsupportedModelError(
        f"{reason}, so there is nothing to transfer. Kinds that have: {', '.join(learned_kinds())}; others need no "
        "transfer, or are trained with the whole model (DistillationTrainer)."
    )


def learned_kinds() -> list[str]:
    """The kinds with learned parts; of a kind that has them for some feature maps only, those."""
    learned = []
    for kind in ATTENTIONS:
        if "feature_map" not in KINDS[kind].fields:
            learned += [kind] * _is_learned(AttentionConfig(kind))
            continue
        maps = [name for name in FEATURE_MAPS if _is_learned(AttentionConfig(kind, feature_map=name))]
        learned += [kind] if len(maps) == len(FEATURE_MAPS) else [f"{kind} with feature_map={name!r}" for name in maps]
    return learned


def _is_learned(config: AttentionConfig) -> bool:
    return any(True for _ in ATTENTIONS[config.kind](config, HeadShape(1, 1, 2)).parameters())


@contextmanager
def transferring(
    attentions: dict[str, _Attention], masks: dict[str, Tensor]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within it every converted attention hands on the softmax output, and the learned ones note their errors."""
    errors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, attention in attentions.items():
        # On the instance, so that its class stays as it is; some models make a cache though they are not asked to.
        attention.variant.forward = _Forcing(name, attention, masks[attention.stack], errors)
        attention.variant.has_state = False
    try:
        yield errors
    finally:
        for attention in attentions.values():
            for name in ("forward", "has_state"):
                vars(attention.variant).pop(name, None)


@dataclass(frozen=True)
class _Forcing:
    """Stands in for one variant for the time of one forward."""

    name: str
    attention: _Attention
    mask: Tensor
    errors: dict[str, tuple[Tensor, Tensor]]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        *,
        window: int | None,
        dropout: float,
        **common: Any,
    ) -> Tensor:
        """The softmax output `[B, H, T, Dv]`, which carries no gradient; `dropout` is off, whatever the layer says."""
        with torch.no_grad():
            target = full_attention(query, key, value, key_mask, window=window, **common)
        if self.attention.is_learned:
            inputs = (query.detach(), key.detach(), value.detach(), key_mask)
            out = self.attention.variant.attend(*inputs, dropout=0.0, **common)
            out, wanted = _by_position(out), _by_position(target)
            error, _ = hidden_loss(out, wanted, self.mask)
            energy, _ = hidden_loss(wanted, torch.zeros_like(wanted), self.mask)
            self.errors[self.name] = error, energy
        return target


def _by_position(output: Tensor) -> Tensor:
    """[B, H, T, Dv] -> [B, T, H * Dv]."""
    return output.transpose(1, 2).flatten(2)
