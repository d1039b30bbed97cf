"""Ways of running a training that our trainers cannot honour."""

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..errors import ConfigError


def check_run(args: TrainingArguments, *, fsdp_version: int | None, zero_stage: int | None = None) -> None:
    """ConfigError where the loss would be wrong: nn.DataParallel, the first version of FSDP, or ZeRO-3."""
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs and would use nn.DataParallel, which cannot run the losses. "
            "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if fsdp_version == 1:
        raise ConfigError("FSDP version 1 is not supported. Set fsdp_version: 2 in the accelerate config.")
    if zero_stage == 3:
        raise ConfigError(
            "DeepSpeed ZeRO-3 is not supported: it would share out a teacher that no engine gathers again. Use FSDP "
            "version 2 (examples/accelerate/fsdp2.yaml), or zero_stage: 2."
        )
