"""`transformers.Trainer` with a teacher.

    args = DistillationArguments("out", losses={"ce": 0.5, "kd": 0.5}, temperature=4.0, learning_rate=5e-5)
    trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    student.save_pretrained("out/student")        # a plain transformers model

All else is as in `Trainer`: `accelerate launch`, resume, `compute_metrics`, PEFT, mixed precision.

16 examples give the same gradient as one batch, as 4 accumulated batches of 4, or on 2 processes: see `training`.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput

from ..errors import ConfigError
from ..models.checks import take_floats
from ..models.modes import eval_mode
from ..training.batch import Batch, Head, base_of, first_tokens
from ..training.forward import call_inside
from ..training.trainers import Counts
from .adapters import own_base, without_adapters
from .answers import Answer, agreement, read_answer
from .arguments import DistillationArguments
from .cache.cache import TeacherCache
from .checks import check_alone, check_separate, check_sharded
from .collating import CheckedCollator
from .generation import write
from .layer_map import Pairs
from .pairing import pair
from .projection_trainer import ProjectionTrainer
from .recorded import recording
from .sharding import resharded, shard_teacher
from .sums import sums_of
from .terms import LOSSES

AGREEMENT = "teacher_agreement"


class DistillationTrainer(ProjectionTrainer):
    """Train `model` on hard labels, on a teacher's soft labels and on its hidden states.

    Parameters:
        model: the student, a transformers model or a PEFT model around one.
        args: the losses and all training settings.
        teacher: a loaded model of the same kind. It is moved to the student's device, and runs in eval mode (its own
            comes back) without gradients; its weights and their `requires_grad` stay as they are, but under FSDP it is
            shared out among the processes. Or a `TeacherCache` of its answers to these data. Or `None`: a PEFT student
            then learns from its own base model, its adapters turned off (no second copy of the weights); any other
            needs none where `ce` is the only loss.
        kwargs: as in `Trainer`: `train_dataset`, `eval_dataset`, `processing_class`, `data_collator`, ...

    Logs `loss_<name>` for each term, unweighted; evaluation adds `eval_loss_<name>` and `eval_teacher_agreement`, the
    fraction of positions at which both models have the same argmax.

    Raises:
        ConfigError, UnsupportedModelError: the models cannot be compared, or would silently be trained wrongly.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: PreTrainedModel | TeacherCache | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, DistillationArguments):
            raise ConfigError(f"args must be DistillationArguments, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func cannot be used: DistillationTrainer has its own loss.")
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.teaches_itself = False  # `_connect` knows
        self._source = teacher if self.cache is None else self.cache.skeleton()
        if model is not None:
            self._connect(model, args)
        super().__init__(model, args, **kwargs)  # makes the student, where it is given as model_init
        if self.is_fsdp_enabled:
            check_sharded(args, teaches_itself=self.teaches_itself)
        models = [self.model] if self._source is None else [self.model, self._source]
        self.data_collator = CheckedCollator(self.data_collator, *models)
        if self.cache is not None:
            self.data_collator = self.cache.collator(self.data_collator)
        is_apart = self.cache is None and self._source is not None
        self.teacher = self._prepare_teacher(self._source) if is_apart else None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`: a new student for each trial of `hyperparameter_search`."""
        model = super().call_model_init(trial)
        self._connect(model, self.args)
        return model

    def _connect(self, model: nn.Module, args: DistillationArguments) -> None:
        """Find what is compared between this student and the teacher, where there is one."""
        take_floats(base_of(model))
        teacher = self._source
        if teacher is not None:
            check_separate(model, teacher)
        elif isinstance(model, PeftModel) or any(LOSSES[name].needs_teacher for name in args.losses):
            teacher, self.teaches_itself = own_base(model, args), True
        else:
            check_alone(args)
        self.pairing = pair(model, teacher, args, self.cache)
        self._compiled_forward: Callable | None = None
        if args.share_encoder:  # which is not run again for the student
            encoder: Any = base_of(model).get_encoder()
            encoder.requires_grad_(False)

    @property
    def head(self) -> Head:
        return self.pairing.head

    @property
    def pairs(self) -> Mapping[str, Mapping[str, Pairs]]:
        return self.pairing.pairs

    @property
    def projections(self) -> nn.ModuleDict:
        return self.pairing.projections

    def _prepare_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """On the device; never given to accelerate, which would take it for a second student."""
        if self.args.teacher_dtype is not None:
            teacher = teacher.to(getattr(torch, self.args.teacher_dtype))
        if self.is_fsdp_enabled:
            return shard_teacher(self.accelerator, teacher)
        is_placed = getattr(teacher, "hf_device_map", None) is not None or getattr(teacher, "is_quantized", False)
        return teacher if is_placed else teacher.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what either model reads: a BERT teacher needs the token_type_ids that a DistilBERT student ignores."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += sorted(set(self.pairing.names["teacher"]) - set(columns))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        for name in self.pairing.losses:
            self.train_meter.add(name, 0.0, 1.0)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def prepare_step(self, batches: list[dict], device: torch.device) -> list[dict]:
        """On-policy steps: the student writes anew what it is trained on. All ranks agree which steps those are."""
        step = f"{self.args.seed} {self.state.global_step}"
        if random.Random(step).random() >= self.args.on_policy:
            return batches
        student: Any = self.accelerator.unwrap_model(self.model)
        options = {"max_new_tokens": self.args.max_new_tokens, "sampling": self.args.sampling_temperature}
        # Seeded by the step: the Trainer restores the random state of a checkpoint only after these batches are made.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{step} {self.accelerator.process_index}").getrandbits(63))
            return [write(student, self._batch(self._prepare_inputs(inputs)), **options) for inputs in batches]

    def counts(self, inputs: dict[str, Any]) -> Counts:
        return self._counts(self._batch(inputs))

    def _batch(self, inputs: dict[str, Any], rows: int | None = None) -> Batch:
        return Batch(inputs, self.head, soft_positions=self.args.soft_positions, rows=rows)

    def _counts(self, batch: Batch) -> Counts:
        """The number of positions of each part of each loss in one batch."""
        masks = [mask for loss in self.pairing.losses.values() for mask in loss.masks(batch).items()]
        return {part: mask.sum() for part, mask in masks}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss of the step.

        `num_items_in_batch`: the `Counts` of `get_batch_samples`; without them, the mean over this batch alone.
        """
        batch = self._batch(inputs)
        counts = self._counts(batch) if num_items_in_batch is None else num_items_in_batch
        share = 1 if num_items_in_batch is None else self.accelerator.num_processes
        teacher = self._run_teacher(batch) if self.pairing.needs_teacher else None
        shares = {
            part: (share * self.args.losses[name], counts[part].clamp_min(1))
            for name in self.pairing.losses
            for part in self.parts_of(name)
            if part in counts and self.args.losses[name]
        }
        sums, logits = self._run_student(model, batch, teacher, shares)
        terms = {name: share * _mean(parts, counts) for name, parts in sums.items()}
        if num_items_in_batch is not None:
            for name, value in terms.items():
                self.train_meter.add(name, value.detach(), 0.0)
        loss = self._weighted(terms)
        return (loss, {"logits": self._outputs(logits)}) if return_outputs else loss

    def _run_student(
        self, model: nn.Module, batch: Batch, teacher: Answer | None, shares: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
        """The sums of all parts of all losses, and the logits, from inside the wrapped student's forward."""
        inputs = self._model_inputs("student", batch)
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        settings = replace(self.pairing.settings(self.args, progress), shares=shares or {})
        if self.args.share_encoder and teacher is not None:
            dtype = next(model.parameters()).dtype
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=teacher.encoded.to(dtype))

        def body(forward: Any) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
            with recording(self.pairing.recorded["student"]) as attentions:
                answer = read_answer(batch, self._compiled(forward)(**inputs), attentions)
            sums = sums_of(self.pairing.losses, batch, answer, teacher, settings)
            # Detached: DDP takes parameters that only these logits reach for unused, as they are.
            return sums, None if answer.logits is None else answer.logits.detach()

        return call_inside(model, self.accelerator.unwrap_model(model, keep_torch_compile=False), body)

    def _compiled(self, forward: Callable) -> Callable:
        """The student's forward, compiled once for the whole run where that was asked for."""
        if self.args.compile_student is None:
            return forward
        if self._compiled_forward is None:
            self._compiled_forward = torch.compile(forward, backend=self.args.compile_student)
        return self._compiled_forward

    @torch.no_grad()
    def _run_teacher(self, batch: Batch) -> Answer | None:
        if self._source is None and not self.teaches_itself:
            return None
        if self.cache is not None:
            return self.cache.answer(batch)
        inputs = self._model_inputs("teacher", batch)
        if self.args.teacher_max_length is not None:
            inputs = first_tokens(inputs, self.args.teacher_max_length)
        with (
            self._teacher() as teacher,
            eval_mode(teacher),  # whatever mode its owner puts it into
            self.accelerator.autocast(),
            recording(self.pairing.recorded["teacher"]) as attentions,
        ):
            return read_answer(batch, teacher(**inputs), attentions)

    def _teacher(self) -> AbstractContextManager[Any]:
        """The teacher, or the student as it was."""
        if self.teaches_itself:
            return without_adapters(self.accelerator.unwrap_model(self.model))
        return resharded(self.teacher) if self.is_fsdp_enabled else nullcontext(self.teacher)

    def _model_inputs(self, side: str, batch: Batch) -> dict[str, Any]:
        return self.pairing.inputs(side, batch, base_of(self.accelerator.unwrap_model(self.model)))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """As in `Trainer`, but only the logits are gathered, and only the `ce` loss needs labels."""
        inputs = self._prepare_inputs(inputs)
        batch = self._batch(inputs, rows=self.real_rows(inputs))
        inputs = batch.inputs  # whose labels lie where the logits are
        if batch.labels is None and "ce" in self.pairing.losses:  # predict() on unlabelled data
            with torch.no_grad():
                return None, self._outputs(batch.logits(model(**self._model_inputs("student", batch)))), None
        teacher = self._run_teacher(batch)
        with torch.no_grad():
            sums, logits = self._run_student(model, batch, teacher)
        counts = self._counts(batch)
        for part, total in (item for parts in sums.values() for item in parts.items()):
            self.eval_meter.add(part, total, counts[part])
        self.eval_meter.add(AGREEMENT, *agreement(batch, logits, teacher, self.pairing.vocabulary))
        loss = self._weighted({name: _mean(parts, counts) for name, parts in sums.items()})
        if prediction_loss_only:
            return loss, None, None
        has_labels = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        labels = nested_detach(tuple(inputs[name] for name in self.label_names)) if has_labels else None
        return loss, self._outputs(logits), labels[0] if labels is not None and len(labels) == 1 else labels

    def _outputs(self, logits: Tensor | None) -> Any:
        """As `Trainer` gives them to `compute_metrics`: the start and end logits of spans apart."""
        return tuple(logits.unbind(1)) if logits is not None and self.head.kind == "spans" else logits

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`; the losses are means over all positions of the data set, not means of batch means."""
        self.eval_meter.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.eval_meter.drain(self.accelerator)
        terms: dict[str, float] = {}
        for name, loss in self.pairing.losses.items():
            parts = [value for part, value in means.items() if part in loss.parts]
            if parts:
                terms[name] = sum(parts)
        metrics = {f"loss_{name}": value for name, value in terms.items()}
        if terms:
            metrics["loss"] = self._weighted(terms)
        if AGREEMENT in means:
            metrics[AGREEMENT] = means[AGREEMENT]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the unweighted terms to what `Trainer` logs about training; their weighted sum is `loss`."""
        if "loss" in logs:
            logs.update({f"loss_{name}": value for name, value in self.train_meter.drain(self.accelerator).items()})
        super().log(logs, start_time)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The parts of one loss, as they are counted and summed."""
        return self.pairing.losses[name].parts

    def _weighted(self, terms: dict[str, Any]) -> Any:
        return sum(self.args.losses[name] * value for name, value in terms.items())


def _mean(parts: dict[str, Tensor], counts: Counts) -> Tensor:
    """The mean of a term: each part over its own count; 0, connected to the graph, where nothing counts."""
    return torch.stack([total / counts[part].clamp_min(1) for part, total in parts.items()]).sum()
