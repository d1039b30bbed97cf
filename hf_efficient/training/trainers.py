"""What our trainers add to transformers' `Trainer`: exact checkpoints, and a loss that does not depend on the split.

    class MyTrainer(StepTrainer): ...        # ExactTrainer + one denominator for each optimizer step

**Checkpoints**: all of one, or none, and every weight of it comes back. transformers 5 writes some families (ViT)
under the parameter names of older versions, and `from_pretrained` translates them; but `Trainer` reads a checkpoint
back without translating and drops what it does not know. A resumed run, or `load_best_model_at_end`, then goes on from
other weights, with a warning at most (seen in 5.23).

**Denominators**: the loss of one optimizer step is sum_k w_k S_k / N_k, where S_k sums term k, and N_k counts its
positions, over all micro-batches and all processes. So 16 examples give the same gradient as one batch, as 4
accumulated batches of 4, or on 2 processes. With W processes each rank returns W sum_k w_k S_k / N_k, because DDP
averages gradients.
"""

import copy
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..errors import TrainingError
from ..models.loading import load_model
from ..models.token_masks import real_inputs
from .batch import REAL_ROWS, base_of
from .checks import check_run
from .lengths import BY_LENGTH, GroupedSampler, row_lengths
from .meter import Meter
from .ranks import count, from_main
from .resuming import STATE, check_moments, check_schedule, check_state, clear_faults

Counts = dict[str, Tensor]

WEIGHTS = "model.safetensors"
COMPLETE = "complete"  # marks a checkpoint that was written to its end
NEVER = 1 << 62  # a step that is not reached
SAVE_SECONDS = 300.0  # of training that a killed run may lose
SAVE_STEPS = 8  # between two looks at the clock

T = TypeVar("T")
logger = logging.get_logger(__name__)


class ExactTrainer(Trainer):
    """As `Trainer`; what it restores is what was saved, and what it saves is finite.

    Raises:
        TrainingError: a loss that is nan or infinite, before the weights are changed by it; or such trained weights,
            before they are saved. The Trainer waits for the loss of every batch anyway, unless it is told
            `logging_nan_inf_filter=False`: then ours is looked at where it logs, evaluates, saves or stops. Steps
            that a gradient scaler skips under fp16 have a finite loss and are no fault.
    """

    _first_broken: Tensor | None = None  # the first step whose loss was not finite
    _resumed: str | None = None  # the checkpoint that training goes on from

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer.train`; CheckpointError if the checkpoint to resume from is damaged."""
        self._first_broken = None
        resume = args[0] if args else kwargs.get("resume_from_checkpoint")
        checkpoint = get_last_checkpoint(self.args.output_dir) if resume is True else resume
        if checkpoint and Path(checkpoint, STATE).is_file():
            check_state(checkpoint)
        self._resumed = checkpoint or None
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in `Trainer`; rows that are grouped by length come in the same order in a run that was stopped."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = row_lengths(rows) if self.args.train_sampling_strategy == BY_LENGTH else None
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Rows in their order: `Trainer` would give the answers of `predict` in another one where rows are grouped."""
        if self.args.train_sampling_strategy != BY_LENGTH:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`; labels that padding would predict are taken out before they are counted."""
        return super().get_batch_samples(map(self._real, epoch_iterator), num_batches, device)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, of real tokens."""
        return super().prediction_step(model, self._real(inputs), *args, **kwargs)

    def _real(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return real_inputs(inputs, base_of(self.accelerator.unwrap_model(self.model)))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        step = torch.where(loss.isfinite(), NEVER, self.state.global_step + 1)
        self._first_broken = step if self._first_broken is None else torch.minimum(self._first_broken, step)
        if self.args.logging_nan_inf_filter:
            self._check_loss()
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._check_loss()
        if control.should_save or control.should_training_stop:
            self._check_weights()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def broken_terms(self) -> list[str]:
        """The parts of the loss that are not finite, where a trainer keeps them apart."""
        return []

    def _check_loss(self) -> None:
        step = NEVER if self._first_broken is None else int(self._first_broken)
        if step < NEVER:
            terms = ", ".join(self.broken_terms())
            which = f" ({terms})" if terms else ""
            raise TrainingError(f"The loss{which} is nan or infinite at step {step}{self._what_to_do()}")

    def _check_weights(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # each process has parts of them; the next loss tells
            return
        weights = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
        broken = [name for name, weight in weights if not weight.isfinite().all()]
        if broken:
            what = f"{len(broken)} trained weights, the first is {broken[0]}, are nan or infinite after"
            raise TrainingError(f"{what} step {self.state.global_step}{self._what_to_do()}")

    def _what_to_do(self) -> str:
        fp16 = " Under fp16, try bf16 or no mixed precision." if self.args.fp16 else ""
        return (
            f" of {self.state.max_steps}. Training stops, and nothing more is saved. Lower learning_rate (now "
            f"{self.args.learning_rate:g}) or the weight of that loss, or warm up longer.{fp16} If it is step 1, look "
            "for nan in the data and in the model that training began with."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with clear_faults(resume_from_checkpoint, WEIGHTS):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            restore_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        schedule = Path(checkpoint, SCHEDULER_NAME)
        with clear_faults(checkpoint, SCHEDULER_NAME):
            if schedule.is_file():
                check_schedule(torch.load(schedule, weights_only=True), self.lr_scheduler.state_dict())
        with clear_faults(checkpoint, OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_moments(self.optimizer)

    def _load_rng_state(self, checkpoint):
        if checkpoint is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        with clear_faults(checkpoint, name):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self):
        with clear_faults(self._resumed or self.args.output_dir, STATE):
            super()._load_callback_state()

    def _issue_warnings_after_load(self, load_result):
        """Tied weights are saved once: what shares its tensor with one that was there is not missing."""
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        there = {id(weight) for name, weight in weights.items() if name not in missing}
        load_result.missing_keys[:] = [n for n in load_result.missing_keys if id(weights.get(n)) not in there]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self):
        super()._load_best_model()
        restore_renamed(self.model, self.state.best_model_checkpoint)


class StepTrainer(ExactTrainer):
    """A trainer that counts what its loss is divided by over the whole optimizer step (see the module docstring).

    A subclass gives `counts`, and a `compute_loss` whose `num_items_in_batch` are the counts of the step. It adds what
    it logs to `train_meter` and `eval_meter`.

    Raises:
        ConfigError: a way of running in which the loss would be wrong.
    """

    # compute_loss divides by the counts of the whole step (transformers >= 5.19 asks; before, see __init__)
    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel | nn.Module, args: TrainingArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        zero_stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        check_run(args, fsdp_version=plugin.fsdp_version if plugin else None, zero_stage=zero_stage)
        self.model_accepts_loss_kwargs = True  # how transformers < 5.19 is told that the loss is scaled
        self.train_meter, self.eval_meter = Meter(), Meter()

    def counts(self, inputs: dict[str, Any]) -> Counts:
        """The positions of each part of the loss in one batch."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step and the denominators of all terms, with one collective."""
        batches = self.prepare_step([self._counted(inputs) for inputs in islice(epoch_iterator, num_batches)], device)
        counts = [self.counts(inputs) for inputs in batches]
        if not counts:
            return batches, None
        names = list(counts[0])
        local = torch.stack([torch.stack([c[name] for c in counts]).sum() for name in names]).to(device)
        return batches, dict(zip(names, self.accelerator.reduce(local, reduction="sum"), strict=True))

    def prepare_step(self, batches: list[dict], device: torch.device) -> list[dict]:
        """The micro-batches of one optimizer step, as they will be trained on."""
        return batches

    def broken_terms(self) -> list[str]:
        return self.train_meter.broken()

    def _counted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch, which says how many of its examples count where some fill up the last one of an epoch."""
        rows = self.real_rows(inputs) if self.accelerator.num_processes > 1 else None
        return inputs if rows is None else {**inputs, REAL_ROWS: rows}

    def real_rows(self, inputs: dict[str, Any]) -> int | None:
        """How many examples of a batch are not repeats that fill the last batch of all ranks."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return None
        return max(0, state.remainder - self.accelerator.process_index * find_batch_size(inputs))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer.train`."""
        # evaluate() before train() marks the model as prepared, and train() would then not wrap it in DDP.
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            vars(self.model)["_is_accelerate_prepared"] = False
        self.train_meter.clear()
        return super().train(*args, **kwargs)


def restore_renamed(model, checkpoint: str | Path) -> None:
    """Load the weights as transformers translates them if the file has names that the model does not know."""
    path = Path(checkpoint) / WEIGHTS
    if not isinstance(model, PreTrainedModel) or not path.is_file():
        return  # adapters, FSDP and DeepSpeed have formats of their own
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    if names <= set(model.state_dict()):
        return
    saved = load_model(type(model), checkpoint, config=copy.deepcopy(model.config), dtype=model.dtype)
    model.load_state_dict(saved.state_dict(), strict=False)  # what is not in the file stays as it is


class MarkComplete(TrainerCallback):
    """A killed run may leave half a checkpoint; only marked ones are resumed from."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class SaveNowAndThen(TrainerCallback):
    """A checkpoint every few minutes, whatever an epoch takes, so that a killed run loses no more than that."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # The clock of one process says it for all.
        if state.global_step % SAVE_STEPS == 0 and from_main(lambda: time.monotonic() - self.last > SAVE_SECONDS):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        self.last = time.monotonic()


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run with `MarkComplete`, None if there is none."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def in_smaller_batches(work: Callable[[int], T], batch_size: int, seed: int) -> tuple[T, int]:
    """`work(batch_size)`; where memory runs out, again with smaller batches, and so on.

    `work(size)` must accumulate `batch_size // size` batches for each optimizer step, which keeps the gradient (see
    the module docstring), and go on from its last checkpoint. The random state is set again by `seed` before each
    further try.

    Returns:
        What `work` returned, and the batch size it had, a divisor of the one asked for.

    Raises:
        TrainingError: a single example does not fit.
    """
    size = batch_size
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if count() > 1:  # the others are in the middle of a step
                raise TrainingError(
                    f"Memory ran out with batches of {size}, shared by {count()} processes: {_first_line(error)} "
                    "Lower batch_size, or take more processes, each with memory of its own."
                ) from error
            if size == 1:
                raise TrainingError(
                    f"One example alone does not fit into memory: {_first_line(error)} Shorten the inputs "
                    "(max_length), take a smaller model, or free memory."
                ) from error
            reason = _first_line(error)
        clear_device_cache(garbage_collection=True)  # here, since the error held on to the tensors of the failed step
        smaller = size // next(factor for factor in range(2, size + 1) if size % factor == 0)
        logger.warning(
            f"Memory ran out with batches of {size} ({reason}) Trying again with batches of {smaller}, "
            f"{batch_size // smaller} of them for each optimizer step: the gradient stays the same."
        )
        size = smaller
        set_seed(seed)


def _first_line(error: BaseException) -> str:
    line = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
    return line if line.endswith(".") else f"{line}."
